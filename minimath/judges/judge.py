"""Make the judge of the options, and let it compare the samples of each group."""
import time
from collections.abc import Callable

from minimath.config.schema import JudgeOptions
from minimath.core.errors import UserError
from minimath.data.sample import Group, Sample
from minimath.judges.base import HeuristicJudge, Judge, Pair
from minimath.judges.cache import ReplyCache, cache_folder
from minimath.judges.compare import both_orders, choose_pairs, win_probabilities
from minimath.judges.endpoint import EndpointJudge, is_fault
from minimath.judges.poll import ask, in_both_orders, percent, tally
from minimath.judges.rubrics import make_nonce
from minimath.judges.self_judge import SelfJudge
from minimath.models.policy import Policy


def make_judge(options: JudgeOptions, policy: Policy | None = None, *, micro_batch_tokens: int = 4096,
               say: Callable[[str], None] = print) -> Judge:
    """Make the judge that the options name; the policy is judge=self's. UserError."""
    if options.name == "heuristic":
        return HeuristicJudge(options, say=say)
    if options.name == "self":
        return SelfJudge(options, policy, micro_batch_tokens=micro_batch_tokens, say=say)
    return EndpointJudge(options, say=say, cache=ReplyCache(cache_folder(), say))


class Contest:
    """The correct samples of a group, one of each text.

    place: of each sample of the group in texts, None: wrong; copies: how many samples have each text."""

    def __init__(self, group: Group):
        texts: dict[str, Sample] = {}
        for sample in group.samples:
            if sample.correct:
                texts.setdefault(sample.text.strip(), sample)
        names = list(texts)
        self.problem, self.texts = group.example.problem, list(texts.values())
        self.place = [names.index(s.text.strip()) if s.correct else None for s in group.samples]
        self.copies = [self.place.count(k) for k in range(len(texts))]
        self.nonce = make_nonce(self.problem, *texts)

    def pair(self, i: int, j: int) -> Pair:
        return Pair(self.problem, self.texts[i], self.texts[j], self.nonce)


def judge_groups(judge: Judge, groups: list[Group]) -> tuple[list[list[float | None]], dict]:
    """Judge all groups in one batch of questions; returns wins and stats.

    wins[g][i] is the mean score of sample i against the other correct samples of group g (identical texts tie); None
    for wrong samples and for those without a vote. A pair without a vote in both orders drops out, or gets the
    heuristic judge's vote (judge.fallback).

    stats: comparisons (questions, two per pair), skipped (groups with fewer than two different correct texts),
    no_votes, position_bias and order_conflicts (poll.tally), fallbacks (pairs that the heuristic judge took over),
    counts (what the judge's counts grew by), error ("" or the judge's exception), seconds.

    Raises UserError with judge_fallback=stop when the judge is down; any other failure costs votes and is said once."""
    start, before = time.monotonic(), judge.counts.copy()
    contests = [Contest(group) for group in groups]
    due = [(g, pair) for g, contest in enumerate(contests)
           for pair in choose_pairs(len(contest.texts), judge.pairs, contest.nonce)]
    votes, error = ask(judge, in_both_orders([contests[g].pair(*pair) for g, pair in due]))
    results: list[list[tuple[int, int, float]]] = [[] for _ in contests]
    fallbacks = 0
    for (g, (i, j)), forward, backward in zip(due, votes[::2], votes[1::2], strict=True):
        if forward is not None and backward is not None:  # one order alone would carry the position bias
            results[g].append((i, j, both_orders(forward, backward, judge.soft)))
        elif judge.fallback == "heuristic":  # for both orders: half of two judges would be biased by the first's
            results[g].append((i, j, HeuristicJudge().compare([contests[g].pair(i, j)])[0]))
            fallbacks += 1
    wins = []
    for contest, own in zip(contests, results, strict=True):
        of_text = win_probabilities(len(contest.texts), own, contest.copies)
        wins.append([None if place is None else of_text[place] for place in contest.place])
    figures = tally(votes, judge.soft)
    stats = {"comparisons": len(votes), "skipped": sum(len(c.texts) < 2 for c in contests), "fallbacks": fallbacks,
             "no_votes": figures["no_votes"], "position_bias": figures["position_bias"] or 0.0,
             "order_conflicts": figures["order_conflicts"] or 0.0, "counts": dict(judge.counts - before),
             "error": error, "seconds": time.monotonic() - start}
    see_to_lost_votes(judge, stats)
    return wins, stats


def see_to_lost_votes(judge: Judge, stats: dict) -> None:
    """Say once that most votes are missing; UserError under judge_fallback=stop."""
    asked, lost, counts = stats["comparisons"], stats["no_votes"], stats["counts"]
    met = ", ".join(f"{n:g} x {name}" for name, n in counts.items() if is_fault(name)) or stats["error"] \
        or "unreadable replies"
    if judge.fallback == "stop" and lost and (stats["error"] or lost == asked or counts.get("given_up")):
        raise UserError(f"the judge {judge.name} is down: {lost} of {asked} questions have no vote ({met}); see to it, "
                        "or go on with judge_fallback=heuristic or none")
    if 2 * lost > asked:
        becomes = "the heuristic judge votes there" if judge.fallback == "heuristic" else \
            "they count nothing in the reward; judge_fallback=heuristic would vote there"
        judge.say_once("lost votes", f"the judge {judge.name} gave no vote on {percent(lost / asked)} of {asked} "
                       f"questions ({met}): {becomes}")
