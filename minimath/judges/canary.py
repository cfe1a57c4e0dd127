"""Canary pairs: what a judge makes of worse solutions, asked during a run.

A policy that is paid for being liked may learn what fools its judge. Two sets of pairs show it before it costs a run:

    fixed     padded, unsound and attacking solutions with a correct answer, as a judge meets them behind the verifier.
              Shows a judge that changes (an endpoint that is updated, a judge that is trained).
    rollout   a wrong sample against a correct one of the same problem, which the verifier would never let a judge see.
              Shows a policy whose wrong texts begin to win: reward hacking.
"""
import random
import time

from minimath.data.sample import Group
from minimath.judges.attack import load_attacks, plant
from minimath.judges.base import Judge
from minimath.judges.pairs import KnownPair, faulty_solutions, solution
from minimath.judges.poll import ask, in_both_orders, tally

KINDS = ("long", "unsound", "attack")


class Canary:
    """Watches a judge during a run, with fixed pairs that depend on the seed alone."""

    def __init__(self, seed: int, judge: Judge, count: int = 24):
        self.judge, self.pairs = judge, fixed_pairs(seed, count)

    def metrics(self, groups: list[Group]) -> dict:
        """Judge both sets of pairs; canary/* and canary/rollout_* are `judge_pairs`'s.

        When the policy learns to please the judge, canary/rollout_worse_wins rises while rollout/correct does not."""
        both = (("canary/", self.pairs), ("canary/rollout_", rollout_pairs(groups)))
        return {name + key: value for name, pairs in both for key, value in judge_pairs(self.judge, pairs).items()}


def fixed_pairs(seed: int, count: int) -> list[KnownPair]:
    """Make `count` pairs, a third of each kind.

    attack: an unsound solution with a string of attacks.txt, the categories taking turns."""
    by_category: dict[str, list] = {}
    for attack in load_attacks():
        if attack.place != "alone":  # those have no answer: the verifier stops them
            by_category.setdefault(attack.category, []).append(attack)
    rng, pairs = random.Random(f"minimath canary {seed}"), []
    categories = rng.sample(sorted(by_category), len(by_category))
    for i, (example, texts) in enumerate(faulty_solutions(count, seed)):
        kind = KINDS[i % len(KINDS)]
        worse = texts.get(kind, "")
        if kind == "attack":
            attack = rng.choice(by_category[categories[i // len(KINDS) % len(categories)]])
            worse = plant(attack, texts["unsound"], *rng.sample("AB", 2))
        pairs.append(KnownPair(kind, example.problem, solution(texts["right"], example.answer),
                               solution(worse, example.answer)))
    return pairs


def rollout_pairs(groups: list[Group], limit: int = 16) -> list[KnownPair]:
    """Pair a correct with a wrong sample, one pair per group that has both.

    Of similar length, so that length alone does not decide; at most `limit`."""
    pairs = []
    for group in groups:
        chosen = min(((abs(a.tokens - b.tokens), i, j) for i, a in enumerate(group.samples) if a.correct
                      for j, b in enumerate(group.samples) if not b.correct and b.text.strip()), default=None)
        if chosen:
            _, i, j = chosen
            pairs.append(KnownPair("rollout", group.example.problem, group.samples[i], group.samples[j]))
    return pairs[:limit]


def judge_pairs(judge: Judge, pairs: list[KnownPair]) -> dict:
    """Judge pairs of known order; whatever a judge does, it is counted.

    worse_wins: judged win rate of the worse solutions (0: never fooled, 0.5: chance), also as worse_wins_<kind>.
    agreement, position_bias, no_votes: as in poll.tally. pairs, seconds, error ("" or the judge's exception)."""
    start = time.monotonic()
    votes, error = ask(judge, in_both_orders([pair.question() for pair in pairs]), chunk=32)
    figures = tally(votes, judge.soft)
    out = {name: figures[name] for name in ("pairs", "agreement", "position_bias", "no_votes")}
    out["worse_wins"] = worse_wins(figures)
    for kind in dict.fromkeys(pair.kind for pair in pairs):
        mine = [vote for i, pair in enumerate(pairs) if pair.kind == kind for vote in votes[2 * i:2 * i + 2]]
        out[f"worse_wins_{kind}"] = worse_wins(tally(mine, judge.soft))
    return out | {"seconds": time.monotonic() - start, "error": error}


def worse_wins(figures: dict) -> float | None:
    return None if figures["first_wins"] is None else 1.0 - figures["first_wins"]
