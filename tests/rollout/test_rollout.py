"""Rollouts: the tokens are those of transformers, the log-probs those of training, in any batch shape."""

import math

import numpy as np
import pytest
import tiny
import torch
from engines import all_facts, engine_of, generate
from toy import load, wake_adapter

from minimath.data.batch import forward_args, micro_batches
from minimath.data.chat import IGNORE, Encoded
from minimath.kernels import linear_logp
from minimath.models.forward import head, hidden_states
from minimath.models.fused import fused_layers
from minimath.rollout.sampling import Sampling, sample_tokens

LENGTHS = (5, 41, 23, 12)  # of prompts: unsorted, and of no nice number
WINDOW = 16


def prompts_of(lengths=LENGTHS, seed=0):
    """Prompts of random ordinary tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(4, 300, (n,), generator=generator).tolist() for n in lengths]


@pytest.fixture(scope="module")
def family_dir(tmp_path_factory):
    """family_dir(name) -> folder of the tiny model of that family, made once."""
    made = {}
    tiny.FAMILIES["mistral-window"] = {"sliding_window": WINDOW}

    def build(family):
        if family not in made:
            made[family] = tiny.tiny_model(tmp_path_factory.mktemp(family), family)
        return made[family]

    yield build
    del tiny.FAMILIES["mistral-window"]


def load_family(folder, family, **options):
    return load(folder, attn="eager" if family == "gemma2" else "sdpa", **options)


@pytest.fixture(scope="module")
def llama(family_dir):
    """(model, tokenizer) of the tiny Llama with a live adapter, in train mode as in the loop."""
    model, tokenizer = load(family_dir("llama"), train=True)
    wake_adapter(model)
    return model, tokenizer


def full_logps(model, prompt, completion, temperature=1.0):
    """Log-probs (n, V) at each place of a completion, from one full forward through the model's own head."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + completion.ids])).logits[0].double()
    return torch.log_softmax(logits[len(prompt) - 1 : -1] / temperature, -1)


# ---- tokens


@pytest.mark.parametrize("family", [*tiny.FAMILIES, "mistral-window"])
def test_greedy_equals_transformers_token_for_token(family_dir, family):
    model, tokenizer = load_family(family_dir(family), family)
    new = 60  # gemma2's window of 64 and mistral's of 16 are left behind
    ours = generate(
        model,
        tokenizer,
        prompts_of(),
        max_new_tokens=new,
        temperature=0,
        eos=[tokenizer.eos_token_id],
        max_num_seqs=2,
    )
    for prompt, [completion] in zip(prompts_of(), ours, strict=True):
        theirs = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=new, use_cache=True)
        assert completion.ids == theirs[0, len(prompt) :].tolist()


def test_a_sliding_window_changes_the_tokens_of_the_tiny_model(family_dir):
    """Without this, the comparison above could pass with the window ignored on both sides."""
    told = []
    for family in ("mistral", "mistral-window"):
        model, tokenizer = load(family_dir(family))
        told.append(generate(model, tokenizer, prompts_of(), max_new_tokens=20, temperature=0, eos=[]))
    assert all_facts(told[0]) != all_facts(told[1])


@pytest.mark.parametrize("family", [*tiny.FAMILIES, "mistral-window"])
def test_recorded_logp_equals_the_full_forward(family_dir, family):
    model, tokenizer = load_family(family_dir(family), family)
    groups = generate(
        model, tokenizer, prompts_of(), samples=2, max_new_tokens=50, temperature=0.7, eos=[], seed=3
    )
    for prompt, group in zip(prompts_of(), groups, strict=True):
        for completion in group:
            picked = full_logps(model, prompt, completion, 0.7).gather(
                1, torch.tensor(completion.ids)[:, None]
            )[:, 0]
            torch.testing.assert_close(torch.tensor(completion.logp).double(), picked, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral-window"])
def test_decoding_agrees_with_eager_training(family_dir, family):
    """Where decoding takes another attention than training, log-probs are the same."""
    model, tokenizer = load(family_dir(family), attn="eager")
    [[completion]] = generate(model, tokenizer, prompts_of()[1:2], max_new_tokens=40, eos=[])
    assert model.config._attn_implementation == "eager"
    picked = full_logps(model, prompts_of()[1], completion).gather(1, torch.tensor(completion.ids)[:, None])[
        :, 0
    ]
    torch.testing.assert_close(torch.tensor(completion.logp).double(), picked, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "family", ["llama", "qwen2", "qwen3", "mistral-window", "gemma2", "gemma3_text", "phi3", "granite", "cohere"]
)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_recorded_logp_equals_linear_logp_of_the_training_forward(family_dir, family, temperature):
    model, tokenizer = load_family(family_dir(family), family, train=True)
    wake_adapter(model)
    prompts = prompts_of()
    groups = generate(
        model, tokenizer, prompts, samples=2, max_new_tokens=20, temperature=temperature, eos=[], seed=3
    )
    assert model.training  # restored
    rows = [
        Encoded(p + c.ids, [False] * len(p) + [True] * len(c.ids), False)
        for p, group in zip(prompts, groups, strict=True)
        for c in group
    ]
    recorded = [torch.tensor(c.logp) for group in groups for c in group]
    lm_head = head(model)
    for indices, batch in micro_batches(rows, packing=False, micro_batch_tokens=150, pad_id=3):
        hidden = hidden_states(model, **forward_args(batch)).flatten(0, 1)
        logp = linear_logp(
            hidden, lm_head.weight, batch["target"], temperature=temperature, **lm_head.kernel_args()
        )
        wanted = torch.cat([recorded[i] for i in indices])
        torch.testing.assert_close(logp[batch["target"] != IGNORE].detach(), wanted, atol=1e-4, rtol=0)


def renormalised(logp, how: Sampling):
    """Independent truncation of one distribution (V,): top-k, then min-p, then top-p, each on what is left."""
    order = sorted(range(len(logp)), key=lambda i: -logp[i])
    kept = order[: how.top_k] if how.top_k else order
    kept = [i for i in kept if math.exp(logp[i]) >= how.min_p * math.exp(logp[order[0]])]
    total, mass, nucleus = sum(math.exp(logp[i]) for i in kept), 0.0, []
    for i in kept:
        if mass >= how.top_p:
            break
        nucleus.append(i)
        mass += math.exp(logp[i]) / total
    left = math.log(sum(math.exp(logp[i]) for i in nucleus))
    return {i: logp[i] - left for i in nucleus}


@pytest.mark.parametrize(
    "how",
    [
        Sampling(0.9, top_p=0.8),
        Sampling(0.9, min_p=0.1),
        Sampling(0.9, top_k=5),
        Sampling(1.1, top_p=0.7, min_p=0.02, top_k=20),
    ],
)
def test_truncated_sampling_records_the_renormalised_logp(llama, how):
    model, tokenizer = llama
    groups = generate(model, tokenizer, prompts_of(), samples=2, max_new_tokens=12, eos=[], **how._asdict())
    for prompt, group in zip(prompts_of(), groups, strict=True):
        for completion in group:
            for token, logp, row in zip(
                completion.ids,
                completion.logp,
                full_logps(model, prompt, completion, how.temperature).tolist(),
                strict=True,
            ):
                assert logp == pytest.approx(renormalised(row, how)[token], abs=1e-4)


# ---- batching


def sampled(llama, **options):
    model, tokenizer = llama
    options = {"samples": 3, "max_new_tokens": 24, "seed": 7, "eos": list(range(20, 50)), **options}
    return generate(model, tokenizer, prompts_of(), **options)


def test_completions_do_not_depend_on_how_many_decode_side_by_side(llama):
    all_at_once = sampled(llama, max_num_seqs=0)
    lengths = {len(c.ids) for group in all_at_once for c in group}
    assert len(lengths) > 5  # rows end at different times: slots are refilled and the batch is compacted
    for slots in (1, 3, 5):
        other = sampled(llama, max_num_seqs=slots)
        assert [[c.ids for c in group] for group in other] == [
            [c.ids for c in group] for group in all_at_once
        ]
        for one, two in zip(sum(other, []), sum(all_at_once, []), strict=True):
            assert one.finished == two.finished
            np.testing.assert_allclose(one.logp, two.logp, atol=1e-5)


def test_completions_come_back_in_the_order_of_the_prompts(llama):
    model, tokenizer = llama
    groups = sampled(llama, max_num_seqs=4)
    for i, prompt in enumerate(prompts_of()):
        [alone] = generate(
            model,
            tokenizer,
            [prompt],
            samples=3,
            keys=[i],
            max_new_tokens=24,
            seed=7,
            eos=list(range(20, 50)),
        )
        assert [c.ids for c in alone] == [c.ids for c in groups[i]]


def test_seeds_prompts_and_samples_have_their_own_random_streams(llama):
    model, tokenizer = llama
    groups = generate(model, tokenizer, [prompts_of()[0]] * 2, samples=3, max_new_tokens=10, eos=[], seed=1)
    again = generate(model, tokenizer, [prompts_of()[0]] * 2, samples=3, max_new_tokens=10, eos=[], seed=1)
    other = generate(model, tokenizer, [prompts_of()[0]] * 2, samples=3, max_new_tokens=10, eos=[], seed=2)
    assert all_facts(groups) == all_facts(again)
    assert len({tuple(c.ids) for run in (groups, other) for group in run for c in group}) == 12


def test_any_id_of_the_eos_set_ends_a_completion(llama):
    eos = set(range(20, 50))
    ends = set()
    for completion in sum(sampled(llama, samples=8), []):
        stops = [i for i, token in enumerate(completion.ids) if token in eos]
        assert completion.finished == bool(stops)
        assert stops in ([], [len(completion.ids) - 1])
        assert completion.finished or len(completion.ids) == 24  # cut at max_new_tokens
        ends |= {completion.ids[-1]} & eos
    assert len(ends) > 3


def test_a_completion_cut_at_max_new_tokens_has_not_finished(llama):
    for completion in sum(sampled(llama, max_new_tokens=2, eos=[]), []):
        assert len(completion.ids) == len(completion.logp) == 2 and not completion.finished


def test_an_end_token_in_the_last_place_has_finished(llama):
    """The completion that ends with its end token exactly at max_new_tokens is whole."""
    longest = max((c for c in sum(sampled(llama), []) if c.finished), key=lambda c: len(c.ids))
    again = sampled(llama, max_new_tokens=max(16, len(longest.ids)))
    assert any(c.ids == longest.ids and c.finished for c in sum(again, []))


def streamed(llama, n=3, **options):
    """The lists that a stream yields."""
    model, tokenizer = llama
    skip = options.pop("skip", ())
    options = {"max_new_tokens": 24, "seed": 7, "eos": list(range(20, 50)), **options}
    return list(engine_of(model, tokenizer, **options).stream(prompts_of(), n, skip=skip))


def test_a_stream_tells_every_completion_once_soon_after_it_has_finished(llama):
    told = streamed(llama, max_num_seqs=5)
    places = [(p, s) for finished in told for p, s, _ in finished]
    assert sorted(places) == [(p, s) for p in range(len(LENGTHS)) for s in range(3)]
    assert sum(bool(finished) for finished in told) > 5 and [] in told  # not all at the end
    groups = sampled(llama, max_num_seqs=5)
    for p, s, sample in sum(told, []):
        assert sample.ids == groups[p][s].ids and sample.logp == groups[p][s].logp


def test_samples_have_their_text_without_special_tokens(llama):
    _, tokenizer = llama
    [group] = generate(*llama, prompts_of()[:1], samples=8, max_new_tokens=30, eos=[2, *range(20, 120)])
    for sample in group:
        assert sample.text == tokenizer.decode(sample.ids, skip_special_tokens=True)
        assert sample.tokens == len(sample.ids)


def test_completions_that_are_there_are_not_sampled_again(llama):
    groups = sampled(llama)
    skip = {(p, s) for p in range(len(LENGTHS)) for s in range(3) if (p + s) % 2}
    told = {(p, s): sample for finished in streamed(llama, skip=skip) for p, s, sample in finished}
    assert told.keys() == {(p, s) for p in range(len(LENGTHS)) for s in range(3)} - skip
    assert all(sample.ids == groups[p][s].ids for (p, s), sample in told.items())


def test_a_stream_leaves_the_callers_grad_mode_alone_and_the_model_as_it_was(llama):
    model, tokenizer = llama
    attention = model.get_base_model().config._attn_implementation
    stream = engine_of(model, tokenizer, max_new_tokens=24, eos=[]).stream(prompts_of(), 3)
    for _ in range(3):
        next(stream)
        assert torch.is_grad_enabled()
    assert not model.training
    stream.close()
    assert torch.is_grad_enabled() and model.training
    assert model.get_base_model().config._attn_implementation == attention
    assert all(group.product is None for layer in fused_layers(model.get_base_model()).layers for group in layer.groups)


def test_running_tells_how_far_each_completion_is(llama):
    engine = engine_of(*llama, max_new_tokens=24, eos=[], max_num_seqs=5, seed=7)
    assert engine.running() == []
    whole, longest = sampled(llama, eos=[]), 0
    for _ in engine.stream(prompts_of(), 3):
        for p, s, ids in engine.running():
            assert ids == whole[p][s].ids[:len(ids)] and 0 < len(ids) < 24
            longest = max(longest, len(ids))
    assert longest > 20 and engine.running() == []


def test_no_prompts_give_no_completions(llama):
    assert generate(*llama, [], max_new_tokens=4, eos=[]) == []


# ---- the choice of a token


def chi_square(counts, probs):
    expected = np.asarray(probs) * counts.sum()
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_sampling_frequencies_match_the_softmax(temperature):
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5])
    n = 40_000
    noise = torch.rand(n, generator=torch.Generator().manual_seed(0))
    token, logp, _ = sample_tokens(logits.repeat(n, 1), noise, Sampling(temperature))
    wanted = torch.log_softmax(logits / temperature, -1)
    assert (
        chi_square(torch.bincount(token, minlength=5).numpy(), wanted.exp().numpy()) < 18.5
    )  # 4 d.o.f., p = 0.001
    torch.testing.assert_close(logp, wanted[token])


def test_first_tokens_of_many_samples_follow_the_model(llama):
    """The streams of the samples are independent: 3,000 of them give the model's own distribution."""
    model, tokenizer = llama
    prompt = prompts_of()[0]
    [group] = generate(model, tokenizer, [prompt], samples=3000, max_new_tokens=1, eos=[], max_num_seqs=0, seed=5)
    with torch.no_grad():
        probs = torch.softmax(model(input_ids=torch.tensor([prompt])).logits[0, -1].double(), -1).numpy()
    common = np.argsort(-probs)[:8]
    counts = np.array([sum(c.ids == [int(t)] for c in group) for t in common])
    counts, probs = np.append(counts, 3000 - counts.sum()), np.append(probs[common], 1 - probs[common].sum())
    assert chi_square(counts, probs) < 26.1  # 8 d.o.f., p = 0.001


@pytest.mark.parametrize("how", [Sampling(), Sampling(top_p=0.9)])
@pytest.mark.parametrize("vocab", [50, 512])
def test_nan_logits_choose_a_token_that_the_embedding_has_and_a_log_prob_that_says_so(vocab, how):
    """A vocabulary of no nice size is padded; a token of the padding ended the run inside the embedding."""
    token, logp, full = sample_tokens(torch.full((3, vocab), torch.nan), torch.tensor([0.0, 0.5, 0.999]), how)
    assert ((token >= 0) & (token < vocab)).all() and logp.isnan().all() and full.isnan().all()


def test_noise_at_the_top_never_picks_a_token_without_probability():
    logits = torch.tensor([[1.0, 2.0, -torch.inf, -torch.inf]])
    for noise in (1.0, 1 - 2**-24):  # the first is what rounding makes of a double just below 1
        token, logp, _ = sample_tokens(logits.clone(), torch.tensor([noise]), Sampling())
        assert token.tolist() == [1] and math.isfinite(logp)


def test_greedy_records_the_logp_at_temperature_one():
    logits = torch.tensor([[0.0, 3.0, 1.0]])
    token, logp, _ = sample_tokens(logits.clone(), torch.zeros(1), Sampling(0.0))
    assert token.tolist() == [1]
    torch.testing.assert_close(logp, torch.log_softmax(logits, -1)[:, 1])
