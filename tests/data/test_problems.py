"""The generator's promises: right solutions in every register, disjoint splits, variety, seeds."""
import re
from fractions import Fraction

import pytest

from minimath.core.errors import UserError
from minimath.data.examples import Example
from minimath.data.problems import FORMULAS, STORIES, STYLE_WEIGHTS, canonical, make_problems, split_of

EQUATION = re.compile(r"(\d+) ?([-+*/]) ?(\d+) ?= ?(\d+)")


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    return make_problems(1500, seed=3)


def holds(a: str, op: str, b: str, value: str) -> bool:
    x, y = Fraction(a), Fraction(b)
    return {"+": x + y, "-": x - y, "*": x * y, "/": x / y}[op] == Fraction(value)


def register_and_steps(example: Example) -> tuple[str, int]:
    _, _, _, register, steps = example.id.split("-")
    return register, int(steps)


def test_every_equation_is_right_and_every_step_has_one(examples):
    for e in examples:
        register, steps = register_and_steps(e)
        equations = EQUATION.findall(e.solution)
        assert all(holds(*parts) for parts in equations), e.solution
        extra = len(equations) - steps  # a verbose solution may check its last step with one more equation
        assert extra in ((0, 1) if register == "verbose" else (0,)), e.solution


def test_the_last_step_gives_the_boxed_answer(examples):
    for e in examples:
        _, steps = register_and_steps(e)
        assert EQUATION.findall(e.solution)[steps - 1][3] == e.answer
        assert re.findall(r"\\boxed\{(\d+)\}", e.solution) == [e.answer]
        assert e.solution.rstrip(".").endswith(f"\\boxed{{{e.answer}}}")


def test_numbers_of_the_steps_come_from_the_problem_or_an_earlier_step(examples):
    for e in examples:
        known = set(re.findall(r"\d+", e.problem)) | {"2", "4"}  # legs of animals, two equal sides
        for a, _, b, value in EQUATION.findall(e.solution)[:register_and_steps(e)[1]]:
            assert {a, b} <= known, (e.problem, e.solution)
            known.add(value)


def test_results_stay_between_1_and_199(examples):
    values = [int(v) for e in examples for v in (m[3] for m in EQUATION.findall(e.solution))]
    assert min(values) >= 1 and max(values) <= 199


def test_no_slot_is_left_in_any_text(examples):
    for e in examples:
        assert "{" not in e.problem and "}" not in e.problem
        assert re.sub(r"\\boxed\{\d+\}", "", e.solution).count("{") == 0
        assert e.problem[0].isupper() or e.problem[0].isdigit()


def test_the_same_seed_gives_the_same_problems_and_another_seed_others():
    first = make_problems(50, seed=5)
    assert first == make_problems(50, seed=5)
    assert len({e.problem for e in first} & {e.problem for e in make_problems(50, seed=6)}) < 10


def test_train_and_test_never_overlap_even_with_other_names():
    train, test = make_problems(3000, seed=1), make_problems(600, seed=1, split="test")
    assert not {canonical(e.problem) for e in train} & {canonical(e.problem) for e in test}
    assert all(split_of(e.problem) == "test" for e in test)


def test_a_problem_under_another_name_is_the_same_problem():
    one, other = ("Tom has 3 apples. He eats 2 of them.", "Anna has 3 apples. She eats 2 of them.")
    assert canonical(one) == canonical(other) and split_of(one) == split_of(other)


def test_step_counts_and_registers_follow_the_arguments():
    two = make_problems(200, seed=0, steps=(2,), style_weights={"plain": 1.0})
    assert {register_and_steps(e) for e in two} == {("plain", 2)}
    mixed = make_problems(2000, seed=0)
    share = {r: sum(register_and_steps(e)[0] == r for e in mixed) / 2000 for r in STYLE_WEIGHTS}
    assert share == pytest.approx({"terse": 0.25, "plain": 0.35, "verbose": 0.40}, abs=0.05)


def test_registers_differ_in_length(examples):
    mean = {r: sum(len(e.solution) for e in chosen) / len(chosen) for r in STYLE_WEIGHTS
            if (chosen := [e for e in examples if register_and_steps(e)[0] == r])}
    assert mean["terse"] * 2 < mean["plain"] and mean["plain"] * 1.8 < mean["verbose"]


def test_the_text_varies_too_much_to_be_memorised(examples):
    assert len(STORIES) + len(FORMULAS) >= 20
    shapes = {re.sub(r"\d+", "N", canonical(e.problem)) for e in examples}
    solutions = {re.sub(r"\d+", "N", e.solution) for e in examples}
    assert len(shapes) > 700 and len(solutions) > 800


@pytest.mark.parametrize("bad", [{"n": 200_001}, {"n": 1, "largest": 19}])
def test_more_problems_than_there_are_are_refused(bad):
    with pytest.raises(UserError, match="there are too few problems"):
        make_problems(**bad, seed=0)
