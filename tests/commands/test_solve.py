"""minimath solve: what is written appears once and whole, lines get their marks, problems come from words or stdin."""

import io
import re
import sys

import pytest

from minimath.commands.solve import Shown, parse
from minimath.core.errors import UserError

SMALL = ("device=cpu", "dtype=fp32", "max_new_tokens=40")


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_a_solution_in_pieces_is_shown_whole_with_a_mark_behind_each_checked_line(capsys, size):
    text = "We add: 2 + 3 = 5.\nThen 5 * 2 = 11.\n\nSo \u00e9t\u00e9: \\boxed{11}"
    shown = Shown()
    for end in range(0, len(text), size):
        shown.add(text[:end])
    shown.add(text + "\n")
    assert capsys.readouterr().out == ("We add: 2 + 3 = 5.  [correct]\nThen 5 * 2 = 11.  [WRONG]\n\n"
                                       "So \u00e9t\u00e9: \\boxed{11}\n")


@pytest.mark.parametrize("thinks, before", [(False, "<think>\n"), (True, "")])
def test_lines_of_a_thought_get_no_marks(capsys, thinks, before):
    shown = Shown(thinks)
    shown.add(f"{before}2 + 3 = 6?\n2 + 3 = 5.\n</think>\n2 + 3 = 5.\n")
    assert capsys.readouterr().out == f"{before}2 + 3 = 6?\n2 + 3 = 5.\n</think>\n2 + 3 = 5.  [correct]\n"


def test_half_a_character_waits_and_control_characters_are_not_sent(capsys):
    shown = Shown()
    shown.add("caf\ufffd")
    assert capsys.readouterr().out == "caf"
    shown.add("caf\u00e9\x1b[2J")
    shown.add("caf\u00e9\x1b[2J\n")
    assert capsys.readouterr().out == "\u00e9?[2J\n"


def test_a_problem_with_an_equals_sign_is_a_problem_and_an_option_is_not():
    assert parse(["x=3, y=x+1. What is y?", "seed=1"]) == ("x=3, y=x+1. What is y?", ["seed=1"])
    assert parse(["adapter=runs/x"]) == ("", ["adapter=runs/x"]) and parse([]) == ("", [])
    assert parse(["--max-new-tokens=3"]) == ("", ["--max-new-tokens=3"])
    for problem in ("x=3", "2x=6", "--5+3=", "model the sum of 2 and 3"):
        assert parse([problem]) == (problem, [])
    with pytest.raises(UserError, match="empty"):
        parse([" ", "seed=1"])


@pytest.mark.parametrize("word", ["modle=x", "--modle=x", "eval.seed=x"])
def test_a_misspelt_option_in_front_is_no_problem_to_solve(here, word):
    status, _, error = here("solve", word, "model=missing")
    assert status == 2 and ("did you mean 'model'" in error or "seed must be" in error)


def test_problems_are_read_one_a_line_until_an_empty_one(here, tiny_dir, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Tom has 3 apples.\nAnn has 4 pens.\n\nnever asked\n"))
    status, out, error = here("solve", f"model={tiny_dir}", *SMALL)
    assert status == 0, error
    assert len(re.findall(r"^answer: .* tokens", out, re.M)) == 2


def test_no_problem_at_all_is_said_before_the_model_loads(here, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    status, _, error = here("solve", "model=missing")
    assert status == 2 and "needs a problem" in error


def test_what_is_shown_while_it_is_written_is_the_completion(here, tiny_dir):
    words = ("solve", "Tom has 3 apples and buys 4.", f"model={tiny_dir}", *SMALL, "seed=3")
    _, live, _ = here(*words, "temperature=1.0")
    _, several, _ = here(*words, "temperature=1.0", "samples=2")  # shown at the end; the first has the same stream
    body = lambda out: out.split("\n\n", 1)[1].split("answer:")[0]
    assert body(live) == body(several) and len(body(live)) > 10


def test_a_problem_longer_than_the_limit_is_refused(here, tiny_dir):
    status, _, error = here("solve", "Tom has 3 apples. " * 30, f"model={tiny_dir}", *SMALL, "max_prompt_len=20")
    assert status == 2 and "max_prompt_len=20" in error


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])  # of a UTF-8 locale, and of the C locale
def test_a_problem_in_another_encoding_is_one_line(here, monkeypatch, errors):
    typed = b"Zo\xeb has 3 apples."
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(typed + b"\n"), "utf-8", errors=errors))
    for words in ((), (typed.decode("utf-8", "surrogateescape"),)):
        status, _, error = here("solve", *words, "model=missing")
        assert status == 2 and "not UTF-8" in error


@pytest.mark.parametrize("option", ["data=problems.jsonl", "suite=gsm8k", "budgets=128", "out=runs/x",
                                    "limit=3", "split=train", "resume=true", "deterministic=true"])
def test_an_option_of_eval_that_would_do_nothing_is_refused(here, option):
    status, _, error = here("solve", "1 + 1?", "model=missing", option)
    assert status == 2 and f"{option.partition('=')[0]}= is for minimath eval" in error
