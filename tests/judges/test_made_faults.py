"""Made faults: each copy has the fault that its kind names, and no other."""
import hashlib
import json
import random
import re
import time

import pytest

from minimath.data.problems import make_problems
from minimath.grading.answer import extract_answer
from minimath.grading.steps import check_steps, equations
from minimath.judges.faults import FAULTS, MAX_CHARS, make_fault, make_faults, same
from minimath.judges.pairs import faulty_solutions

GSM8K = [
    ("Natalia sold clips to 48 friends in April, and half as many in May. How many altogether?",
     "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\nNatalia sold 48+24 = <<48+24=72>>72 clips altogether.\n#### 72",
     "72"),
    ("Weng earns $12 an hour. Yesterday, she did 50 minutes. How much did she earn?",
     "Weng earns 12/60 = $0.2 per minute.\nWorking 50 minutes, she earned 0.2 x 50 = $10.", "10"),
    ("A shop sells 1,200 pens at $3 and a desk at $400. How much is that?",
     "The pens bring 1,200 * 3 = $3,600. Together that is 3,600 + 400 = $4,000.\n#### 4,000", "4000"),
    ("8 pens and twice as many, less a quarter.",
     "We have $8 \\times 2 = 16$ more. Then \\(16 + 8 = 24\\), and $24 \\div 4 = 6$, so $24 - 6 = 18$. \\boxed{18}",
     "18"),
    ("A tank of 80 liters loses a quarter; the rest fills 8 cans.",
     "80 * 25% = 20. 80 - 20 = 60. Then 60 / 8 = 7.5. \\boxed{7.5}", "7.5")]
PROSE = ("Prove that the square of an even number is even.",
         "Let n be an even number. Then n is twice a whole number k. The square of n is four times the square of k. "
         "That is twice a whole number. Hence the square of an even number is even.", "")


@pytest.fixture(scope="module")
def made():
    rows = [*GSM8K, *((e.problem, e.solution, e.answer) for e in make_problems(80, seed=4))]
    return [(problem, text, make_faults(problem, text, answer, random.Random(seed)))
            for seed in range(3) for problem, text, answer in rows]


def of(made, *kinds):
    found = [(problem, text, copy) for problem, text, copies in made for copy in copies if copy.kind in kinds]
    assert len(found) >= 150 * len(kinds)
    return found


def test_wrong_and_operation_end_with_another_answer(made):
    for _, text, copy in of(made, "wrong", "operation"):
        right, total = check_steps(copy.text)
        assert not same(extract_answer(text), extract_answer(copy.text)), copy
        assert total - right == (copy.kind == "wrong"), copy


def test_unsound_has_one_step_that_fails_and_the_right_answer(made):
    for _, text, copy in of(made, "unsound"):
        right, total = check_steps(copy.text)
        assert total - right == 1 and same(extract_answer(text), extract_answer(copy.text)), copy


def test_needless_repeated_and_padding_keep_every_step_and_the_answer(made):
    for _, text, copy in of(made, "needless", "repeated", "padding"):
        right, total = check_steps(copy.text)
        assert right == total >= check_steps(text).total and same(extract_answer(text), extract_answer(copy.text))
        assert copy.first_wrong is None and len(copy.text) > (1.5 if copy.kind == "padding" else 1) * len(text)
        at = 0      # every word of the right text is still there, in its order
        for word in text.split():
            at = copy.text.index(word, at) + len(word)


def test_missing_and_circular_compute_rightly(made):
    for _, text, copy in of(made, "missing", "circular"):
        right, total = check_steps(copy.text)
        assert right == total, copy
        assert copy.kind == "circular" or total < check_steps(text).total
        if copy.kind == "circular":
            assert same(extract_answer(text), extract_answer(copy.text))
            assert extract_answer(text) in copy.text[copy.first_wrong:copy.first_wrong + 50]


def test_first_wrong_is_where_the_texts_part(made):
    for _, text, copy in of(made, "wrong", "operation", "unsound", "missing", "circular"):
        at = copy.first_wrong
        assert copy.text[:at] == text[:at] and 0 <= at < len(copy.text) and copy.text != text
        if copy.kind in ("wrong", "unsound"):
            assert re.match(r"[\d.,]+", copy.text[at:])[0] != re.match(r"[\d.,]+", text[at:])[0]


def test_a_result_is_carried_on_in_words_and_not_into_the_numbers_of_the_problem():
    problem = "Kate has 18 glasses, buys 3 and then doubles them. She gives 2 away."
    text = ("Step 1: We add 3 to 18: 18 + 3 = 21. This means Kate has 21 glasses. "
            "Step 2: We double 21: 21 * 2 = 42. She gives 2 away: 42 - 2 = 40. We can check this: 40 + 2 = 42. That "
            "matches. \\boxed{40}")
    seen = set()
    for seed in range(40):
        copy = make_fault("wrong", problem, text, random.Random(seed))
        a, b = (int(word) for word in re.findall(r"= (\d+)", copy.text)[:2])
        c = re.search(r"boxed{(\d+)}", copy.text)[1]
        seen.add(a)
        right = text[:text.index(" We can check")] + " \\boxed{40}"      # what checks a wrong result goes
        now = {"21": str(a), "42": str(b), "40": c}
        assert copy.text == re.sub("21|42|40", lambda match, now=now: now[match[0]], right)
    assert len(seen) > 5
    twice = [make_fault("unsound", problem, text, random.Random(seed)).text for seed in range(40)]
    assert any("18 + 3 = 22. This means Kate has 22 glasses. Step 2: We double 21: 21 * 2" in copy for copy in twice)
    left_out = {make_fault("missing", problem, text, random.Random(seed)).text for seed in range(20)}
    assert any(copy.startswith("Step 1: We double 18: 18 * 2 = 36.") for copy in left_out)     # and counts on


def test_a_result_that_is_a_number_of_the_problem_too_is_left_alone():
    problem, text = "Tom has 5 cards and finds 2 red and 3 blue ones.", "2 + 3 = 5. Then 5 + 5 = 10. \\boxed{10}"
    for kind in ("wrong", "operation"):
        copies = [make_fault(kind, problem, text, random.Random(seed)).text for seed in range(20)]
        assert all(copy.startswith("2 + 3 = 5. Then 5 ") for copy in copies)


def test_a_copy_in_which_more_fails_than_its_fault_is_not_made():
    text = "So 2 * 3 + 4 = 6 + 4 = 10. \\boxed{10}"      # with 6 - 4 = 2 the first half of the chain fails
    assert all(make_fault("operation", "", text, random.Random(seed)) is None for seed in range(20))


def test_annotations_and_words_follow_another_operation():
    problem, text, _ = GSM8K[0]
    copies = {make_fault("operation", problem, text, random.Random(seed)).text for seed in range(40)}
    assert any("48-2 = <<48-2=46>>46 clips in May.\nNatalia sold 48+46 = <<48+46=94>>94" in copy for copy in copies)
    text = "We add 3 to 18: 18 + 3 = 21. \\boxed{21}"
    copies = {make_fault("operation", "", text, random.Random(seed)).text for seed in range(9)}
    assert "We subtract 3 from 18: 18 - 3 = 15. \\boxed{15}" in copies


def test_prose_gets_faults_too():
    copies = {copy.kind: copy for copy in make_faults(*PROSE, random.Random(4))}
    assert copies.keys() == FAULTS.keys() - {"operation"}
    assert re.search(r"odd number is even\.|even number is (odd|not even)\.|is not even", copies["wrong"].text[-45:])
    assert copies["unsound"].text.endswith("Hence the square of an even number is even.")
    assert len(copies["missing"].text) < len(PROSE[1])


def test_a_text_with_faults_of_its_own_gets_none():
    assert not make_faults("", "1 + 1 = 3. \\boxed{3}", "3", random.Random(0))
    assert not make_faults("", "1 + 1 = 2. \\boxed{2}", "3", random.Random(0))
    assert make_faults("", "1 + 1 = 2. \\boxed{2}", "2.0", random.Random(0))


def test_copies_depend_on_the_arguments_alone():
    first, again = ([make_faults(*GSM8K[0], random.Random(3)) for _ in range(2)])
    assert first == again != make_faults(*GSM8K[0], random.Random(4))
    kinds = ["padding", "wrong"]
    assert [copy.kind for copy in make_faults(*GSM8K[0], random.Random(3), kinds)] == kinds


def test_pairs_are_those_of_the_recorded_figures():
    texts = [[example.problem, texts] for example, texts in faulty_solutions(100, seed=11)]
    assert hashlib.sha256(json.dumps(texts).encode()).hexdigest().startswith("79afd778e8b19b69")


def test_equations_have_the_offsets_of_the_text():
    text = "\u00bd of it: 3 \\times 4 = 12, $\\frac{6}{3} = 2$ and \\text{so} 1{,}000 + 5 = 1,005\u00b0 "
    text += "or 7 \u00d7 2 = 15"
    found = equations(text)
    assert [[text[t.start:t.end] for side in e[:2] for t in side if t.kind in ("num", "op")] for e in found] == [
        ["3", "\\times", "4", "12"], ["6", "\\frac{6}{3}", "3", "2"], ["1{,}000", "+", "5", "1,005"],
        ["7", "\u00d7", "2", "15"]]
    assert [e.holds for e in found] == [True, True, True, False]
    assert (sum(e.holds for e in found), len(found)) == check_steps(text)


@pytest.mark.parametrize("unit", ["1 = 1 + 0 = ", "<<1+1=2>>2 ", "!\n", "\\frac{", "is ", "\u00bd", "9", "("])
def test_hostile_text_is_not_slow(unit):
    text, start = (unit * MAX_CHARS)[:MAX_CHARS // 2] + " 2", time.process_time()
    make_faults("Tom has 3 and 4.", text, "2", random.Random(0))
    make_faults("Tom has 3 and 4.", text * 100, "2", random.Random(0))
    assert time.process_time() - start < 5
