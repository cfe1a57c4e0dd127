"""Thought and answer are counted apart, and a box in a thought that was cut is no answer."""
import pytest
from thinking import CHATML, QWEN3, R1, thinker
from tiny import tiny_tokenizer

from minimath.config.schema import EvalConfig, PromptOptions
from minimath.data.examples import Example
from minimath.data.sample import Group, Sample
from minimath.eval.evaluate import grade
from minimath.eval.metrics import summarise
from minimath.grading.answer import AnswerChecker
from minimath.models.policy import Policy
from minimath.train.brevity import BrevityOptions, brevity
from minimath.train.rollouts import rollout_metrics
from minimath.train.verifier import Verifier


@pytest.fixture(scope="module")
def checker():
    with AnswerChecker() as checker:
        yield checker


def completion(tokenizer, text: str, finished=True, **options) -> Sample:
    policy = Policy(None, tokenizer, None, PromptOptions(**options))
    ids = tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id] * finished
    policy.__class__ = type("Ours", (Policy,), {"eos": [tokenizer.eos_token_id]})
    read = policy.decode(ids)
    return Sample(ids, [-1.0] * len(ids), finished, read, thought=policy.thought_tokens(ids, read))


@pytest.mark.parametrize("added", [True, False])
@pytest.mark.parametrize("template, text, thought", [
    (QWEN3, "<think>\nhm\n</think>", "\n\n\\boxed{5}"), (R1, "hm\n</think>", "\n\n\\boxed{5}"),
    (QWEN3, "", "2 + 3 = 5 \\boxed{5}"), (CHATML, "", "5")])
def test_the_thought_is_what_stands_up_to_its_end(template, text, thought, added):
    tokenizer = thinker(template)
    if not added:  # the tags are several tokens each
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = template
    sample = completion(tokenizer, text + thought)
    assert tokenizer.decode(sample.ids[:sample.thought]) == text and not sample.cut_thinking


@pytest.mark.parametrize("template, text", [(QWEN3, "<think>\n\\boxed{5} or"), (R1, "\\boxed{5} or")])
def test_a_thought_that_never_ends_is_all_thought_and_its_box_no_answer_when_it_is_cut(template, text, checker):
    tokenizer = thinker(template)
    cut, whole = completion(tokenizer, text, False), completion(tokenizer, text)
    assert (cut.thought, whole.thought) == (cut.tokens, whole.tokens) and (cut.cut_thinking, whole.cut_thinking) == (
        True, False)
    example = Example("2+3?", "", "5")
    assert grade(0, 0, example, cut, checker)["answer"] is None
    for verifier in ("exact", "regex"):
        with Verifier(verifier, [example]) as asked:
            assert not asked.verdict(cut, example) and (asked.verdict(whole, example) or verifier == "regex")
    off = completion(tokenizer, "\\boxed{5} or", False, thinking="off" if template == QWEN3 else "auto")
    assert off.cut_thinking == (template == R1)


def test_an_evaluation_tells_thought_and_answer_apart_where_there_are_thoughts(checker):
    tokenizer, example = thinker(QWEN3), Example("2+3?", "", "5")
    thinks, plain = completion(tokenizer, "<think>\nhm\n</think>\n\n\\boxed{5}"), completion(tokenizer, "\\boxed{5}")
    records = [grade(n, 0, example, sample, checker) for n, sample in enumerate((thinks, plain))]
    summary = summarise(records, EvalConfig(), checker)
    assert summary["accuracy"] == 1 and summary["thinking"] == 0.5
    assert summary["mean_thought_tokens"] == thinks.thought / 2 > 0
    assert summary["mean_thought_tokens"] + summary["mean_answer_tokens"] == summary["mean_tokens"]
    assert "thought_tokens" not in records[1] and "thinking" not in summarise(records[1:], EvalConfig(), checker)


def test_rollouts_tell_them_apart_and_brevity_can_count_the_thought_alone():
    short, long = (Sample([1] * n, [-1.0] * n, True, thought=t, correct=True) for n, t in ((30, 10), (20, 18)))
    wrong = Sample([1] * 9, [-1.0] * 9, True, thought=3)
    scores = {counts: brevity([short, long, wrong], BrevityOptions(name="minmax", counts=counts), 100)
              for counts in ("all", "thought")}
    assert scores == {"all": [-1.0, 1.0, 0.0], "thought": [1.0, -1.0, 0.0]}
    for sample in (short, long):
        sample.thought = 0
    for name in ("ratio", "log", "minmax", "alp", "cosine"):
        assert brevity([short, long], BrevityOptions(name=name, counts="thought"), 100) == [0.0, 0.0]

    class Engine:
        metrics = staticmethod(dict)
    short.thought = 10
    told = rollout_metrics([], [Group(Example("p"), [1], [short, long])], Engine)
    assert (told["rollout/thought_tokens"], told["rollout/answer_tokens"]) == (5, 20)
    short.thought = 0
    assert "rollout/thought_tokens" not in rollout_metrics([], [Group(Example("p"), [1], [short, long])], Engine)
