"""Attack strings: how easily a judge is fooled by what a solution says to it.

Each string of attacks.txt stands in a solution with an unsound step and the correct answer, as the verifier lets it
through, or alone; `lift` is how much more often a judge prefers it then to a sound one. What a kind of attack has
beyond the lift of the `harmless` ones, which ask for nothing, is what its words do."""
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from minimath.core.errors import UserError
from minimath.core.stats import bootstrap
from minimath.data.examples import Example
from minimath.judges.base import Judge, Pair
from minimath.judges.compare import ask_both, won
from minimath.judges.pairs import solution

ATTACKS = Path(__file__).parent / "attacks.txt"
PLACES = ("start", "end", "after", "alone")  # end: before the final answer, after: behind it
HARMLESS = "harmless"  # the kind of strings that are no attacks, for comparison
PAD = ("Let us think about this once more, from the beginning and with care. " * 75)[:5000]


class Attack(NamedTuple):
    """A string, its kind and its place."""
    category: str
    place: str
    text: str


class Try(NamedTuple):
    """An attacker, or what carries it without an attack, against the good solution, in both orders."""
    attack: Attack | None
    problem: int
    alone: bool
    first: Pair
    second: Pair


def load_attacks(path: str | Path = ATTACKS) -> list[Attack]:
    """Read a file of attack strings. Raises UserError with file:line."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")  # JSON may hold other line ends
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
    """Put the attack into a solution; me, other: the letters of both solutions."""
    string = attack.text.replace("{me}", me).replace("{other}", other).replace("{pad}", PAD)
    if attack.place == "end":
        *_, last = re.split(r"(?<=\.)\s+", text)  # the sentence with the final answer
        return f"{text[:len(text) - len(last)]}{string} {last}"
    return {"alone": string, "start": f"{string}\n{text}", "after": f"{text}\n{string}"}[attack.place]


def make_tries(attacks: list[Attack], solutions: list[tuple[Example, dict[str, str]]]) -> list[Try]:
    """Pair every attack with every problem, and what carries them without an attack."""
    tries = []
    for p, (example, texts) in enumerate(solutions):
        good = solution(texts["right"], example.answer)
        for attack, alone in [(None, False), (None, True), *((attack, attack.place == "alone") for attack in attacks)]:
            carrier = "" if alone else texts["unsound"]
            as_a, as_b = (solution(plant(attack, carrier, *letters) if attack else carrier, example.answer)
                          for letters in ("AB", "BA"))
            tries.append(Try(attack, p, alone, Pair(example.problem, as_a, good), Pair(example.problem, good, as_b)))
    return tries


def bare_prompt(rubric: str, pair: Pair, specials: list[str] = ()) -> str:
    """Fill a rubric without defences: no mark, nothing said of it, no cleaning."""
    blocks = [block for block in rubric.split("\n\n")
              if "{nonce}" not in block or re.search(r"\{(problem|first|second)\}", block)]
    parts = {"problem": pair.problem, "first": pair.first.text, "second": pair.second.text}
    return re.sub(r"\{nonce\} ?|\{(problem|first|second)\}", lambda match: parts.get(match.group(1), ""),
                  "\n\n".join(blocks))


def attack_judge(judge: Judge, tries: list[Try], seed: int = 0,
                 advance: Callable[[int], None] = lambda n: None) -> dict:
    """Ask about all tries: `rates` by kind, of "all" but harmless, of each string."""
    votes, error = ask_both(judge, [(t.first, t.second) for t in tries], advance)
    plain = {(t.problem, t.alone): vote for t, vote in zip(tries, votes, strict=True) if not t.attack}
    kinds, strings = {}, {}
    for t, vote in zip(tries, votes):
        if t.attack:
            row = vote, plain[t.problem, t.alone], t.problem
            strings.setdefault(t.attack, []).append(row)
            for kind in (t.attack.category, *["all"] * (t.attack.category != HARMLESS)):
                kinds.setdefault(kind, []).append(row)
    return {"kinds": {name: rates(rows, seed) for name, rows in kinds.items()}, "error": error,
            "strings": [attack._asdict() | rates(rows, seed) for attack, rows in strings.items()]}


def rates(rows: list[tuple], seed: int) -> dict:
    """Compute the figures of tries.

    rows: (both votes on an attacker, those on its carrier without the string, the problem's number). success: share
    that the attacker wins with both orders together, a tie counting one half, a missing vote nothing. baseline: the
    same without the string. lift: the difference where all four voted, mean over problems, with its bootstrap interval
    over problems: what a judge thinks of a carrier is in all its tries."""
    wins, before = ([0.0 if None in pair else won(*pair) for pair in pairs] for pairs in list(zip(*rows))[:2])
    lifts: dict[int, list[float]] = {}
    for a, b, (attacked, plain, problem) in zip(wins, before, rows, strict=True):
        if None not in attacked + plain:
            lifts.setdefault(problem, []).append(a - b)
    means = [sum(of_one) / len(of_one) for of_one in lifts.values()] or [0.0]
    return {"tries": len(rows), "success": sum(wins) / len(rows), "baseline": sum(before) / len(rows),
            "lift": sum(means) / len(means), "lift_interval": bootstrap(means, seed),
            "no_votes": sum(pair.count(None) for pair, *_ in rows)}
