"""What a judge's adapter is trained on: the policy's own solutions, made faults beside them, attacked copies."""
import random
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

from minimath.data.chat import IGNORE, Encoded, final_text
from minimath.data.examples import Example
from minimath.judges.attack import ATTACKS, bare_prompt, load_attacks, plant
from minimath.judges.base import Pair, Solution, asked
from minimath.judges.faults import FAULTS, make_faults
from minimath.judges.labels import Prefixes, labels_from, step_labels
from minimath.judges.pairs import KnownPair, solution
from minimath.judges.poll import in_both_orders
from minimath.judges.rows import Reader, pair_row, single_row
from minimath.judges.rubrics import judge_prompt

WITHOUT_OWN = 8  # of the policy's own solutions a problem stands for where it has sampled none
PAIRS = 4  # right against wrong, of one problem at most
LONGER = 1.25  # than the shortest right solution: long
MOST, FAULTS_OF_ONE = 9, 3  # rows of a set, made faults in it
SERIOUS = ("wrong", "operation", "unsound", "missing", "circular")  # kinds of faults that make a solution unsound
LONGEST_ATTACK = 400  # characters


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
        return self.example.solution and final_text(self.example.solution, self.example.answer)


class Lessons:
    """Makes training rows in sets that belong in one batch; counts: rows of each source and kind.

    single: solutions of one problem, right and wrong, at most MOST of them, behind one prompt; pair: both orders of a
    pair."""

    def __init__(self, form: str, reader: Reader, max_len: int, seed: int):
        self.form, self.reader, self.max_len = form, reader, max_len
        self.rng, self.counts = random.Random(f"minimath judge lessons {seed}"), Counter()
        self.attacks = [attack for attack in load_attacks(ATTACKS) if len(attack.text) < LONGEST_ATTACK]

    def sets(self, solved: list[Solved], *, made: float = 0.0, attacked: float = 0.0) -> list[list[Encoded]]:
        """Make the rows of all problems.

        made: made rows for each own or worked one; attacked: share of the rows that carry an attack string."""
        own = [each for one in solved for each in (self.own_pairs if self.form == "pair" else self.own)(one)]
        sets = own + self.drawn(self.made, solved, made * (sum(map(len, own)) or WITHOUT_OWN * len(solved)))
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

    # ---- the policy's own

    def own(self, solved: Solved) -> list[list[Encoded]]:
        """Make a row of each solution, the data's own first, with the steps that are known labelled."""
        prefixes = Prefixes([(r["text"], r["correct"]) for r in solved.records])
        rows, worked = [], solved.worked()
        if worked and worked.strip() not in (r["text"].strip() for r in solved.records):
            rows.append(self.labelled("worked", solved.example.problem, worked, None))
        for record in solved.different():
            question = asked(solved.example.problem, record["text"])
            right = record["correct"] and record["finished"]
            rows.append(single_row(self.reader, question, step_labels(question, right, prefixes), self.max_len))
            self.counts["own right" if right else "own wrong"] += 1
        return [rows[start:start + MOST] for start in range(0, len(rows), MOST)]

    def own_pairs(self, solved: Solved) -> list[list[Encoded]]:
        """Make both orders of right against wrong, and of short against long."""
        return [self.of_pair(pair) for pair in own_pairs(solved)]

    def of_pair(self, known: KnownPair) -> list[Encoded]:
        self.counts[known.kind] += 2
        return [pair_row(self.reader, pair, pair.first is known.better, self.max_len)
                for pair in in_both_orders([Pair(known.problem, known.better, known.worse)])]

    # ---- made

    def made(self, solved: Solved) -> list[Encoded]:
        """Make rows of a right text and of faults made in it; of form single each with another right one."""
        texts, problem, answer = solved.right_texts(), solved.example.problem, solved.example.answer
        if not texts:
            return []
        text = self.rng.choice(texts)
        kinds = self.rng.sample(list(FAULTS), len(FAULTS))
        faults = make_faults(problem, text, answer, self.rng, kinds)[:1 if self.form == "pair" else FAULTS_OF_ONE]
        if self.form == "pair":
            return self.of_pair(KnownPair(f"made {faults[0].kind}", problem, solution(text, answer),
                                          solution(faults[0].text, answer))) if faults else []
        rights = self.rng.sample(texts, min(len(texts), FAULTS_OF_ONE))
        return [self.labelled("made right", problem, each, None) for each in rights] + [
            self.labelled(f"made {fault.kind}", problem, fault.text, fault.first_wrong) for fault in faults]

    def labelled(self, kind: str, problem: str, text: str, first_wrong: int | None) -> Encoded:
        self.counts[kind] += 1
        question = asked(problem, text)
        return single_row(self.reader, question, labels_from(question, first_wrong), self.max_len)

    # ---- attacked

    def attacked(self, solved: Solved) -> list[Encoded]:
        """Make rows with an attack string, shown defused or as it is; it changes no label.

        Right and wrong solutions carry strings alike, better and worse ones too: that there is one says nothing. A
        string that stands alone is no solution: a right one has it before it, and of a pair it is the worse one."""
        texts, example = solved.right_texts(), solved.example
        faults = make_faults(example.problem, texts[0], example.answer, self.rng, SERIOUS) if texts else []
        if not faults:
            return []
        attack, fault = self.rng.choice(self.attacks), self.rng.choice(faults)
        alone = attack.place == "alone"
        self.counts["attacked"] += 2
        self.reader.prompt = self.rng.choice([judge_prompt, bare_prompt])
        try:
            if self.form == "pair":  # the better or the worse one attacks, in the place that it names
                worse = alone or self.rng.random() < 0.5
                text, other = (fault.text, texts[0]) if worse else (texts[0], fault.text)
                as_a, as_b = (solution(plant(attack, text, *letters), example.answer) for letters in ("AB", "BA"))
                other = solution(other, example.answer)
                return [pair_row(self.reader, Pair(example.problem, as_a, other), not worse, self.max_len),
                        pair_row(self.reader, Pair(example.problem, other, as_b), worse, self.max_len)]
            rows, of_right = [], attack._replace(place="start") if alone else attack
            for string, text, right in ((of_right, texts[0], True), (attack, fault.text, False)):
                question = asked(example.problem, plant(string, text, "A", "B"))
                known = [None] * len(question.steps) + [right]  # which of its steps the string is, nobody says
                rows.append(single_row(self.reader, question, known, self.max_len))
            return rows
        finally:
            self.reader.prompt = judge_prompt


def own_pairs(solved: Solved) -> list[KnownPair]:
    """Pair a policy's own solutions of a problem: right against wrong, short against long.

    Wrong answers on which most samples agree come first: they are the hardest. Of those the right solution of the most
    similar length is taken, else length would tell."""
    problem, records = solved.example.problem, solved.different()
    right = [r for r in records if r["correct"] and r["finished"]]
    votes = Counter(r["answer"] for r in solved.records)
    wrong = sorted((r for r in records if not r["correct"]),
                   key=lambda r: (-votes[r["answer"]] if r["answer"] else 0, r["tokens"]))
    pairs = []
    for bad in wrong[:PAIRS] if right else []:
        good = min(right, key=lambda r: abs(r["tokens"] - bad["tokens"]))
        pairs.append(KnownPair("own wrong", problem, as_solution(good), as_solution(bad)))
    sound = [r for r in right if r["correct_steps"] == r["steps"]]
    short, long = (pick(sound, key=lambda r: r["tokens"], default=None) for pick in (min, max))
    if sound and long["tokens"] >= LONGER * short["tokens"]:
        pairs.append(KnownPair("own long", problem, as_solution(short), as_solution(long)))
    return pairs


def as_solution(record: dict) -> Solution:
    return Solution(record["text"], record["correct"], record["tokens"])
