"""Make the judge of the options, and let it compare the samples of each group."""
import time
from collections.abc import Callable

from minimath.config.schema import JudgeOptions
from minimath.core.errors import UserError
from minimath.data.sample import Group
from minimath.judges.base import HeuristicJudge, Judge, Pair, Solution
from minimath.judges.cache import ReplyCache
from minimath.judges.compare import ask_both, both_orders, choose_pairs, percent, tally, win_probabilities
from minimath.judges.endpoint import EndpointJudge, is_fault
from minimath.judges.rubrics import make_nonce
from minimath.judges.self_judge import SelfJudge
from minimath.models.policy import Policy


def make_judge(options: JudgeOptions, policy: Policy | None = None, *, micro_batch_tokens: int = 4096,
               say: Callable[[str], None] = print) -> Judge:
    """Make the judge that the options name; the policy is judge=self's. UserError."""
    if options.name == "heuristic":
        judge = HeuristicJudge(options, say=say)
    elif options.name == "self":
        judge = SelfJudge(options, policy, micro_batch_tokens=micro_batch_tokens, say=say)
    else:
        judge = EndpointJudge(options, say=say, cache=ReplyCache(say=say))
    if options.rubric != JudgeOptions().rubric and not judge.by_rubric:
        own = " was trained with its own words" if judge.form == "pair" and judge.name == "self" else " reads no rubric"
        say(f"judge_rubric={options.rubric} has no effect: this judge{own}")
    return judge


def judge_groups(judge: Judge, groups: list[Group]) -> tuple[list[list[float | None]], dict]:
    """Judge all groups in one batch of questions; returns wins and stats.

    wins[g][i] is the mean score of sample i against the other correct samples of group g (identical texts tie); None
    for wrong samples and for those without a vote. stats: comparisons (questions, two per pair), skipped (groups with
    fewer than two different correct texts), no_votes, voted (pairs with both votes), position_bias and order_conflicts
    of those (compare.tally), fallbacks (pairs that the heuristic judge took over; else those without both votes drop
    out), counts (what the judge's counts grew by), error ("" or the judge's exception), seconds.

    Raises UserError with judge_fallback=stop when the judge is down; any other failure costs votes and is said once."""
    start, before = time.monotonic(), judge.counts.copy()
    contests, due = [], []  # the different correct texts of each group; (group, i, j, pair)
    for number, group in enumerate(groups):
        contests.append(texts := different(group))
        samples, nonce = list(texts.values()), make_nonce(group.example.problem, *texts)
        due += [(number, i, j, Pair(group.example.problem, samples[i], samples[j], nonce))
                for i, j in choose_pairs(len(samples), judge.pairs, nonce)]
    votes, error = ask_both(judge, [pair.both() for *_, pair in due], chunk=0)
    results: list[list[tuple[int, int, float]]] = [[] for _ in contests]
    fallbacks = 0
    for (number, i, j, pair), (forward, backward) in zip(due, votes, strict=True):
        if forward is not None and backward is not None:  # one order alone would carry the position bias
            results[number].append((i, j, both_orders(forward, backward, judge.soft)))
        elif judge.fallback == "heuristic":  # for both orders: half of two judges would be biased by the first's
            results[number].append((i, j, HeuristicJudge().compare([pair])[0]))
            fallbacks += 1
    figures = tally(votes, judge.soft)
    stats = {"comparisons": 2 * len(votes), "skipped": sum(len(c) < 2 for c in contests), "fallbacks": fallbacks,
             "no_votes": figures["no_votes"], "voted": figures["voted"],
             "position_bias": figures["position_bias"] or 0.0, "order_conflicts": figures["order_conflicts"] or 0.0,
             "counts": dict(judge.counts - before), "error": error, "seconds": time.monotonic() - start}
    see_to_lost_votes(judge, stats)
    return [wins_of(*each) for each in zip(groups, contests, results)], stats


def different(group: Group) -> dict[str, Solution]:
    """The first correct solution of each text."""
    texts: dict[str, Solution] = {}
    for sample in group.samples:
        if sample.correct:
            texts.setdefault(sample.solution.strip(), Solution.of(sample))
    return texts


def wins_of(group: Group, texts: dict[str, Solution], results: list[tuple[int, int, float]]) -> list[float | None]:
    """Give each sample the wins of its text; None for wrong ones."""
    own = [sample.solution.strip() if sample.correct else None for sample in group.samples]
    wins = dict(zip(texts, win_probabilities(len(texts), results, [own.count(text) for text in texts])))
    return [wins.get(text) for text in own]


def see_to_lost_votes(judge: Judge, stats: dict) -> None:
    """Say once that most votes are missing; UserError under judge_fallback=stop."""
    asked, lost, counts = stats["comparisons"], stats["no_votes"], stats["counts"]
    met = ", ".join(f"{n:g} x {name}" for name, n in counts.items()
                    if is_fault(name) or name == "too_long") or stats["error"] or "unreadable replies"
    if judge.fallback == "stop" and lost and (stats["error"] or lost == asked or counts.get("given_up")):
        raise UserError(f"the judge {judge.name} is down: {lost} of {asked} questions have no vote ({met}); see to it, "
                        "or go on with judge_fallback=heuristic or none")
    if 2 * lost > asked:
        becomes = "the heuristic judge votes there" if judge.fallback == "heuristic" else \
            "they count nothing in the reward; judge_fallback=heuristic would vote there"
        judge.say_once("lost votes", f"the judge {judge.name} gave no vote on {percent(lost / asked)} of {asked} "
                       f"questions ({met}): {becomes}")
