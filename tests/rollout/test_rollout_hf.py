"""Rollouts by transformers' generate: for models without a standard KV cache, with the meaning of the own engine."""

import pytest
import tiny
import torch
from engines import all_facts, engine_of, generate
from peft import LoraConfig, get_peft_model
from toy import load, wake_adapter
from transformers import AutoConfig, AutoModelForCausalLM

from minimath.core.errors import UserError
from minimath.data.batch import forward_args, micro_batches
from minimath.data.chat import IGNORE, Encoded
from minimath.kernels import linear_logp
from minimath.models.forward import adapter_off, head, hidden_states, inference
from minimath.rollout.transformers_engine import TransformersEngine, own_generation_config, padding_is_harmless

MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 16}
RECURRENT = {  # what each adds to the tiny config; none of them keeps only keys and values
    "mamba": {"state_size": 8},
    "mamba2": {"state_size": 8, "num_heads": 8, "head_dim": 8, "expand": 2, "n_groups": 1, "chunk_size": 16},
    "bamba": {"attn_layer_indices": [1], **MAMBA},
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_multiple_of": 8},
    "recurrent_gemma": {"num_hidden_layers": 3, "lru_width": 32, "head_dim": 8, "attention_window_size": 16},
}
LENGTHS = (5, 41, 23, 12)


def generate_hf(model, tokenizer, prompts, **options):
    """What the engine of transformers samples."""
    return generate(model, tokenizer, prompts, kind=TransformersEngine, **options)


def prompts_of(lengths=LENGTHS, seed=0):
    """Prompts of random ordinary tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(4, 300, (n,), generator=generator).tolist() for n in lengths]


@pytest.fixture(scope="module")
def recurrent(tiny_tokenizer):
    """recurrent(name) -> a tiny random model of that family, without an adapter, made once."""
    made, tokenizer = {}, tiny_tokenizer

    def build(family):
        if family not in made:
            fields = {
                "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
                "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2,
                "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None,
                "pad_token_id": None,  # else the pad's embedding is zero, and padding is harmless to all
            }  # fmt: skip
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                config = AutoConfig.for_model(family, **{**fields, **RECURRENT[family]})
                made[family] = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
                made[family].eval().config.use_cache = False  # as load_model leaves it
        return made[family]

    return build


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """(model, tokenizer) of the tiny Llama with a live adapter, in train mode as in the loop."""
    folder = tiny.write_tiny(tmp_path_factory.mktemp("llama"))
    model, tokenizer = load(folder, train=True)
    wake_adapter(model)
    return model, tokenizer


def full_logps(model, prompt, ids, temperature=1.0):
    """Log-probs (n,) of `ids` after `prompt` from one full forward through the model's own head."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].double()
    return torch.log_softmax(logits / temperature, -1).gather(1, torch.tensor(ids)[:, None])[:, 0]


def assert_close(recorded, expected, atol=1e-4):
    torch.testing.assert_close(torch.tensor(recorded).double(), expected.double(), atol=atol, rtol=0)


# ---- models without a standard KV cache


@pytest.mark.parametrize("family", RECURRENT)
def test_recurrent_models_record_the_logp_of_the_full_forward(recurrent, tiny_tokenizer, family):
    model = recurrent(family)
    groups = generate_hf(model, tiny_tokenizer, prompts_of(), samples=2, max_new_tokens=12, temperature=0.7,
                         top_p=0.9, eos=[], seed=3)  # fmt: skip
    assert [len(group) for group in groups] == [2] * len(LENGTHS)
    assert any(group[0].ids != group[1].ids for group in groups)
    for prompt, group in zip(prompts_of(), groups, strict=True):
        for completion in group:
            assert_close(completion.full_logp, full_logps(model, prompt, completion.ids, 0.7))
            assert all(a >= b - 1e-6 for a, b in zip(completion.logp, completion.full_logp, strict=True))


@pytest.mark.parametrize("family", ["mamba", "recurrent_gemma"])
def test_greedy_tokens_are_those_of_the_full_forward(recurrent, tiny_tokenizer, family):
    model, options = recurrent(family), {"max_new_tokens": 4, "temperature": 0.0, "eos": []}
    for prompt, [completion] in zip(
        prompts_of(), generate_hf(model, tiny_tokenizer, prompts_of(), **options), strict=True
    ):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + completion.ids])).logits[0, len(prompt) - 1 : -1]
        assert completion.ids == logits.argmax(-1).tolist()
        assert_close(completion.logp, full_logps(model, prompt, completion.ids))
        assert not completion.finished and completion.full_logp is None


@pytest.mark.parametrize("family", RECURRENT)
def test_a_completion_of_a_recurrent_model_does_not_depend_on_its_batch(recurrent, tiny_tokenizer, family):
    """Also where the model lets padding into its state: such prompts are then kept apart."""
    options = {"samples": 2, "max_new_tokens": 10, "eos": [], "seed": 5}
    together = generate_hf(recurrent(family), tiny_tokenizer, prompts_of(), **options)
    for key, prompt in enumerate(prompts_of()):
        [alone] = generate_hf(recurrent(family), tiny_tokenizer, [prompt], keys=[key], max_num_seqs=1, **options)
        assert [c.ids for c in alone] == [c.ids for c in together[key]]


def test_padding_that_changes_a_model_is_noticed(recurrent, llama, monkeypatch):
    model, tokenizer = llama

    def harmless(model):
        with own_generation_config(model), inference(model):
            return padding_is_harmless(model, tokenizer.pad_token_id, prompts_of()[0], 41)

    assert harmless(model) and harmless(recurrent("mamba")) and harmless(recurrent("bamba"))
    assert not harmless(recurrent("recurrent_gemma"))
    monkeypatch.setattr(recurrent("mamba"), "forward", lambda input_ids=None: None)
    assert not harmless(recurrent("mamba"))  # takes no mask at all


def test_logps_that_are_not_those_of_training_are_refused(tiny_tokenizer):
    """RWKV's generate is wrong for several rows, and nothing but a comparison shows it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = AutoConfig.for_model("rwkv", vocab_size=len(tiny_tokenizer), hidden_size=32, num_hidden_layers=2,
                                      attention_hidden_size=32, intermediate_size=64)  # fmt: skip
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    options = {"samples": 2, "max_new_tokens": 12, "eos": [], "seed": 3}
    with pytest.raises(UserError, match="RwkvForCausalLM .* max_num_seqs=1"):
        generate_hf(model, tiny_tokenizer, prompts_of(), **options)
    for prompt, group in zip(
        prompts_of(), generate_hf(model, tiny_tokenizer, prompts_of(), max_num_seqs=1, **options), strict=True
    ):
        assert_close(group[1].logp, full_logps(model, prompt, group[1].ids))


def test_a_peft_model_samples_with_its_adapter(recurrent, tiny_tokenizer):
    base = recurrent("mamba2")
    before = generate_hf(base, tiny_tokenizer, prompts_of(), max_new_tokens=8, temperature=0.0, eos=[])
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["in_proj"], task_type="CAUSAL_LM"))
    wake_adapter(model)
    after = generate_hf(model, tiny_tokenizer, prompts_of(), max_new_tokens=8, temperature=0.0, eos=[])
    assert [g[0].ids for g in after] != [g[0].ids for g in before]
    assert_close(after[1][0].logp, full_logps(model.eval(), prompts_of()[1], after[1][0].ids))
    with adapter_off(model):
        off = generate_hf(model, tiny_tokenizer, prompts_of(), max_new_tokens=8, temperature=0.0, eos=[])
    model.unload()
    assert [g[0].ids for g in off] == [g[0].ids for g in before]


# ---- the meaning of the own engine


@pytest.mark.parametrize("how", [{}, {"temperature": 0.0}, {"temperature": 0.7, "top_p": 0.8, "min_p": 0.02},
                                 {"top_k": 5}])  # fmt: skip
def test_tokens_and_logps_are_those_of_the_decode_loop(llama, how):
    model, tokenizer = llama
    options = {"samples": 3, "max_new_tokens": 30, "eos": [tokenizer.eos_token_id, *range(4, 12)], "seed": 11, **how}
    ours = generate(model, tokenizer, prompts_of(), **options)
    theirs = generate_hf(model, tokenizer, prompts_of(), max_num_seqs=5, **options)
    assert model.training
    for a, b in zip(sum(ours, []), sum(theirs, []), strict=True):
        assert (a.ids, a.finished) == (b.ids, b.finished)
        assert_close(b.logp, torch.tensor(a.logp))
    assert how == {"temperature": 0.0} or len({len(c.ids) for c in sum(theirs, [])}) > 1  # some ended early


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_recorded_logp_equals_linear_logp_of_the_training_forward(llama, temperature):
    model, tokenizer = llama
    groups = generate_hf(model, tokenizer, prompts_of(), samples=2, max_new_tokens=16, temperature=temperature,
                         top_k=20, eos=[], seed=2)  # fmt: skip
    rows, recorded = [], []
    for prompt, group in zip(prompts_of(), groups, strict=True):
        for completion in group:
            mask = [False] * len(prompt) + [True] * len(completion.ids)
            rows.append(Encoded(prompt + completion.ids, mask, False))
            recorded.append(completion.full_logp)
    lm_head, seen = head(model), 0
    for indices, batch in micro_batches(rows, packing=False, micro_batch_tokens=150, pad_id=3):
        with torch.no_grad():
            hidden = hidden_states(model, **forward_args(batch)).flatten(0, 1)
            logp = linear_logp(hidden, lm_head.weight, batch["target"], temperature=temperature,
                               **lm_head.kernel_args())  # fmt: skip
        assert_close(sum((recorded[i] for i in indices), []), logp[batch["target"] != IGNORE])
        seen += len(indices)
    assert seen == len(rows)


def test_the_models_generation_config_does_not_leak_in(llama):
    model, tokenizer = llama
    options = {"samples": 2, "max_new_tokens": 20, "eos": [], "seed": 1}
    plain = generate_hf(model, tokenizer, prompts_of(), **options)
    config = model.get_base_model().generation_config
    settings = {"temperature": 0.1, "top_k": 2, "top_p": 0.3, "repetition_penalty": 9.0, "do_sample": True,
                "min_new_tokens": 25, "suppress_tokens": list(range(4, 200)), "max_length": 30}  # fmt: skip
    before = {name: getattr(config, name, None) for name in settings}
    try:
        for name, value in settings.items():
            setattr(config, name, value)
        assert all_facts(generate_hf(model, tokenizer, prompts_of(), **options)) == all_facts(plain)
        assert model.get_base_model().generation_config is config
    finally:
        for name, value in before.items():
            setattr(config, name, value)


def test_completions_stop_at_any_end_token_or_at_the_limit(llama):
    model, tokenizer = llama
    [free] = generate_hf(model, tokenizer, prompts_of()[:1], samples=4, max_new_tokens=12, eos=[], seed=4)
    assert all(len(c.ids) == 12 and not c.finished for c in free)
    stop = [free[0].ids[3], free[1].ids[5]]
    [cut] = generate_hf(model, tokenizer, prompts_of()[:1], samples=4, max_new_tokens=12, eos=stop, seed=4)
    for whole, completion in zip(free, cut, strict=True):
        at = next((i for i, token in enumerate(whole.ids) if token in stop), None)
        assert completion.finished == (at is not None)
        assert completion.ids == whole.ids[: 12 if at is None else at + 1]
        assert len(completion.logp) == len(completion.ids)


def test_what_is_there_is_not_sampled_again_and_each_completion_is_told(llama):
    model, tokenizer = llama
    options = {"max_new_tokens": 6, "eos": [], "seed": 9, "kind": TransformersEngine}
    plain = generate(model, tokenizer, prompts_of(), samples=2, **options)
    skip = {(1, 0), (2, 1)}
    told = list(engine_of(model, tokenizer, max_num_seqs=3, **options).stream(prompts_of(), 2, skip=skip))
    assert [len(finished) for finished in told] == [3, 3]
    assert {(p, s) for p, s, _ in sum(told, [])} == {(p, s) for p in range(4) for s in range(2)} - skip
    assert all(sample.ids == plain[p][s].ids for p, s, sample in sum(told, []))
    assert generate_hf(model, tokenizer, [], samples=2, max_new_tokens=6) == []


def test_a_pad_token_of_a_prompt_is_a_token_and_nothing_is_said_of_masks(llama, caplog):
    """Without a mask generate left it out: log-probs 0.2 away from the training forward's, an error of ours."""
    model, tokenizer = llama
    prompts = [[5, tokenizer.pad_token_id, 7], [8, 9, 10]]
    options = {"max_new_tokens": 6, "eos": [], "seed": 1}
    theirs = generate_hf(model, tokenizer, prompts, **options)
    assert [g[0].ids for g in theirs] == [g[0].ids for g in generate(model, tokenizer, prompts, **options)]
    assert "attention mask" not in caplog.text


def test_batches_hold_at_most_max_num_seqs(llama, monkeypatch):
    model, tokenizer = llama
    sizes = []
    base, theirs = model.get_base_model(), model.get_base_model().generate

    def counted(**options):
        sizes.append(len(options["input_ids"]))
        return theirs(**options)

    monkeypatch.setattr(base, "generate", counted)
    generate_hf(model, tokenizer, prompts_of((9,) * 4), samples=2, max_new_tokens=2, eos=[], max_num_seqs=3)
    assert sizes == [3, 3, 2]
    generate_hf(model, tokenizer, prompts_of((9,) * 4), samples=2, max_new_tokens=2, eos=[])
    assert sizes[3:] == [8]


@pytest.mark.parametrize("slots", [0, 5])
def test_out_of_memory_halves_the_batches_and_changes_no_completion(recurrent, tiny_tokenizer, monkeypatch, slots):
    options = {"samples": 3, "max_new_tokens": 8, "eos": [], "seed": 5, "max_num_seqs": slots}
    model, said, sizes = recurrent("mamba"), [], []
    whole = generate_hf(model, tiny_tokenizer, prompts_of(), **options)
    decode = TransformersEngine._generate

    def small(self, jobs):
        sizes.append(len(jobs))
        if len(jobs) > 2:
            raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
        return decode(self, jobs)

    monkeypatch.setattr(TransformersEngine, "_generate", small)
    again = generate_hf(model, tiny_tokenizer, prompts_of(), say=said.append, **options)
    assert [[c.ids for c in group] for group in again] == [[c.ids for c in group] for group in whole]
    assert "going on with 2" in said[-1] and len([size for size in sizes if size > 2]) == len(said)


def test_memory_too_small_for_one_sequence_is_an_error_that_says_what_to_do(recurrent, tiny_tokenizer, monkeypatch):
    def full(*args):
        raise torch.OutOfMemoryError("simulated")

    monkeypatch.setattr(TransformersEngine, "_generate", full)
    with pytest.raises(UserError, match="lower max_num_seqs"):
        generate_hf(recurrent("mamba"), tiny_tokenizer, prompts_of(), max_new_tokens=4, say=lambda text: None)
