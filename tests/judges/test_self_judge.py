"""The self-judge: verdicts of a shared tree are those of prompts apart, and memory that runs out costs no votes."""
import pytest
import tiny as tiny_models
import torch
from judging import Fixed, group
from toy import load, policy_of

from minimath.config.schema import JudgeOptions, SFTConfig
from minimath.core.errors import UserError
from minimath.grading.steps import StepCount
from minimath.judges import self_judge as self_judge_file
from minimath.judges.attack import bare_prompt
from minimath.judges.base import Pair
from minimath.judges.compare import ask
from minimath.judges.judge import judge_groups
from minimath.judges.rows import chat_ids, verdict_ids
from minimath.judges.rubrics import judge_prompt, load_rubric
from minimath.judges.self_judge import Question, SelfJudge, plan_passes, row_states, tree_packs, verdict_logps

GOOD = Fixed(r"5*3=15. \boxed{15}", tokens=8)
LONG = Fixed(r"Let us restate the problem. 5*3=15. We check it. \boxed{15}", tokens=20)
UNSOUND = Fixed(r"5*3=14. \boxed{15}", steps=StepCount(0, 1), tokens=8)


@pytest.fixture(scope="module")
def policy(tiny_dir):
    return policy_of(tiny_dir, SFTConfig, train=True, lora_r=4)


def self_judge(policy, micro_batch_tokens=4096, **options):
    return SelfJudge(JudgeOptions(), policy, micro_batch_tokens=micro_batch_tokens, **options)


def logps(model, prompts, verdicts, micro_batch_tokens):
    """(log-probs of the verdicts, tokens computed)."""
    passes, tree, computed = plan_passes(model, prompts, micro_batch_tokens)
    questions = [Question(ids, [(len(ids) - 1, verdict) for verdict in verdicts]) for ids in prompts]
    return torch.stack(verdict_logps(model, questions, passes, tree)), computed


def test_self_judge_equals_the_verdicts_softmax_of_full_logits(policy):
    model, tokenizer = policy.model, policy.tokenizer
    pairs = [Pair("2+2?", GOOD, LONG), Pair("2+2?", LONG, GOOD), Pair("a longer problem " * 9, UNSOUND, GOOD)]
    judge = self_judge(policy, 1)
    got = judge.compare(pairs)
    verdicts = verdict_ids(tokenizer)
    assert [tokenizer.decode([token]) for token in verdicts] == ["A", "B", "T"]
    for pair, chance in zip(pairs, got):
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": judge_prompt(load_rubric(), pair)}], tokenize=False,
            add_generation_prompt=True)
        with torch.no_grad(), model.disable_adapter():
            model.eval()
            ids = torch.tensor([tokenizer.encode(text, add_special_tokens=False)])
            chances = torch.softmax(model(input_ids=ids).logits[0, -1], 0)[verdicts]
        a, _, tie = (chances / chances.sum()).tolist()
        assert chance == pytest.approx(a + tie / 2, abs=1e-5)
    assert len({round(chance, 6) for chance in got}) == 3      # the prompt matters, or this shows nothing
    assert judge.counts["computed_tokens"] == judge.counts["prompt_tokens"]


def group_prompts(tokenizer, n=4, problems=("Tom has 12 apples. " * 4, "A box holds 6 pens. " * 7)):
    """All prompts of the pairs of n candidates under a short rubric, of about 150 tokens each."""
    texts = [Fixed(f"{k} + {k + 2} = {2 * k + 2}. {'We add. ' * k}") for k in range(n)]
    pairs = [Pair(problem, a, b, "12ab") for problem in problems for a in texts for b in texts if a != b]
    rubric = "Which is better? {nonce} {problem}\n{nonce} A: {first}\n{nonce} B: {second}\n{nonce} A, B or TIE?"
    return [chat_ids(tokenizer, judge_prompt(rubric, pair)) for pair in pairs]


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "gemma2", "phi3", "granite", "cohere"])
def test_verdicts_of_a_shared_tree_equal_those_of_prompts_apart(tmp_path, family, attn, monkeypatch):
    if (family, attn) == ("gemma2", "sdpa"):
        pytest.skip("its capped attention scores need eager attention")
    model, tokenizer = load(tiny_models.tiny_model(tmp_path / family, family), attn=attn)
    config = model.config.get_text_config()
    if getattr(config, "sliding_window", None):
        config.sliding_window = 4096                                  # beyond every prompt: idle
        for module in model.modules():
            if getattr(module, "sliding_window", None):
                module.sliding_window = 4096
    prompts, verdicts = group_prompts(tokenizer), verdict_ids(tokenizer)
    monkeypatch.setattr(self_judge_file, "EAGER_TOKENS", 400)          # several trees, cut anywhere
    with torch.no_grad():
        model.eval()
        shared, computed = logps(model, prompts, verdicts, 1 << 20)
        apart, whole = logps(model, prompts, verdicts, 1)
    assert whole == sum(map(len, prompts)) and computed < 0.5 * whole
    assert (shared - apart).abs().max() < 1e-4
    assert apart.std(0).min() > 1e-2                                  # prompts differ, or this shows nothing


def test_models_that_a_block_mask_cannot_describe_get_rows(tmp_path):
    model, tokenizer = load(tiny_models.tiny_model(tmp_path / "gemma2", "gemma2"), attn="eager")
    prompts, verdicts = group_prompts(tokenizer, n=3), verdict_ids(tokenizer)  # all longer than its window of 64
    with torch.no_grad():
        model.eval()
        got, computed = logps(model, prompts, verdicts, 1 << 20)
        alone = [logps(model, [ids], verdicts, 1)[0] for ids in prompts]
    assert computed == sum(map(len, prompts))
    torch.testing.assert_close(got, torch.cat(alone), atol=1e-4, rtol=0)
    model, tokenizer = load(tiny_models.tiny_model(tmp_path / "llama", "llama"))
    assert self_judge_file.takes_trees(model, 4096)
    model.config.layer_types = ["linear_attention", "full_attention"]
    assert not self_judge_file.takes_trees(model, 10)


def test_trees_hold_every_prompt_once_and_keep_the_token_budget():
    prompts = [[1, 2, 3], [1, 2, 4, 5], [9], [1, 2, 3], [1, 2]]
    assert tree_packs(prompts, 100) == [([4, 0, 3, 1, 2], 6)]         # 1 2, 3, nothing, 4 5, 9
    assert tree_packs(prompts, 3) == [([4, 0, 3], 3), ([1], 4), ([2], 1)]
    assert tree_packs(prompts, 1) == [([4], 2), ([0], 3), ([3], 3), ([1], 4), ([2], 1)]


def test_judging_a_group_shares_its_prompts_and_restores_nothing_else(policy, monkeypatch):
    monkeypatch.setattr(self_judge_file, "EAGER_TOKENS", 2048)            # the tiny tokenizer's prompts are long
    groups = [group("Tom has 12 apples and buys 7 more. " * 3, [GOOD, LONG, UNSOUND, Fixed(r"15 \boxed{15}")])]
    shared, apart = self_judge(policy), self_judge(policy, 1)
    wins, stats = judge_groups(shared, groups)
    assert wins[0] == pytest.approx(judge_groups(apart, groups)[0][0], abs=1e-4)
    assert shared.counts["computed_tokens"] < 0.45 * shared.counts["prompt_tokens"]
    assert shared.soft and stats["comparisons"] == 12 and len(set(wins[0])) == 4


def test_self_judge_does_not_depend_on_the_batch(policy):
    pairs = [Pair("p " * n, GOOD, LONG) for n in (1, 40, 5, 80, 2)]
    one = self_judge(policy, 1).compare(pairs)
    together = self_judge(policy, 1 << 20).compare(pairs)
    assert together == pytest.approx(one, abs=1e-5)


def test_self_judge_ignores_the_adapter_and_restores_train_mode(policy):
    model = policy.model
    before = self_judge(policy).compare([Pair("p", GOOD, LONG)])
    moved = [p for name, p in model.named_parameters() if "lora_B" in name]
    saved = [p.detach().clone() for p in moved]
    model.train()
    try:
        with torch.no_grad():
            for p in moved:
                p.add_(torch.randn_like(p))
        assert self_judge(policy).compare([Pair("p", GOOD, LONG)]) == before
        assert model.training
    finally:
        with torch.no_grad():
            for p, old in zip(moved, saved):
                p.copy_(old)


def test_self_judge_gives_no_vote_to_prompts_beyond_the_context(policy):
    judge = self_judge(policy)
    judge.prompt = bare_prompt                                        # which cuts nothing
    votes = judge.compare([Pair("p", Fixed("9" * 20_000), GOOD), Pair("p", GOOD, LONG)])
    assert votes[0] is None and votes[1] is not None and judge.counts["too_long"] == 1


def test_row_states_ignore_what_padding_holds(policy):
    model, tokenizer = policy.model, policy.tokenizer
    texts = map(tokenizer.encode, ("abc", "abcdefghij " * 5))
    short, long = (Question(ids, [(1, 0), (len(ids) - 1, 0)]) for ids in texts)
    with torch.no_grad():
        torch.testing.assert_close(row_states(model, [short, long])[:2], row_states(model, [short]))


def test_letters_that_are_no_single_tokens_are_a_user_error():
    class Tokenizer:
        def encode(self, text, add_special_tokens):
            return [1, 2]
    with pytest.raises(UserError, match="single tokens for the verdicts A and B"):
        verdict_ids(Tokenizer())


# ---- memory that runs out

PROBLEM = "Tom has 12 apples and buys 7 more. " * 3
SAMPLES = [GOOD, LONG, UNSOUND, Fixed(r"15 \boxed{15}")]


NO_MEMORY = torch.OutOfMemoryError("CUDA out of memory")


def card_with(monkeypatch, most: int, error=NO_MEMORY):
    """Makes passes of more than `most` tokens fail; returns the tokens of each pass that was tried."""
    tried, forward = [], self_judge_file.hidden_states

    def small(model, input_ids, **kwargs):
        tried.append(input_ids.numel())
        if tried[-1] > most:
            raise error
        return forward(model, input_ids, **kwargs)

    monkeypatch.setattr(self_judge_file, "hidden_states", small)
    return tried


@pytest.mark.parametrize("error", [NO_MEMORY, MemoryError(), RuntimeError("CPU: can't allocate memory")])
def test_an_out_of_memory_costs_no_vote_is_said_once_and_smaller_passes_stay(policy, monkeypatch, error):
    said = []
    judge = self_judge(policy, say=said.append)
    groups = [group(PROBLEM, SAMPLES)]
    wins, _ = judge_groups(self_judge(policy), groups)
    longest = max(len(chat_ids(policy.tokenizer, judge.reader.prompt(judge.reader.rubric, Pair(PROBLEM, a, b))))
                  for a in SAMPLES for b in SAMPLES)
    tried = card_with(monkeypatch, longest + 100, error)
    got, stats = judge_groups(judge, groups)
    assert got[0] == pytest.approx(wins[0], abs=1e-4) and stats["no_votes"] == 0 and stats["error"] == ""
    assert max(tried) > longest + 100 and judge.micro_batch_tokens <= longest + 100
    assert len(said) == 1 and "out of memory: from now on its passes are smaller" in said[0]
    tried.clear()
    assert judge_groups(judge, groups)[0] == got and max(tried) <= longest + 100 and len(said) == 1


def test_a_prompt_that_fits_in_no_memory_costs_its_own_vote_alone_and_is_said(policy, monkeypatch):
    said = []
    judge = self_judge(policy, say=said.append)
    pairs = [Pair("p", GOOD, LONG), Pair("p " * 900, GOOD, LONG), Pair("p", LONG, GOOD)]
    plain = self_judge(policy).compare(pairs)
    longest = max(len(chat_ids(policy.tokenizer, judge.reader.prompt(judge.reader.rubric, pair))) for pair in pairs)
    card_with(monkeypatch, longest - 1)
    votes, error = ask(judge, pairs)
    assert votes[1] is None and [votes[0], votes[2]] == pytest.approx([plain[0], plain[2]], abs=1e-4)
    assert "OutOfMemoryError" in error and sum("failed" in text for text in said) == 1


def test_another_error_of_the_model_is_said_and_not_taken_for_memory(policy, monkeypatch):
    said = []
    judge = self_judge(policy, say=said.append)
    tried = card_with(monkeypatch, 0, RuntimeError("shapes do not match"))
    for _ in range(2):
        votes, error = ask(judge, [Pair("p", GOOD, LONG)] * 2)
        assert votes == [None, None] and "shapes do not match" in error
    assert judge.micro_batch_tokens == 4096 and len(said) == 1 and len(tried) == 2 * 3
