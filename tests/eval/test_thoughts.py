"""Thought and answer are counted apart, and a box in a thought that was cut is no answer."""
import json

import pytest
from thinking import CHATML, QWEN3, R1, thinker
from tiny import tiny_tokenizer

from minimath.config.schema import EvalConfig, JudgeOptions, PromptOptions, RLAIFConfig
from minimath.data.examples import Example
from minimath.data.sample import Group, Sample
from minimath.eval.evaluate import grade
from minimath.eval.metrics import COMPLETIONS, read_solutions, summarise
from minimath.grading.answer import AnswerChecker
from minimath.judges.base import HeuristicJudge, Solution
from minimath.judges.judge import judge_groups
from minimath.judges.lessons import Solved
from minimath.judges.pairs import rollout_pairs
from minimath.models.policy import Policy
from minimath.report.page import marked_lines
from minimath.rollout.ends import BoxWatch
from minimath.train.brevity import BrevityOptions, brevity
from minimath.train.refresh import record_of
from minimath.train.rewards import JudgeReward
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


# ---- who looks at steps, boxes and solutions looks behind the thought

THOUGHT, ANSWER = "2 + 3 = 6? \\boxed{6} no, 2 + 3 = 5\n</think>", "\n\n2 + 3 = 5 \\boxed{5}"


@pytest.mark.parametrize("template, begins", [(QWEN3, "<think>\n"), (R1, "")])
def test_steps_are_counted_behind_the_thought_and_records_tell_judges_no_thought(template, begins, checker, tmp_path):
    tokenizer, example = thinker(template), Example("2+3?", "", "5")
    whole = completion(tokenizer, begins + THOUGHT + ANSWER)
    endless = completion(tokenizer, begins + THOUGHT.removesuffix("</think>"))
    assert (whole.solution, whole.steps) == (ANSWER, (1, 1)) and (endless.solution, endless.steps) == ("", (0, 0))
    plain = completion(tokenizer, "2 + 3 = 5", thinking="off" if template == QWEN3 else "auto")
    assert plain.solution == ("2 + 3 = 5" if template == QWEN3 else "")
    records = [grade(n, 0, example, sample, checker) for n, sample in enumerate((whole, endless))]
    assert [(r["correct_steps"], r["steps"]) for r in records] == [(1, 1), (0, 0)]
    (tmp_path / COMPLETIONS).write_text("".join(json.dumps(r) + "\n" for r in records))
    assert [r["text"] for r in read_solutions(tmp_path)] == [ANSWER, ""] and record_of(whole)["text"] == ANSWER
    marks = [[sound for line, sound in marked_lines(r) if "=" in line] for r in records]
    assert marks == [[None, True], [None]]


def test_a_tag_that_comes_again_hides_no_step():
    sample = completion(thinker(QWEN3), "<think>\nhm\n</think>\n2 + 3 = 6\n<think>\n</think>\n\\boxed{6}")
    assert sample.steps == (0, 1) and "2 + 3 = 6" in sample.solution


@pytest.mark.parametrize("template, begins", [(QWEN3, "<think>\n"), (R1, ""), (CHATML, None)])
def test_a_box_in_a_thought_stops_no_completion(template, begins):
    tokenizer = thinker(template)
    watch, asked = BoxWatch(tokenizer), tokenizer.apply_chat_template(
        [{"role": "user", "content": "2+3?"}], tokenize=False, add_generation_prompt=True)
    prompt, text = tokenizer(asked)["input_ids"], (begins or "") + THOUGHT + ANSWER

    def closed(text, prompt=prompt):
        return watch.closed(tokenizer(text, add_special_tokens=False)["input_ids"], prompt)
    assert closed(text) and closed(text.partition("</think>")[0]) == (begins is None)
    assert not closed(text.removesuffix("}")) and closed("so \\boxed{5}") == (template != R1)
    forced = tokenizer(asked + text.partition("</think>")[0] + "</think>")["input_ids"]  # as thinking_budget= does
    assert closed("so \\boxed{5}", forced)


def test_judges_read_no_thought():
    """Nor of the data. Of two that differ in their thoughts alone no question is asked."""
    tokenizer, asked = thinker(QWEN3), []

    class Asked(HeuristicJudge):
        def compare(self, pairs):
            asked.extend(pairs)
            return super().compare(pairs)
    texts = ["<think>\na\n</think>" + ANSWER, "<think>\nlonger b\n</think>" + ANSWER, "<think>\nc\n</think>\\boxed{5}"]
    group = Group(Example("2+3?", "", "5"), [1], [completion(tokenizer, text) for text in texts])
    for sample in group.samples:
        sample.correct = True
    judge_groups(Asked(JudgeOptions()), [group])
    assert len(asked) == 2 and {s.text for pair in asked for s in (pair.first, pair.second)} == {ANSWER, "\\boxed{5}"}
    assert Solution.of(group.samples[0]).tokens == group.samples[0].tokens
    assert Solved(Example("2+3?", texts[0], "5"), []).worked() == ANSWER
    group.samples[2].correct = False
    [pair] = rollout_pairs([group])
    assert (pair.first.text, pair.second.text) == (ANSWER, "\\boxed{5}")
    in_thought = completion(tokenizer, "<think>\n\\boxed{5}\n</think>\n5")
    group.samples.append(in_thought)
    JudgeReward(RLAIFConfig(max_new_tokens=100)).rewards(group)
    assert [sample.parts["format"] for sample in group.samples] == [1, 1, 1, 0]
