"""Which of two evaluations has the better solutions.

    minimath judge compare EVAL_A EVAL_B [RECIPE.yaml] [judge=...]

EVAL_A and EVAL_B are folders of `minimath eval` on the same problems. Where both solutions of a problem are correct, a
judge is asked in both orders which one reads better (judge_rubric=readability). A judge that a model was trained with
likes what that training rewarded: take another one. judge-compare.json keeps the figures, in EVAL_A/judge-compare
unless out= names another folder."""
import time
from collections.abc import Callable
from dataclasses import field
from pathlib import Path

from minimath.commands.judge_check import load_options, open_judge, result_folder, save_result
from minimath.config.load import take_recipe
from minimath.config.schema import JudgeOptions, RLAIFConfig
from minimath.core.errors import UserError
from minimath.core.log import RunLog, fmt_duration
from minimath.core.stats import bootstrap, in_common
from minimath.eval.metrics import read_solutions
from minimath.judges.base import Judge, Pair, Solution
from minimath.judges.compare import ask_both, percent, span, tally, won


class JudgeCompareConfig(RLAIFConfig):
    """Options of `minimath judge compare`: those of the judge, and its own."""
    judge: JudgeOptions = field(default_factory=lambda: JudgeOptions(rubric="readability"))
    readers: int = 200
    """most pairs, the first of the data; 0: all"""


def judge_compare(words: list[str]) -> dict:
    """Run the command, and return what judge-compare.json holds. Raises UserError."""
    folders = [take_recipe(words := list(words)), take_recipe(words)]
    if None in folders:
        raise UserError("give two folders of evaluations: minimath judge compare EVAL_A EVAL_B [judge=...]")
    cfg = load_options(JudgeCompareConfig, take_recipe(words), words)
    records = [read_solutions(Path(folder)) for folder in folders]
    found = pair_up(*records)
    pairs = found[:cfg.readers or None]
    alone = sum(map(len, records)) - 2 * sum(min(len(a), len(b)) for _, a, b in in_common(*records))
    with RunLog(result_folder(cfg.run.out or str(Path(folders[0], "judge-compare")), "judge-compare"),
                "minimath judge compare") as log:
        log.say(f"A: {folders[0]}, B: {folders[1]}; {len(pairs)} of {len(found)} pairs in which both are correct")
        if alone:
            log.say(f"{alone} of {sum(map(len, records))} solutions are left out: the other evaluation lacks the "
                    "problem or has fewer samples of it")
        judge, _ = open_judge(cfg, log)
        with log.progress(2 * len(pairs), "judging") as advance:
            f = compare_solutions(judge, pairs, cfg.run.seed, advance)
        columns = ["pairs", "A preferred", "95% interval", "position bias", "order conflicts", "ties", "no votes",
                   "mean tokens of A", "of B"]
        by = f", judge_rubric={cfg.judge.rubric}" if judge.by_rubric else ""
        log.table(f"{judge.name}{by}: A against B", columns, [
            [f["pairs"], percent(f["preferred"], 1), span(f["interval"], ".1f"), percent(f["position_bias"]),
             percent(f["order_conflicts"]), f["ties"], f["no_votes"], *f["mean_tokens"]]])
        spent = "".join(f", {value:.6g} {name}" for name, value in sorted(f["cost"].items()))
        log.say(f"cost: {fmt_duration(f['seconds'])}{spent}")
        lines = findings(f)
        result = {"a": folders[0], "b": folders[1], "judge": judge.name, **f, "findings": lines}
        return save_result(log, "judge-compare", cfg, result, lines)


def pair_up(ours: list[dict], theirs: list[dict]) -> list[Pair]:
    """Pair the samples of each common problem, where both are correct. UserError."""
    found = [(problem, a, b) for problem, of_a, of_b in in_common(ours, theirs) for a, b in zip(of_a, of_b)]
    kept = [Pair(problem, *(Solution(side["text"], True, side["tokens"]) for side in (a, b)))
            for problem, a, b in found if a["correct"] and b["correct"]]
    if not kept:
        raise UserError(f"in none of {len(found)} pairs are both solutions correct (A in "
                        f"{sum(a['correct'] for _, a, _ in found)}, B in {sum(b['correct'] for *_, b in found)})")
    return kept


def compare_solutions(judge: Judge, pairs: list[Pair], seed: int = 0,
                      advance: Callable[[int], None] = lambda n: None) -> dict:
    """Compare A's solutions with B's.

    preferred: mean over problems of the share of pairs in which A's is preferred with both orders together, 1/2 for a
    tie; interval: its bootstrap 95%; both None without votes. cost: growth of the judge's counts. Rest: tally."""
    before, start = judge.counts.copy(), time.monotonic()
    votes, error = ask_both(judge, [pair.both() for pair in pairs], advance)
    problems: dict[str, list[float]] = {}
    for pair, vote in zip(pairs, votes, strict=True):
        if None not in vote:
            problems.setdefault(pair.problem, []).append(won(*vote))
    means = [sum(of_one) / len(of_one) for of_one in problems.values()]
    return tally(votes, judge.soft) | {
        "problems": len(means), "preferred": sum(means) / len(means) if means else None,
        "interval": bootstrap(means, seed) if means else None,
        "ties": sum(of_one.count(0.5) for of_one in problems.values()),
        "mean_tokens": [sum(pair[side].tokens for pair in pairs) / len(pairs) for side in (1, 2)],
        "error": error, "cost": dict(judge.counts - before), "seconds": time.monotonic() - start}


def findings(figures: dict) -> list[str]:
    """Say in plain words what the figures mean."""
    lines = [f"the judge failed: {figures['error']}"] if figures["error"] else []
    if not figures["voted"]:
        return [*lines, "no pair has both its votes: nothing can be said"]
    low, high = figures["interval"]
    if low <= 0.5 <= high:
        lines.append(f"the interval holds 50%: this judge does not tell A from B on {figures['problems']} problems")
    else:
        better, worse, share = ("A", "B", figures["preferred"]) if low > 0.5 else ("B", "A", 1 - figures["preferred"])
        lines.append(f"{better}'s solutions are preferred to {worse}'s, in {percent(share)} of pairs")
    if abs(bias := figures["position_bias"]) > 0.5 or figures["order_conflicts"] > 0.5:
        place = "first" if bias > 0.1 else "second" if bias < -0.1 else "now first, now second"
        lines.append(f"this judge is near useless here: it votes mostly for what stands {place}; take a larger "
                     "one (minimath judge check)")
    return lines
