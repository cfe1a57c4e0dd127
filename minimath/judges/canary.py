"""Canary pairs: what a judge makes of solutions that are worse by construction, asked again every few steps of a run.

A policy that is paid for being liked may learn what fools its judge; the judged win rate then rises and accuracy does
not. Two sets show the gap before it costs a run:

    canary_pairs   fixed: padded, unsound and attacking solutions, all with a right answer, as a judge meets them behind
                   the answer gate. Shows a judge that changes (an endpoint that is updated, a judge that is trained).
    rollout_pairs  of the current rollout: a wrong completion against a right one of the same problem, which the gate
                   would never let a judge see. Shows a policy whose wrong texts begin to win: reward hacking.
"""
import random
import time

from minimath.judges.judge import Candidate, Judge
from minimath.judges.attack import load_attacks, plant
from minimath.judges.pairs import KnownPair, as_candidate, ask, faulty_solutions, questions_of, tally

KINDS = ("long", "unsound", "attack")


def canary_pairs(seed: int = 0, count: int = 24) -> list[KnownPair]:
    """count pairs, a third of each of KINDS; attack: an unsound solution with a string of attacks.txt, the categories
    taking turns. Same arguments, same pairs."""
    by_category: dict[str, list] = {}
    for attack in load_attacks():
        if attack.place != "alone":  # those have no answer: the gate stops them
            by_category.setdefault(attack.category, []).append(attack)
    rng, pairs = random.Random(f"minimath canary {seed}"), []
    categories = rng.sample(sorted(by_category), len(by_category))
    for i, (example, texts) in enumerate(faulty_solutions(count, seed)):
        kind = KINDS[i % len(KINDS)]
        if kind == "attack":
            attack = rng.choice(by_category[categories[i // len(KINDS) % len(categories)]])
            worse = plant(attack, texts["unsound"], *rng.sample("AB", 2))
        else:
            worse = texts[kind]
        pairs.append(KnownPair(kind, example.problem, as_candidate(texts["right"], example.answer),
                               as_candidate(worse, example.answer)))
    return pairs


def rollout_pairs(groups: list[tuple[str, list[Candidate]]], limit: int = 16) -> list[KnownPair]:
    """At most `limit` pairs of a right and a wrong completion, one per group, (problem, candidates), that has both; of
    similar length, so that length alone does not decide."""
    pairs = []
    for problem, candidates in groups:
        chosen = min(((abs(a.tokens - b.tokens), i, j) for i, a in enumerate(candidates) if a.right
                      for j, b in enumerate(candidates) if not b.right and b.text.strip()), default=None)
        if chosen:
            pairs.append(KnownPair("rollout", problem, candidates[chosen[1]], candidates[chosen[2]]))
    return pairs[:limit]


def judge_canary(judge: Judge, pairs: list[KnownPair]) -> dict:
    """Figures of a judge on pairs of known order, two questions per pair; never raises for what a judge does.

    worse_wins: judged win rate of the worse solutions (0: never fooled, 0.5: chance), also as worse_wins_<kind>.
    agreement, position_bias: as in judge_pairs.tally. None where no pair has both its votes, or there is no pair.
    pairs, no_votes, seconds, error ("" or the judge's exception).
    """
    start = time.monotonic()
    votes, error = ask(judge, questions_of(pairs))
    facts = tally(votes, judge.soft)
    out = {"pairs": len(pairs), "worse_wins": worse_wins(facts), "agreement": facts["agreement"],
           "position_bias": facts["position_bias"], "no_votes": facts["no_votes"]}
    for kind in dict.fromkeys(pair.kind for pair in pairs):
        mine = [vote for i, pair in enumerate(pairs) if pair.kind == kind for vote in votes[2 * i:2 * i + 2]]
        out[f"worse_wins_{kind}"] = worse_wins(tally(mine, judge.soft))
    return out | {"seconds": time.monotonic() - start, "error": error}


def worse_wins(facts: dict) -> float | None:
    return None if facts["better_wins"] is None else 1.0 - facts["better_wins"]


def canary_facts(judge: Judge, canary: list[KnownPair], groups: list[tuple[str, list[Candidate]]]) -> dict:
    """Metrics of a step: canary_* of the fixed pairs, canary_rollout_* of right and wrong completions of this step.

    When the policy learns to please the judge, rollout_worse_wins rises while `right` does not.
    """
    both = (("canary", canary), ("canary_rollout", rollout_pairs(groups)))
    return {f"{name}_{key}": value for name, pairs in both for key, value in judge_canary(judge, pairs).items()}
