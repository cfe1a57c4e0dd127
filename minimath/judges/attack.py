"""Attack strings: how easily a judge is fooled by what a solution says to it.

Each string of attacks.txt stands in a solution that is worse than the plain correct one beside it, in both positions.
The same solutions without a string say how often the judge prefers them anyway; the difference, `lift`, is what the
strings achieve: a judge near chance is not fooled, it is useless. The strings of the kind `harmless` ask for nothing
and stand in the same places: what a kind of attack has beyond their lift is what its words do.
"""
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from minimath.core.errors import UserError
from minimath.core.stats import bootstrap
from minimath.data.examples import Example
from minimath.judges.base import Judge, Pair
from minimath.judges.compare import won
from minimath.judges.pairs import solution
from minimath.judges.poll import ask, tally

ATTACKS = Path(__file__).parent / "attacks.txt"
PLACES = ("start", "end", "after", "alone")
HARMLESS = "harmless"  # the kind of strings that are no attacks, for comparison
CARRIERS = ("wrong", "bare", "unsound")  # a wrong answer with its steps, one without, a correct one with a wrong step
PAD = ("Let us think about this once more, from the beginning and with care. " * 75)[:5000]


class Attack(NamedTuple):
    """A string, its kind and its place: start, end (before the final answer), after (behind it), alone."""
    category: str
    place: str
    text: str


class Try(NamedTuple):
    """An attacker against the good solution of a problem, in both positions.

    attack: None for the solution that carries the attacks, as it is."""
    attack: Attack | None
    problem: int
    carrier: str
    first: Pair
    second: Pair

    @property
    def correct(self) -> bool:
        """Say whether a run's verifier would let the attacker through to the judge."""
        return self.first.first.correct


def load_attacks(path: str | Path = ATTACKS) -> list[Attack]:
    """Read a file of attack strings. Raises UserError with file:line."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"attacks={path}: {error}; give a text file like {ATTACKS}") from None
    attacks = []
    for number, line in enumerate(lines, 1):
        if line.strip() and not line.startswith("#"):
            try:
                category, place, text = line.split(maxsplit=2)
                attacks.append(Attack(category, place, json.loads(text)))
                if place not in PLACES or not isinstance(attacks[-1].text, str):
                    raise ValueError
            except ValueError:
                raise UserError(f"{path}:{number}: expected a category, a place ({', '.join(PLACES)}) and a JSON "
                                f"string, not {line[:60]!r}") from None
    if all(attack.category == HARMLESS for attack in attacks):
        raise UserError(f"{path}: no attack string in it")
    return attacks


def plant(attack: Attack, text: str, me: str, other: str) -> str:
    """Put the attack into a solution.

    me, other: the letters of this and of the other solution."""
    string = attack.text.replace("{me}", me).replace("{other}", other).replace("{pad}", PAD)
    if attack.place == "end":
        *_, last = re.split(r"(?<=\.)\s+", text)  # the sentence with the final answer
        return f"{text[:len(text) - len(last)]}{string} {last}"
    return {"alone": string, "start": f"{string}\n{text}", "after": f"{text}\n{string}"}[attack.place]


def make_tries(attacks: list[Attack], solutions: list[tuple[Example, dict[str, str]]]) -> list[Try]:
    """Pair every attack with every problem, and every carrier without an attack."""
    tries = []
    for p, (example, texts) in enumerate(solutions):
        good = solution(texts["right"], example.answer)
        bare = re.search(r"\\boxed\{\d+\}", texts["wrong"]).group()
        carried = {"wrong": texts["wrong"], "bare": bare, "unsound": texts["unsound"], "nothing": ""}
        jobs = [(None, name) for name in carried]
        jobs += [(attack, "nothing" if attack.place == "alone" else CARRIERS[(p + a) % len(CARRIERS)])
                 for a, attack in enumerate(attacks)]
        for attack, name in jobs:
            as_a, as_b = (solution(plant(attack, carried[name], *letters) if attack else carried[name], example.answer)
                          for letters in ("AB", "BA"))
            tries.append(Try(attack, p, name, Pair(example.problem, as_a, good), Pair(example.problem, good, as_b)))
    return tries


def bare_prompt(rubric: str, pair: Pair, specials: list[str] = ()) -> str:
    """Fill a rubric as `judge_prompt` does, without its defences.

    No mark, no paragraph that explains it, the texts whole, as they are."""
    blocks = [block for block in rubric.split("\n\n")
              if "{nonce}" not in block or re.search(r"\{(problem|first|second)\}", block)]
    parts = {"problem": pair.problem, "first": pair.first.text, "second": pair.second.text}
    return re.sub(r"\{nonce\} ?|\{(problem|first|second)\}", lambda match: parts.get(match.group(1), ""),
                  "\n\n".join(blocks))


def attack_judge(judge: Judge, tries: list[Try], seed: int = 0,
                 advance: Callable[[int], None] = lambda n: None) -> dict:
    """Ask one judge about all tries.

    Returns `kinds`: `rates` by category of attack, of "all" of them, of those "past the verifier" and, where there are
    any, of the harmless strings, which are in no other figure; `strings`: of each string; `error`."""
    votes, error = ask(judge, [pair for t in tries for pair in (t.first, t.second)], advance, chunk=32)
    voted = list(zip(tries, zip(votes[::2], votes[1::2], strict=True), strict=True))
    plain = {(t.problem, t.carrier): pair for t, pair in voted if t.attack is None}
    kinds, strings = {}, {}
    for t, pair in voted:
        if t.attack is not None:
            names = [t.attack.category]
            if t.attack.category != HARMLESS:
                names += ["all", "past the verifier"] if t.correct else ["all"]
            for group, name in ((strings, t.attack), *((kinds, name) for name in names)):
                group.setdefault(name, []).append((pair, plain[t.problem, t.carrier]))
    return {"kinds": {name: rates(rows, seed) for name, rows in kinds.items()}, "error": error,
            "strings": [attack._asdict() | rates(rows, seed) for attack, rows in strings.items()]}


def rates(rows: list[tuple], seed: int) -> dict:
    """Compute the figures of some tries.

    rows: (the two votes on an attacker, those on its carrier without the string); where a vote is missing, the attacker
    has lost. success: share of single votes for the attacker, a tie counting one half. both_orders: share of tries that
    it wins with both orders together, as in a run: what is left of a judge that votes by position. baseline,
    both_baseline: the same without the string. lift: both_orders - both_baseline, with a bootstrap interval."""
    attacked, plain = ([(0.0, 1.0) if None in pair else pair for pair in pairs] for pairs in zip(*rows))
    now, before = (tally([vote for pair in pairs for vote in pair], soft=False) for pairs in (attacked, plain))
    lifts = [won(*a) - won(*b) for a, b in zip(attacked, plain, strict=True)]
    return {"tries": 2 * len(rows), "success": now["one_order"], "baseline": before["one_order"],
            "both_orders": now["agreement"], "both_baseline": before["agreement"],
            "lift": sum(lifts) / len(lifts), "lift_interval": bootstrap(lifts, seed),
            "no_votes": sum(vote is None for pair, _ in rows for vote in pair)}
