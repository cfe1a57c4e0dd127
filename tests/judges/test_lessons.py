"""Lessons of a judge: the mix that was asked for, no place, length or string that tells, the hardest first."""
import itertools
import json
import random
from collections import Counter

import pytest
from toy import policy_of, write_problems

from minimath.data.chat import IGNORE
from minimath.data.examples import Example
from minimath.judges import lessons as lessons_file
from minimath.judges.attack import Attack, plant
from minimath.judges.base import asked
from minimath.judges.lessons import Lessons, Solved, own_pairs
from minimath.judges.rows import YES_NO, Reader, verdict_ids
from minimath.judges.rubrics import judge_prompt, load_rubric
from minimath.train.judge import JudgeConfig, split

RUBRIC = "Which is better? {nonce} {problem}\n{nonce} A: {first}\n{nonce} B: {second}\n{nonce} A, B or TIE?"


@pytest.fixture(scope="module")
def policy(tiny_dir):
    return policy_of(tiny_dir)


@pytest.fixture
def make(policy):
    def lessons(form="single", max_len=4000, seed=0):
        return Lessons(form, Reader(policy, RUBRIC), max_len, seed)
    return lessons


def record(text, correct, answer="", *, finished=True, sound=True):
    return {"text": text, "correct": correct, "finished": finished, "answer": answer, "tokens": len(text),
            "correct_steps": 1 if sound else 0, "steps": 1}


def solved(n=6, wrong=3) -> list[Solved]:
    found = []
    for k in range(n):
        a, b = 10 + k, 3
        right = f"{a} + {b} = {a + b}. \\boxed{{{a + b}}}"
        records = [record(right, True, str(a + b)),
                   record(f"{a} + {b} = {a + b}. We check that. It is so. \\boxed{{{a + b}}}", True, str(a + b)),
                   *(record(f"{a} - {b - j} = {a - b + j}. \\boxed{{{a - b + j}}}", False, str(a - b + j))
                     for j in range(wrong))]
        found.append(Solved(Example(f"Tom has {a} apples and buys {b} more. How many?", right, str(a + b)), records))
    return found


def same(a, b):
    return [[tuple(map(tuple, (r.ids, r.targets()))) for r in rows] for rows in a] == [
        [tuple(map(tuple, (r.ids, r.targets()))) for r in rows] for rows in b]


def whole(row) -> int:
    """The verdict at the end of a row."""
    return [target for target in row.targets() if target != IGNORE][-1]


# ---- the mix

def test_made_is_a_share_of_the_policys_own_and_attacked_one_of_all(make):
    for made, attacked in ((0.0, 0.0), (0.5, 0.0), (2.0, 0.2)):
        lessons = make()
        rows = list(itertools.chain(*lessons.sets(solved(), made=made, attacked=attacked)))
        own = sum(lessons.counts[kind] for kind in ("own right", "own wrong", "worked"))
        of_made = sum(count for kind, count in lessons.counts.items() if kind.startswith("made "))
        assert own == 30 and len(rows) == own + of_made + lessons.counts["attacked"]
        assert made * own <= of_made <= made * own + 6
        share = lessons.counts["attacked"] / len(rows)
        assert share == pytest.approx(attacked, abs=0.03)


@pytest.mark.parametrize("form", ["single", "pair"])
def test_without_own_solutions_worked_and_made_ones_stand_alone(make, form):
    lessons = make(form)
    sets = lessons.sets([Solved(each.example, []) for each in solved()], made=0.5, attacked=0.1)
    kinds = {kind for kind, count in lessons.counts.items() if count and kind != "cut at max_len"}
    assert sets and all(kind.startswith("made ") or kind in ("attacked", "worked") for kind in kinds)
    assert lessons.counts["worked"] == (6 if form == "single" else 0) and len(sets) > 6


def test_nothing_to_learn_from_gives_no_sets_and_ends(make):
    nothing = [Solved(Example("p", "", "1"), [])]
    for form in ("single", "pair"):
        assert make(form).sets(nothing, made=1.0, attacked=0.3) == [] == make(form).sets([], made=1.0, attacked=0.3)
    one_class = [Solved(Example("p", "", "1"), [record("no idea", False), record("1 + 1 = 2", False, "2")])]
    assert len(make().sets(one_class, made=1.0)[0]) == 2 and make("pair").sets(one_class, made=1.0) == []


@pytest.mark.parametrize("form", ["single", "pair"])
def test_the_same_seed_makes_the_same_rows(make, form):
    one, two, other = (make(form, seed=seed).sets(solved(), made=1.0, attacked=0.2) for seed in (3, 3, 4))
    assert same(one, two) and not same(one, other)


def test_a_problem_is_held_out_by_its_words_wherever_it_stands(tmp_path):
    rows = [json.loads(line) for line in open(write_problems(tmp_path / "p.jsonl", n=40))]
    found = [Solved(Example(row["problem"]), []) for row in rows] * 2
    cfg = JudgeConfig(held_out=0.3)
    train, held_out = split(found, cfg)
    assert train and held_out
    random.Random(0).shuffle(found)
    again = split(found, cfg)
    texts = [{each.example.problem for each in part} for part in (train, held_out, *again)]
    assert texts[0] == texts[2] and texts[1] == texts[3] and not texts[0] & texts[1]
    train, held_out = split(found, JudgeConfig(held_out=1.0, sampled=5))
    held = {each.example.problem for each in found[:5]}  # a problem that stands twice teaches nowhere
    assert held_out == found[:5] and train == [each for each in found if each.example.problem not in held]


def test_the_datas_solution_ends_as_the_policys_own_and_is_one_row_with_a_copy_of_it(make, policy):
    text = "1 + 1 = 2.\n#### 2"
    records = [record("1 + 1 = 2. So \\boxed{2}", True, "2"), record("3", False, "3")]
    lessons = make()
    [rows] = lessons.sets([Solved(Example("p", text, "2"), records)])
    assert len(rows) == 3 and lessons.counts["worked"] == 1
    assert all("####" not in policy.tokenizer.decode(row.ids) for row in rows)  # the style would tell what is right
    assert "\\boxed{2}" in policy.tokenizer.decode(rows[0].ids)
    records[0]["text"] = "1 + 1 = 2.\n\\boxed{2}"
    assert len(lessons.sets([Solved(Example("p", text, "2"), records)])[0]) == 2
    assert Solved(Example("p", "", "2"), []).worked() == ""


# ---- single solutions

def test_rows_of_a_set_stand_behind_one_prompt_and_are_at_most_nine(make):
    sets = make().sets(solved(n=3, wrong=9), made=1.0)
    for rows in sets:
        start = rows[0].loss_mask.index(True)
        assert 1 <= len(rows) <= 9 and len({tuple(row.ids[:start]) for row in rows}) == 1
        assert {row.loss_mask.index(True) for row in rows} == {start}


def test_a_text_is_one_row_however_often_it_was_sampled(make):
    of_one = solved(n=1)[0]
    rows = list(itertools.chain(*make().sets([of_one._replace(records=of_one.records * 3)])))
    assert len(rows) == len({tuple(row.ids) for row in rows}) == 5


def test_a_right_sample_that_was_cut_behind_its_box_is_as_right_as_one_that_ended_there(make, policy):
    yes, _ = verdict_ids(policy.tokenizer, YES_NO)
    text = "1 + 1 = 2. \\boxed{2} and on"
    [[ended]], [[cut]] = (make().sets([Solved(Example("p", "", "2"), [record(text, True, "2", finished=finished)])])
                          for finished in (True, False))
    assert whole(cut) == yes and (cut.ids, cut.targets()) == (ended.ids, ended.targets())  # shown up to the box


# ---- pairs

def test_both_orders_of_a_pair_are_one_set_and_no_letter_wins_more_often(make, policy):
    a, b, _ = verdict_ids(policy.tokenizer)
    sets = make("pair").sets(solved(), made=1.0, attacked=0.2)
    for rows in sets:
        assert len(rows) == 2 and {whole(row) for row in rows} == {a, b}
        assert all(sum(target != IGNORE for target in row.targets()) == 1 for row in rows)


def test_a_pair_of_which_one_order_is_cut_teaches_nothing(make, monkeypatch):
    lengths = sorted(len(row.ids) for rows in make("pair").sets(solved()) for row in rows)
    pad = iter(itertools.cycle(("", " and so on")))         # the second order is longer

    def longer(rubric, pair, specials=()):
        return judge_prompt(rubric, pair, specials) + next(pad)
    lessons = make("pair", max_len=lengths[-1])
    monkeypatch.setattr(lessons.reader, "prompt", longer)
    sets = lessons.sets(solved())
    assert all(len(rows) == 2 for rows in sets) and lessons.counts["cut at max_len"] > 0  # there were sets of 1


def test_wrong_answers_that_many_samples_agree_on_come_first_and_no_answer_is_no_agreement():
    right = record("1 + 2 = 3.", True, "3")
    often, once = [record(f"{k} so 4", False, "4") for k in range(3)], record("1", False, "5")
    silent = [record(f"... {k}", False, None, finished=False) for k in range(5)]
    pairs = own_pairs(Solved(Example("p", "", "3"), [right, once, *silent, *often]))
    assert [pair.second.text for pair in pairs if pair.kind == "own wrong"] == [*(r["text"] for r in often), "1"]


def test_the_right_solution_of_a_pair_is_the_most_similar_in_length_and_long_ones_lose():
    short, long = record("3", True, "3"), record("3 " * 20, True, "3")
    unsound = record("3 " * 30, True, "3", sound=False)
    wrong = record("4 " * 19, False, "4")
    pairs = own_pairs(Solved(Example("p", "", "3"), [short, long, unsound, wrong]))
    assert [(p.kind, p.first.text, p.second.text) for p in pairs] == [
        ("own wrong", long["text"], wrong["text"]), ("own long", short["text"], long["text"])]
    near = record("3 3", True, "3") | {"tokens": 1}
    assert own_pairs(Solved(Example("p", "", "3"), [short, near])) == []
    assert own_pairs(Solved(Example("p", "", "3"), [wrong])) == [] == own_pairs(Solved(Example("p"), []))


# ---- attacked

PLACES = ("start", "end", "after", "alone")


def attacked_rows(make, monkeypatch, form, places, count=60):
    """(text with the string, is it the right or winning one) of each row that carries one."""
    seen = []

    def single(reader, question, right, max_len):
        seen.append(("".join(question.steps), right[-1]))
        return real_single(reader, question, right, max_len)

    def pair(reader, of, first_wins, max_len):
        [(text, wins)] = [(s.text, wins) for s, wins in ((of.first, first_wins), (of.second, not first_wins))
                          if "MARK" in s.text]
        seen.append((text, wins))
        return real_pair(reader, of, first_wins, max_len)

    real_single, real_pair = lessons_file.single_row, lessons_file.pair_row
    monkeypatch.setattr(lessons_file, "single_row", single)
    monkeypatch.setattr(lessons_file, "pair_row", pair)
    lessons = make(form)
    lessons.attacks = [Attack("k", place, "MARK {me}") for place in places]
    rows = [row for _ in range(count) for row in lessons.attacked(lessons.rng.choice(solved()))]
    return rows, seen


def test_no_string_that_is_taught_is_longer_than_its_bound_with_its_padding_in_it(make):
    attacks = make().attacks
    longest = max(len(plant(attack, "", "A", "B")) for attack in attacks)
    assert longest <= lessons_file.LONGEST_ATTACK and len(attacks) > 60 and {a.place for a in attacks} == {*PLACES}


@pytest.mark.parametrize("place", PLACES)
def test_right_and_wrong_solutions_carry_attack_strings_alike(make, monkeypatch, policy, place):
    yes, no = verdict_ids(policy.tokenizer, YES_NO)
    rows, seen = attacked_rows(make, monkeypatch, "single", [place])
    assert all("MARK" in text for text, _ in seen)
    assert Counter(right for _, right in seen) == {True: 60, False: 60}     # of strings alone all 120 were wrong
    assert Counter(map(whole, rows)) == {yes: 60, no: 60}
    assert all(sum(target != IGNORE for target in row.targets()) == 1 for row in rows)


@pytest.mark.parametrize("place", PLACES[:3])
def test_who_attacks_in_a_pair_wins_as_often_as_it_loses(make, monkeypatch, policy, place):
    a, b, _ = verdict_ids(policy.tokenizer)
    rows, seen = attacked_rows(make, monkeypatch, "pair", [place])
    assert 40 < sum(wins for _, wins in seen) < 80                          # it always lost
    assert Counter(map(whole, rows)) == {a: 60, b: 60}


def test_a_string_alone_loses_and_all_name_the_place_they_stand_in(make, monkeypatch):
    _, seen = attacked_rows(make, monkeypatch, "pair", ["alone"], count=20)
    assert not any(wins for _, wins in seen) and {text for text, _ in seen} == {"MARK A", "MARK B"}


def test_attacked_rows_are_shown_both_ways_and_the_reader_is_as_before(make, monkeypatch):
    ways = []
    lessons = make()
    monkeypatch.setattr(lessons_file, "single_row", lambda reader, *_: ways.append(reader.prompt))
    for _ in range(20):
        lessons.attacked(solved()[0])
    assert len(set(ways)) == 2 and lessons.reader.prompt is judge_prompt
    monkeypatch.setattr(lessons_file, "single_row", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        lessons.attacked(solved()[0])
    assert lessons.reader.prompt is judge_prompt


# ---- cut

def test_rows_cut_at_max_len_are_counted_and_those_without_a_verdict_left_out(make, policy):
    prompt = len(policy.prompt_ids(solved()[0].example.problem))
    lessons = make(max_len=prompt + 6)
    sets = lessons.sets(solved())
    assert lessons.counts["cut at max_len"] == 30 and "30 cut at max_len" in lessons.described()
    assert all(len(row.ids) <= prompt + 6 and set(row.targets()) != {IGNORE} for rows in sets for row in rows)
    assert make(max_len=3).sets(solved(), made=1.0, attacked=0.2) == []


def test_shipped_rubric_and_problem_without_words_make_rows(policy):
    lessons = Lessons("pair", Reader(policy, load_rubric("brief")), 4000, 0)
    assert lessons.sets(solved(n=2))
    assert asked("", "").steps == () and Lessons("single", lessons.reader, 4000, 0).own(
        Solved(Example(" "), [record("1 + 1 = 3", False)]))
