"""Reading verdicts: log-probs, json and text."""
import math

import pytest

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
    ('{ "verdict":\n"TIE"}', 0.5), ('{"verdict": "C"}', None), ('{"verdict": "A", "sure": 1}', None),
    ('{"a": "A"}', None), ("0", None), ("<html>A</html>", None), ("1", None)])
def test_verdicts_outside_the_closed_set_are_no_vote(reply, chance):
    assert text_vote(reply) == chance
