"""Reading verdicts: log-probs, json and text."""
import math

import pytest

from minimath.judges import verdict
from minimath.judges.verdict import Reply, read_reply, soft_vote, text_vote, vote


@pytest.mark.parametrize("top, chance", [
    ([("A", 0.5), ("B", 0.5)], 0.5), ([(" A", 0.3), ("**B", 0.1), ("A", 0.1)], 0.8), ([("\u0120B", 0.7)], 0.0),
    ([("T", 0.6), ("A", 0.2)], 0.625), ([("TI", 0.1), ("Tie", 0.1)], 0.5), ([("a", 0.9), ("b", 0.05)], None),
    ([("The", 0.9), ("A", 0.05), ("B", 0.04)], None), ([("A", 0.06), ("B", 0.06)], 0.5), ([], None)])
def test_soft_vote_is_the_share_of_a_in_the_closed_set(top, chance):
    logged = tuple((token, math.log(p)) for token, p in top)
    assert soft_vote(logged) == (None if chance is None else pytest.approx(chance))


def test_votes_fall_back_to_the_text_and_skip_marks_and_thoughts():
    first = {"token": "**", "top_logprobs": [{"token": "**", "logprob": 0.0}]}
    second = {"token": "B", "top_logprobs": [{"token": "B", "logprob": -0.1}, {"token": "A", "logprob": -3.0}]}
    choice = {"message": {"content": "**B**"}, "logprobs": {"content": [first, second]}}
    assert read_reply(choice).top == [["B", -0.1], ["A", -3.0]]
    assert vote(Reply("A", top=[["The", -0.01], ["A", -9.0]])) == 1.0
    assert vote(read_reply({"message": {"content": "<think>B is\nwrong</think>\n\nA"}})) == 1.0
    for odd in (None, 3, [], {"content": 3}, {"content": ["A"]}, {"content": [{"token": None}]}, {"tokens": ["A"]},
                {"content": [{"token": "A", "top_logprobs": [{"token": "A", "logprob": "x"}]}]}):
        assert read_reply({"message": {"content": "A"}, "logprobs": odd}) == Reply("A")


@pytest.mark.parametrize("reply, chance", [
    ("A", 1.0), (" b.\n", 0.0), ("TIE", 0.5), ("**A**", 1.0), ("[[B]]", 0.0), ("Verdict: TIE.", 0.5),
    ("Answer: A", 1.0), ("", None), ("A or B", None), ("A is better", None), ("AB", None), ("C", None),
    ("Thought process:", None), (":", None), ("A" * 100, None),
    ("**Final answer:** B", 0.0), ("### Verdict\n\n**A**", 1.0), ("The better solution is: TIE", 0.5),
    ("\\boxed{B}", 0.0), ("<answer>A</answer>", 1.0), ("The first solution is A bit better", None),
    ('{ "verdict":\n"TIE"}', 0.5), ('{"verdict": "C"}', None), ('{"verdict": "A", "sure": 1}', None),
    ('{"a": "A"}', None), ("0", None), ("<html>A</html>", None), ("1", None)])
def test_verdicts_outside_the_closed_set_are_no_vote(reply, chance):
    assert text_vote(reply) == chance


@pytest.mark.parametrize("text, said", [
    ("<think>A</think>B", "B"), ("thoughts</think>\nB", "B"), ("[THINK]A[/THINK]B", "B"),
    ("<thinking>A</thinking> B", "B"),
    ("\u25c1think\u25b7A\u25c1/think\u25b7B", "B"), ("a</think>b</think>B", "B"), ("<think>never ends", ""),
    ("<|channel|>analysis<|message|>A<|end|><|start|>assistant<|channel|>final<|message|>B", "B")])
def test_thoughts_are_not_the_verdict(text, said):
    assert read_reply({"message": {"content": text}}).text == said


def test_log_probs_of_thoughts_are_not_the_vote():
    def position(token, likeliest):
        return {"token": token, "top_logprobs": [{"token": likeliest, "logprob": -0.1}]}
    thought, mark = [position("A", "A"), position(" look", "B")], [position("</", "x"), position("think>\n\n", "x")]
    listed = {"content": [*thought, *mark, position("\n", "x"), position("B", "B")]}
    for message in ({"content": "A look</think>\n\nB"}, {"content": "B", "reasoning_content": "A look"}):
        assert vote(read_reply({"message": message, "logprobs": listed})) == 0.0
    listed = {"content": thought}  # of a server that cuts the mark out
    assert read_reply({"message": {"content": "B", "reasoning": "A look"}, "logprobs": listed}) == Reply("B")


def test_a_long_thought_with_log_probs_is_not_searched_again_for_every_token(monkeypatch):
    searched = []

    class Counted:
        def __init__(self, pattern):
            self.pattern = pattern

        def search(self, text):
            searched.append(len(text))
            return self.pattern.search(text)

        def finditer(self, text):
            return self.pattern.finditer(text)

    monkeypatch.setattr(verdict, "THOUGHT_END", Counted(verdict.THOUGHT_END))
    tokens = [" word"] * 1000 + ["</thi", "nk>", *["\n"] * 300, "B", " word"]
    listed = {"content": [{"token": token, "top_logprobs": [{"token": token, "logprob": -0.1}]} for token in tokens]}
    reply = read_reply({"message": {"content": "".join(tokens)}, "logprobs": listed})
    assert reply.top == [["B", -0.1]] and sum(searched) < 200 * len(tokens)
