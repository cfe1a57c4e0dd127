"""What a judge's adapter is trained on: the policy's own solutions, made faults beside them, attacked copies.

From the end of a solution alone little is learnt, so its steps are labelled by two sources that cost nothing: the exact
arithmetic of every equation, and what became of other samples of the problem that had computed the same so far, as
Math-Shepherd counts it by rolling on from each prefix (arXiv 2312.08935)."""
import itertools
import math
import random
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

from minimath.data.chat import IGNORE, Encoded, final_text
from minimath.data.examples import Example
from minimath.data.template import behind_thought
from minimath.grading.answer import answer_end
from minimath.grading.steps import equations
from minimath.judges.attack import ATTACKS, bare_prompt, load_attacks, plant
from minimath.judges.base import Asked, Pair, Solution, asked, split_steps
from minimath.judges.faults import FAULTS, make_faults
from minimath.judges.pairs import solution
from minimath.judges.rows import Reader, pair_row, single_row
from minimath.judges.rubrics import judge_prompt

WITHOUT_OWN = 8  # of the policy's own solutions a problem stands for where it has sampled none
PAIRS = 4  # right against wrong, of one problem at most
LONGER = 1.25  # than the shortest right solution: long
MOST, FAULTS_OF_ONE = 9, 3  # rows of a set, made faults in it
SERIOUS = ("wrong", "operation", "unsound", "missing", "circular")  # kinds of faults that make a solution unsound
LONGEST_ATTACK = 400  # characters
LEAST_SEEN = 2  # samples behind the same equations, all of them wrong: then the last of these is


class Solved(NamedTuple):
    """A problem and what the policy made of it; records have text, correct, finished, answer, tokens."""
    example: Example
    records: list[dict]

    def different(self) -> list[dict]:
        """The records, one of each text."""
        return list({r["text"].strip(): r for r in reversed(self.records) if r["text"].strip()}.values())[::-1]

    def right_texts(self) -> list[str]:
        """Right solutions to make faults in: the data's, and the policy's own that are sound."""
        own = [r["text"] for r in self.different() if r["correct"] and r["finished"]
               and r["correct_steps"] == r["steps"]]
        return [text for text in (self.worked(), *own) if text]

    def worked(self) -> str:
        """The data's solution, with its answer as the policy gives it; "" without one."""
        return self.example.solution and behind_thought(final_text(self.example.solution, self.example.answer))


class Lessons:
    """Makes training rows in sets that belong in one batch; counts: rows of each source and kind.

    single: solutions of one problem, right and wrong, at most MOST of them, behind one prompt; pair: both orders of a
    pair."""

    def __init__(self, form: str, reader: Reader, max_len: int, seed: int):
        self.form, self.reader, self.max_len = form, reader, max_len
        self.rng, self.counts = random.Random(f"minimath judge lessons {seed}"), Counter()
        self.attacks = [attack for attack in load_attacks(ATTACKS)
                        if len(plant(attack._replace(place="alone"), "", "A", "B")) < LONGEST_ATTACK]

    def sets(self, solved: list[Solved], *, made: float = 0.0, attacked: float = 0.0) -> list[list[Encoded]]:
        """Make the rows of all problems.

        made: made rows for each own or worked one; attacked: share of the rows that carry an attack string."""
        sets = [each for one in solved for each in self.own(one)]
        sets += self.drawn(self.made, solved, made * (sum(map(len, sets)) or WITHOUT_OWN * len(solved)))
        sets += self.drawn(self.attacked, solved, attacked / (1 - attacked) * sum(map(len, sets)))
        self.counts["cut at max_len"] = sum(row.truncated for rows in sets for row in rows)
        taught = [[row for row in rows if set(row.targets()) != {IGNORE}] for rows in sets]
        return [kept for kept, rows in zip(taught, sets, strict=True)
                if kept and (self.form != "pair" or len(kept) == len(rows))]  # one order alone would teach a place

    def drawn(self, make: Callable[[Solved], list[Encoded]], solved: list[Solved], count: float) -> list[list[Encoded]]:
        """Make sets of problems that are drawn, until they have `count` rows or too many problems give none."""
        sets, tries = [], 4 * count
        while solved and count > 0 and tries > 0:
            new = make(self.rng.choice(solved))
            sets += [new] if new else []
            count, tries = count - len(new), tries - 1
        return sets

    def described(self) -> str:
        return "rows: " + ", ".join(f"{count} {kind}" for kind, count in self.counts.items() if count)

    def single(self, kind: str, question: Asked, right: list[bool | None]) -> Encoded:
        self.counts[kind] += 1
        return single_row(self.reader, question, right, self.max_len)

    def pair(self, kind: str, orders: tuple[Pair, Pair], first_wins: bool = True) -> list[Encoded]:
        self.counts[kind] += 2
        return [pair_row(self.reader, pair, wins, self.max_len)
                for pair, wins in zip(orders, (first_wins, not first_wins))]

    def own(self, solved: Solved) -> list[list[Encoded]]:
        """Make a row of each solution, the data's own first, with the steps that are known labelled; or of pairs."""
        if self.form == "pair":
            return [self.pair(pair.kind, pair.both()) for pair in own_pairs(solved)]
        problem, rows, worked = solved.example.problem, [], solved.worked()
        ends = ends_of(solved)
        if worked and worked.strip() not in (r["text"].strip() for r in solved.records):
            rows.append(self.labelled("worked", problem, worked))
        for record in solved.different():
            question, right = asked(problem, record["text"]), record["correct"]  # one cut behind its box, too
            rows.append(self.single("own right" if right else "own wrong", question,
                                    step_labels(question, right, ends)))
        return [rows[start:start + MOST] for start in range(0, len(rows), MOST)]

    def made(self, solved: Solved) -> list[Encoded]:
        """Make rows of a right text and of faults made in it; of form single each with another right one."""
        texts, problem, answer = solved.right_texts(), solved.example.problem, solved.example.answer
        if not texts:
            return []
        text, kinds = self.rng.choice(texts), self.rng.sample(list(FAULTS), len(FAULTS))
        faults = make_faults(problem, text, answer, self.rng, kinds)
        if self.form == "pair":
            return [row for fault in faults[:1] for row in self.pair(
                f"made {fault.kind}", Pair(problem, solution(text, answer), solution(fault.text, answer)).both())]
        rights = self.rng.sample(texts, min(len(texts), FAULTS_OF_ONE))
        return [self.labelled("made right", problem, each) for each in rights] + [
            self.labelled(f"made {fault.kind}", problem, fault.text, fault.first_wrong)
            for fault in faults[:FAULTS_OF_ONE]]

    def labelled(self, kind: str, problem: str, text: str, first_wrong: int | None = None) -> Encoded:
        question = asked(problem, text)
        return self.single(kind, question, labels_from(question, first_wrong))

    def attacked(self, solved: Solved) -> list[Encoded]:
        """Make rows with an attack string, shown defused or as it is; it changes no label.

        Right and wrong solutions carry strings alike, better and worse ones too: that there is one says nothing. A
        string that stands alone is no solution: a right one has it before it, and of a pair it is the worse one."""
        texts, example = solved.right_texts(), solved.example
        faults = make_faults(example.problem, texts[0], example.answer, self.rng, SERIOUS) if texts else []
        if not faults:
            return []
        attack, right, faulty = self.rng.choice(self.attacks), texts[0], self.rng.choice(faults).text
        alone = attack.place == "alone"
        self.reader.prompt = self.rng.choice([judge_prompt, bare_prompt])
        try:
            if self.form == "pair":  # the better or the worse one attacks, in the place that it names
                worse = alone or self.rng.random() < 0.5
                text, other = (faulty, right) if worse else (right, faulty)
                as_a, as_b, other = (solution(each, example.answer) for each in (
                    plant(attack, text, "A", "B"), plant(attack, text, "B", "A"), other))
                return self.pair("attacked", (Pair(example.problem, as_a, other), Pair(example.problem, other, as_b)),
                                 not worse)
            rows = []
            for string, text, sound in ((attack._replace(place="start") if alone else attack, right, True),
                                        (attack, faulty, False)):
                question = asked(example.problem, plant(string, text, "A", "B"))
                known = [None] * len(question.steps) + [sound]  # which of its steps the string is, nobody says
                rows.append(self.single("attacked", question, known))
            return rows
        finally:
            self.reader.prompt = judge_prompt


def own_pairs(solved: Solved) -> list[Pair]:
    """Pair a policy's own solutions of a problem: right against wrong, short against long.

    Wrong answers on which most samples agree come first: they are the hardest. Of those the right solution of the most
    similar length is taken, else length would tell."""
    records, votes = solved.different(), Counter(r["answer"] for r in solved.records)
    right = [r for r in records if r["correct"] and r["finished"]]
    wrong = sorted((r for r in records if not r["correct"]),
                   key=lambda r: (-votes[r["answer"]] if r["answer"] else 0, r["tokens"]))
    found = [("own wrong", min(right, key=lambda r: abs(r["tokens"] - bad["tokens"])), bad)
             for bad in wrong[:PAIRS] if right]
    sound = [r for r in right if r["correct_steps"] == r["steps"]]
    short, long = (pick(sound, key=lambda r: r["tokens"], default=None) for pick in (min, max))
    if sound and long["tokens"] >= LONGER * short["tokens"]:
        found.append(("own long", short, long))
    return [Pair(solved.example.problem, *(Solution(r["text"], r["correct"], r["tokens"]) for r in both), kind=kind)
            for kind, *both in found]


# ---- labels of steps

def computed(step: str) -> list[tuple[str, bool]]:
    """List the equations of a step: as they are written, and whether they hold."""
    return [("=".join("".join(token.text for token in side) for side in equation[:2]), equation.holds)
            for equation in equations(step[:20_000])]


def ends_of(solved: Solved) -> dict[tuple[str, ...], bool]:
    """Tell of equations so far whether any sample ends right behind them, where known.

    How a wrong one that was cut would have ended is not known."""
    right, seen = Counter(), Counter()
    for record in solved.records:
        so_far, steps = (), split_steps(record["text"]) if record["correct"] or record["finished"] else ()
        for equation, _ in (each for step in steps for each in computed(step)):
            so_far += equation,
            seen[so_far] += 1
            right[so_far] += record["correct"]
    return {so_far: right[so_far] > 0 for so_far, count in seen.items() if right[so_far] or count >= LEAST_SEEN}


def step_labels(question: Asked, correct: bool, ends: dict[tuple[str, ...], bool]) -> list[bool | None]:
    """Label each step of a sample, and its whole; None: not known.

    A step is wrong from the first equation on that does not hold. Without one, all steps of a right solution are right;
    those of a wrong one are as `ends_of` tells. What stands behind the answer is not shown, and changes nothing."""
    labels, so_far, sound, left = [], (), True, answer_end("".join(question.steps))
    for step in question.steps:
        step, left = step[:max(0, left)], left - len(step)
        if not step and labels:
            labels.append(labels[-1])
            continue
        found = computed(step)
        so_far += tuple(equation for equation, _ in found)
        sound &= all(holds for _, holds in found)
        known = True if correct else ends.get(so_far)
        if known is not True and labels and labels[-1] is False:  # nothing mends what is wrong
            known = False
        labels.append(known if sound else False)
    return [*labels, correct and sound]


def labels_from(question: Asked, first_wrong: int | None) -> list[bool]:
    """Label each step, and the whole, of a text whose first fault is at an offset; None: it has none."""
    ends = itertools.accumulate(map(len, question.steps))
    return [first_wrong is None or end <= first_wrong for end in (*ends, math.inf)]
