"""Which of two evaluations has the better solutions.

    minimath judge compare EVAL_A EVAL_B [RECIPE.yaml] [judge=...]

EVAL_A and EVAL_B are folders of `minimath eval` on the same problems. Their solutions are paired problem by problem and
shown to a judge in both orders, whose pull to a position is taken out, as in training; the first letter of the report
stands for the first folder. A judge that a model was trained with likes what that training rewarded: take another one.
With pairs=correct, the default, both solutions are correct, and what is judged is how they read (judge_rubric is
readability unless given). Solutions of one text are ties and are not asked about. judge-compare.json keeps the figures,
in EVAL_A/judge-compare unless out= names another folder.
"""
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

from minimath.commands.help import options_help
from minimath.commands.judge_check import (
    ENOUGH_PAIRS,
    judge_options,
    load_options,
    open_judge,
    option_name,
    result_folder,
    save_result,
)
from minimath.config.load import take_recipe
from minimath.config.options import Stage
from minimath.config.schema import RLAIFConfig
from minimath.core.errors import UserError
from minimath.core.log import RunLog, fmt_duration
from minimath.core.run_folder import COMPLETIONS
from minimath.core.stats import bootstrap, by_text, in_common
from minimath.judges.base import Judge, Pair, Solution
from minimath.judges.compare import both_orders, won
from minimath.judges.poll import ask, counts_since, in_both_orders, percent, signed, span, tally

KEPT = {"correct": lambda a, b: a and b, "same": lambda a, b: a == b, "all": lambda a, b: True}
MOSTLY = 0.5  # position bias or order conflicts from which on a judge votes by position more than by what it reads


class JudgeCompareConfig(Stage):
    """Options of `minimath judge compare` beside those of the judge."""
    pairs: Literal["correct", "same", "all"] = "correct"
    """which pairs: both correct, both correct or both wrong, all"""
    readers: int = 200
    """most pairs, taken evenly from all of them; 0: all"""


class Paired(NamedTuple):
    """Solutions of A and B to a problem; number: its place among the common ones."""
    number: int
    problem: str
    a: Solution
    b: Solution

    def same_text(self) -> bool:
        return self.a.text.strip() == self.b.text.strip()


def judge_compare(words: list[str]) -> dict:
    """Run the command, and return what judge-compare.json holds. Raises UserError."""
    folders = [take_recipe(words := list(words)), take_recipe(words)]
    if None in folders:
        raise UserError("minimath judge compare needs two folders of evaluations: minimath judge compare EVAL_A EVAL_B "
                        "[judge=...]")
    cfg, own = load_options(JudgeCompareConfig, words)
    if own.pairs == "correct" and not any(option_name(word) == "judge_rubric" for word in words):
        cfg.judge.rubric = "readability"  # which says that both are correct
    records = [checked_records(folder) for folder in folders]
    found = pair_up(*records, own.pairs)
    pairs = evenly(found, own.readers)
    with RunLog(result_folder(cfg.run.out or str(Path(folders[0], "judge-compare")), "judge-compare"),
                "minimath judge compare") as log:
        for letter, folder, of_one in zip("AB", folders, records, strict=True):
            log.say(f"{letter}: {folder}, {len(by_text(of_one))} problems")
        log.say(f"{len(pairs)} of {len(found)} pairs (pairs={own.pairs})")
        judge, _ = open_judge(cfg, log)
        with log.progress(2 * sum(not pair.same_text() for pair in pairs), "judging") as advance:
            figures = compare_solutions(judge, pairs, cfg.run.seed, advance)
        rubric = "" if cfg.judge.name == "heuristic" else f", judge_rubric={cfg.judge.rubric}"
        log.table(f"{judge.name}{rubric}: A against B", *table(figures))
        spent = "".join(f", {value:.6g} {name}" for name, value in sorted(figures["cost"].items()))
        log.say(f"cost: {fmt_duration(figures['seconds'])}{spent}")
        lines = findings(figures)
        result = {"a": folders[0], "b": folders[1], "judge": judge.name, "which": own.pairs, **figures}
        return save_result(log, "judge-compare", cfg, result | {"findings": lines}, lines)


def help_text() -> str:
    """List every option of `minimath judge compare` with its meaning."""
    return (f"{__doc__}\n{options_help(JudgeCompareConfig, 'compare')}\n\n"
            f"{options_help(RLAIFConfig, '', judge_options())}")


# ---- pairs

def checked_records(folder: str | Path) -> list[dict]:
    """Read the records of an evaluation, by problem and sample.

    Raises UserError when the folder holds no complete one."""
    path = Path(folder) / COMPLETIONS
    if not path.is_file():
        raise UserError(f"{folder}: not an evaluation (no {COMPLETIONS} in it); give a folder that minimath eval has "
                        "finished")
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").rstrip("\n").split("\n"), 1):
        try:
            record = json.loads(line)
            as_shown(record), record["problem"], record["gold"]
            records.append(record)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}:{number}: not a record of minimath eval ({type(error).__name__}: {error}); "
                            "evaluate again") from None
    return sorted(records, key=lambda record: (record.get("number", 0), record.get("sample", 0)))


def as_shown(record: dict) -> Solution:
    """Make a record what a judge gets."""
    return Solution(record["text"], bool(record["correct"]), record["tokens"])


def pair_up(ours: list[dict], theirs: list[dict], which: str = "correct") -> list[Paired]:
    """Pair the samples of each common problem in order, as far as both have one.

    which: as in JudgeCompareConfig.pairs. Raises UserError without a common problem or a pair."""
    found = [Paired(number, problem, as_shown(a), as_shown(b))
             for number, (problem, of_a, of_b) in enumerate(in_common(ours, theirs))
             for a, b in zip(of_a, of_b, strict=False)]
    kept = [pair for pair in found if KEPT[which](pair.a.correct, pair.b.correct)]
    if not kept:
        raise UserError(f"pairs={which}: none of {len(found)} pairs is left (A is correct in "
                        f"{sum(p.a.correct for p in found)}, B in {sum(p.b.correct for p in found)}); use pairs=all")
    return kept


def evenly(pairs: list, most: int) -> list:
    """Take at most `most` of the pairs, from the whole of the list; 0: all."""
    most = min(most or len(pairs), len(pairs))
    return [pairs[k * len(pairs) // most] for k in range(most)]


# ---- figures

def compare_solutions(judge: Judge, pairs: list[Paired], seed: int = 0,
                      advance: Callable[[int], None] = lambda n: None) -> dict:
    """Compare A's solutions with B's.

    preferred: mean over problems of the share of pairs in which A's solution is preferred with both orders together,
    1/2 for a tie, and `interval`, its bootstrap 95% interval over problems; None without a vote. win_probability: mean
    of p. identical: pairs of one text, which count as ties; ties: with them, those that the judge cannot part. cost:
    growth of the judge's counts. The others as in poll.tally, over the pairs asked about."""
    asked, before, start = [pair for pair in pairs if not pair.same_text()], dict(judge.counts), time.monotonic()
    votes, error = ask(judge, in_both_orders([Pair(p.problem, p.a, p.b) for p in asked]), advance, chunk=32)
    figures = tally(votes, judge.soft)
    outcomes = [(pair.number, 0.5, 0.5) for pair in pairs if pair.same_text()]
    outcomes += [(pair.number, won(*vote), both_orders(*vote, judge.soft)) for pair, *vote
                 in zip(asked, votes[::2], votes[1::2], strict=True) if None not in vote]
    problems: dict[int, list[float]] = {}
    for number, outcome, _ in outcomes:
        problems.setdefault(number, []).append(outcome)
    means = [sum(of_one) / len(of_one) for of_one in problems.values()]
    return {"pairs": len(pairs), "identical": len(pairs) - len(asked), "problems": len(means),
            "preferred": sum(means) / len(means) if means else None,
            "interval": bootstrap(means, seed) if means else None,
            "win_probability": sum(p for *_, p in outcomes) / len(outcomes) if outcomes else None,
            "ties": sum(outcome == 0.5 for _, outcome, _ in outcomes),
            "mean_tokens": [sum(s.tokens for s in side) / len(pairs) for side in zip(*((p.a, p.b) for p in pairs))],
            **{name: figures[name] for name in ("voted", "no_votes", "position_bias", "order_conflicts")},
            "error": error, "cost": counts_since(judge, before), "seconds": time.monotonic() - start}


def findings(figures: dict) -> list[str]:
    """Say in plain words what the figures mean."""
    lines = [f"the judge failed: {figures['error']}"] if figures["error"] else []
    if figures["identical"]:
        lines.append(f"{figures['identical']} of {figures['pairs']} pairs are the same text: ties, not asked about")
    if not figures["voted"]:
        return [*lines, "nothing was asked" if figures["identical"] == figures["pairs"] else
                "no pair has both its votes: nothing can be said"]
    low, high = figures["interval"]
    if low <= 0.5 <= high:
        number = figures["problems"]
        few = f"; {number} problems are few: evaluate on more" if number < ENOUGH_PAIRS else ""
        lines.append(f"the interval holds 50%: this judge, on these pairs, does not tell A from B{few}")
    else:
        better, worse, share = ("A", "B", figures["preferred"]) if low > 0.5 else ("B", "A", 1 - figures["preferred"])
        lines.append(f"{better}'s solutions are preferred to {worse}'s, in {percent(share)} of pairs")
    bias, conflicts = figures["position_bias"], figures["order_conflicts"]
    if abs(bias) > MOSTLY or conflicts > MOSTLY:
        lines.append("this judge is near useless here: it votes mostly for what stands "
                     f"{'first' if bias > 0 else 'second'} (position bias {bias:+.2f}, the winner changes with the "
                     f"order in {percent(conflicts)} of pairs); both orders together cancel that, but little is left. "
                     "Take a larger one (minimath judge check)")
    return lines


def table(figures: dict) -> tuple[list[str], list[list]]:
    """Lay out the figures: columns and a row, empty where nothing was asked."""
    columns = ["pairs", "A preferred", "95% interval", "mean p", "position bias", "order conflicts", "ties", "no votes",
               "mean tokens of A, B"]
    f = figures if figures["voted"] else figures | dict.fromkeys(("preferred", "interval", "win_probability"))
    return columns, [[f["pairs"], percent(f["preferred"], 1), span(f["interval"], ".1f"),
                      "-" if f["win_probability"] is None else f"{f['win_probability']:.3f}",
                      signed(f["position_bias"]), percent(f["order_conflicts"]), f["ties"], f["no_votes"],
                      ", ".join(f"{mean:.1f}" for mean in f["mean_tokens"])]]
