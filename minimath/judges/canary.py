"""Canary pairs: what a judge makes of worse solutions, asked during a run.

    fixed     padded and unsound solutions with a correct answer, as a judge meets them behind the verifier; of a
              trained judge also held-out rollouts, right against wrong. Shows a judge that changes (an endpoint that is
              updated, a judge that is trained on).
    rollout   a wrong sample against a correct one of the same problem, which the verifier would never let a judge see.
              Shows a policy whose wrong texts begin to win: reward hacking.
"""
from minimath.data.sample import Group
from minimath.grading.answer import extract_answer
from minimath.judges.base import Judge
from minimath.judges.card import JudgeCard
from minimath.judges.pairs import BEHIND_THE_VERIFIER, KnownPair, judge_known, make_pairs, solution

HELD_OUT = 24  # pairs of a trained judge's card


class Canary:
    """Watches a judge during a run, with fixed pairs that depend on the seed alone."""

    def __init__(self, seed: int, judge: Judge, problems: int = 12):
        self.judge, self.pairs = judge, make_pairs(problems, seed, BEHIND_THE_VERIFIER)
        kept = getattr(judge, "card", JudgeCard()).pairs[:HELD_OUT]
        self.pairs += [KnownPair("held_out", problem, *(solution(text, extract_answer(right) or "")
                                                        for text in (right, wrong))) for problem, right, wrong in kept]

    def metrics(self, groups: list[Group]) -> dict:
        """Judge both sets of pairs; canary/* and canary/rollout_* are `canary_figures`.

        When the policy learns to please the judge, canary/rollout_worse_wins rises while rollout/correct does not."""
        both = (("canary/", self.pairs), ("canary/rollout_", rollout_pairs(groups)))
        return {name + key: value for name, pairs in both for key, value in canary_figures(self.judge, pairs).items()}


def rollout_pairs(groups: list[Group], limit: int = 16) -> list[KnownPair]:
    """Pair a correct with a wrong sample, one pair per group that has both.

    Of similar length, so that length alone does not decide; at most `limit`."""
    pairs = []
    for group in groups:
        mixed = [(a, b) for a in group.samples if a.correct
                 for b in group.samples if not b.correct and b.text.strip()]
        if mixed:
            right, wrong = min(mixed, key=lambda pair: abs(pair[0].tokens - pair[1].tokens))
            pairs.append(KnownPair("rollout", group.example.problem, right, wrong))
    return pairs[:limit]


def canary_figures(judge: Judge, pairs: list[KnownPair]) -> dict:
    """Judge pairs of known order.

    worse_wins: judged win rate of the worse solutions (0: never fooled, 0.5: chance), also as worse_wins_<kind>.
    pairs, agreement, position_bias, no_votes: as in poll.tally. error: "" or the judge's exception."""
    by_kind = judge_known(judge, pairs)
    out = {name: by_kind["all"][name] for name in ("pairs", "agreement", "position_bias", "no_votes", "error")}
    for kind, figures in by_kind.items():
        name = "worse_wins" if kind == "all" else f"worse_wins_{kind}"
        out[name] = None if figures["first_wins"] is None else 1.0 - figures["first_wins"]
    return out
