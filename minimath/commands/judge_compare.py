"""Which of two evaluations has the better solutions: minimath judge compare EVAL_A EVAL_B [RECIPE.yaml] [judge=...]

EVAL_A and EVAL_B are folders of `minimath eval` on the same problems. Their solutions are paired problem by problem and
shown to a judge in both orders, whose pull to a position is taken out, as in training; the first letter of the report
stands for the first folder. A judge that a model was trained with likes what that training rewarded: take another one.
With pairs=right, the default, both solutions are right, and what is judged is how they read (rubric-readability.txt).
Solutions of one text are ties and are not asked about. judge-compare.json keeps the figures, in EVAL_A/judge-compare
unless out= names another folder.
"""
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from minimath.config.load import config_dict, describe_config
from minimath.core.errors import UserError
from minimath.core.text import did_you_mean
from minimath.core.stats import bootstrap, by_text, in_common
from minimath.judges.judge import Candidate, Judge, both_orders
from minimath.judges.check import ENOUGH_PAIRS, judge_options, load_options, open_judge, option_name, result_folder
from minimath.judges.check import help_text as help_of_judges
from minimath.judges.pairs import KnownPair, ask, questions_of, tally, won
from minimath.core.log import RunLog, fmt_duration
from minimath.core.log import clean as jsonable
from minimath.core.files import write_whole
from minimath.grading.steps import StepCount

KEPT = {"right": lambda a, b: a and b, "same": lambda a, b: a == b, "all": lambda a, b: True}
MOSTLY = 0.5  # position bias or order conflicts from which on a judge votes by position more than by what it reads
COLUMNS = ["pairs", "A preferred", "95% interval", "mean p", "position bias", "order conflicts", "ties", "no votes",
           "mean tokens of A, B"]


@dataclass
class JudgeCompareConfig:
    """Options of `minimath judge compare` beside those of the judge."""
    pairs: str = "right"
    """which pairs: right (both right), same (both right or both wrong), all"""
    readers: int = 200
    """most pairs, taken evenly from all of them; 0: all"""


class Paired(NamedTuple):
    """The solutions of A and B to one problem; number: its place among the common problems."""
    number: int
    problem: str
    a: Candidate
    b: Candidate


# ---- pairs

def checked_records(folder: str | Path) -> list[dict]:
    """The records of an evaluation by problem and sample. UserError when the folder holds no complete evaluation."""
    path = Path(folder) / "completions.jsonl"
    if not path.is_file():
        raise UserError(f"{folder}: not an evaluation (no completions.jsonl in it); give a folder that minimath eval "
                        "has finished")
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


def as_shown(record: dict) -> Candidate:
    """A record as a judge gets it."""
    steps = StepCount(record["right_steps"], record["steps"])
    return Candidate(record["text"], bool(record["right"]), steps, record["tokens"])


def pair_up(ours: list[dict], theirs: list[dict], which: str = "right") -> list[Paired]:
    """The samples of each common problem paired in order, as far as both have one; `which` as in
    JudgeCompareConfig.pairs. UserError without a common problem or a pair."""
    if which not in KEPT:
        raise UserError(f"pairs={which!r}{did_you_mean(which, KEPT)}: use right, same or all")
    found = [Paired(number, problem, as_shown(a), as_shown(b))
             for number, (problem, of_a, of_b) in enumerate(in_common(ours, theirs))
             for a, b in zip(of_a, of_b, strict=False)]
    kept = [pair for pair in found if KEPT[which](pair.a.right, pair.b.right)]
    if not kept:
        raise UserError(f"pairs={which}: none of {len(found)} pairs is left (A is right in "
                        f"{sum(p.a.right for p in found)}, B in {sum(p.b.right for p in found)}); use pairs=all")
    return kept


def same_text(pair: Paired) -> bool:
    return pair.a.text.strip() == pair.b.text.strip()


def evenly(pairs: list, most: int) -> list:
    """At most `most` of the pairs, from the whole of the list; 0: all."""
    return pairs if not most or len(pairs) <= most else [pairs[k * len(pairs) // most] for k in range(most)]


# ---- figures

def read_pairs(judge: Judge, pairs: list[Paired], advance: Callable = lambda n: None) -> tuple[list[tuple], dict]:
    """Asks about each pair in both orders. Returns ((v(a, b), v(b, a)) per pair, None for no vote; facts): facts are
    those of judge_pairs.tally, with error, cost (what the counters of the judge grew by) and seconds."""
    before, start = dict(judge.counts), time.monotonic()
    votes, error = ask(judge, questions_of([KnownPair("compare", p.problem, p.a, p.b) for p in pairs]), advance)
    cost = {name: value - before.get(name, 0) for name, value in judge.counts.items() if name != "verdict_mass"}
    facts = tally(votes, judge.soft) | {"error": error, "cost": cost, "seconds": time.monotonic() - start}
    return list(zip(votes[::2], votes[1::2], strict=True)), facts


def win_shares(votes: list[tuple], soft: bool) -> list[float | None]:
    """p that A's solution is the better one, per pair; None without both votes."""
    return [None if None in pair else both_orders(*pair, soft) for pair in votes]


def compare_solutions(judge: Judge, pairs: list[Paired], seed: int = 0, advance: Callable = lambda n: None) -> dict:
    """Figures of A against B. preferred: mean over problems of the share of pairs in which A's solution is preferred
    with both orders together, 1/2 for a tie, and `interval`, its bootstrap 95% interval over problems; None without a
    vote. win_probability: mean of p. identical: pairs of one text, which count as ties; ties: with them, those that the
    judge cannot part. The others as in read_pairs, over the pairs asked about."""
    asked = [pair for pair in pairs if not same_text(pair)]
    votes, facts = read_pairs(judge, asked, advance)
    outcomes = [(pair.number, 0.5, 0.5) for pair in pairs if same_text(pair)]
    outcomes += [(pair.number, won(*vote), p) for pair, vote, p
                 in zip(asked, votes, win_shares(votes, judge.soft), strict=True) if p is not None]
    problems: dict[int, list[float]] = {}
    for number, outcome, _ in outcomes:
        problems.setdefault(number, []).append(outcome)
    means = [sum(of_one) / len(of_one) for of_one in problems.values()]
    kept = ("voted", "no_votes", "position_bias", "order_conflicts", "error", "cost", "seconds")
    return {"pairs": len(pairs), "identical": len(pairs) - len(asked), "problems": len(means),
            "preferred": sum(means) / len(means) if means else None,
            "interval": bootstrap(means, seed) if means else None,
            "win_probability": sum(p for *_, p in outcomes) / len(outcomes) if outcomes else None,
            "ties": sum(outcome == 0.5 for _, outcome, _ in outcomes),
            "mean_tokens": [sum(c.tokens for c in side) / len(pairs) for side in zip(*((p.a, p.b) for p in pairs))],
            **{name: facts[name] for name in kept}}


def findings(facts: dict) -> list[str]:
    """What the figures say, in plain words."""
    lines = [f"the judge failed: {facts['error']}"] if facts["error"] else []
    if facts["identical"]:
        lines.append(f"{facts['identical']} of {facts['pairs']} pairs are the same text: ties, not asked about")
    if not facts["voted"]:
        return [*lines, "nothing was asked" if facts["identical"] == facts["pairs"] else
                "no pair has both its votes: nothing can be said"]
    low, high = facts["interval"]
    if low <= 0.5 <= high:
        few = f"; {facts['problems']} problems are few: evaluate on more" if facts["problems"] < ENOUGH_PAIRS else ""
        lines.append(f"the interval holds 50%: this judge, on these pairs, does not tell A from B{few}")
    else:
        better, worse, share = ("A", "B", facts["preferred"]) if low > 0.5 else ("B", "A", 1 - facts["preferred"])
        lines.append(f"{better}'s solutions are preferred to {worse}'s, in {100 * share:.0f}% of pairs")
    bias, conflicts = facts["position_bias"], facts["order_conflicts"]
    if abs(bias) > MOSTLY or conflicts > MOSTLY:
        lines.append("this judge is near useless here: it votes mostly for what stands "
                     f"{'first' if bias > 0 else 'second'} (position bias {bias:+.2f}, the winner changes with the "
                     f"order in {100 * conflicts:.0f}% of pairs); both orders together cancel that, but little is "
                     "left. Take a larger one (minimath judge check)")
    return lines


# ---- the command

def judge_compare(folders: list[str | None], recipe: str | None, words: list[str]) -> dict:
    """The command: prints the table and what it says, writes judge-compare.json. Returns its contents. UserError."""
    if None in folders or len(folders) != 2:
        raise UserError("minimath judge compare needs two folders of evaluations: minimath judge compare EVAL_A EVAL_B "
                        "[judge=...]")
    cfg, own = load_options(JudgeCompareConfig, recipe, words)
    if own.pairs == "right" and not any(option_name(word) == "judge_rubric" for word in words):
        cfg.judge.rubric = "readability"  # which says that both are right
    if own.readers < 0:
        raise UserError(f"readers={own.readers}: the most pairs to read, or 0 for all")
    records = [checked_records(folder) for folder in folders]
    found = pair_up(*records, own.pairs)
    pairs = evenly(found, own.readers)
    out = result_folder(cfg.run.out or str(Path(folders[0]) / "judge-compare"), "judge-compare")
    with RunLog(out, "minimath judge compare") as log:
        for letter, folder, of_one in zip("AB", folders, records, strict=True):
            log.say(f"{letter}: {folder}, {len(by_text(of_one))} problems")
        log.say(f"{len(pairs)} of {len(found)} pairs (pairs={own.pairs})")
        judge, _, _ = open_judge(cfg, log)
        with log.progress(2 * sum(not same_text(pair) for pair in pairs), "judging") as advance:
            facts = compare_solutions(judge, pairs, cfg.run.seed, advance)
        rubric = "" if cfg.judge.name == "rules" else f", judge_rubric={cfg.judge.rubric}"
        log.table(f"{judge.name}{rubric}: A against B", COLUMNS, [table_row(facts)])
        spent = "".join(f", {value:.6g} {name}" for name, value in sorted(facts["cost"].items()) if value)
        log.say(f"cost: {fmt_duration(facts['seconds'])}{spent}")
        lines = findings(facts)
        for line in lines:
            log.say(line)
        options = {name: config_dict(cfg)[name] for name in judge_options()}
        result = {"a": folders[0], "b": folders[1], "judge": judge.name, "which": own.pairs, **facts,
                  "findings": lines, "options": options}
        write_whole(log.run_dir / "judge-compare.json", json.dumps(jsonable(result), indent=1) + "\n")
    return result


def table_row(facts: dict) -> list:
    """The row of the table whose columns are COLUMNS."""
    tokens = ", ".join(f"{mean:.1f}" for mean in facts["mean_tokens"])
    if not facts["voted"]:
        return [facts["pairs"], *["-"] * 5, facts["ties"], facts["no_votes"], tokens]
    low, high = facts["interval"]
    return [facts["pairs"], f"{100 * facts['preferred']:.1f}%", f"{100 * low:.1f} to {100 * high:.1f}",
            f"{facts['win_probability']:.3f}", f"{facts['position_bias']:+.2f}",
            f"{100 * facts['order_conflicts']:.0f}%", facts["ties"], facts["no_votes"], tokens]


def help_text() -> str:
    """All options of the judge commands with default and meaning."""
    lines = [help_of_judges(), "", "minimath judge compare EVAL_A EVAL_B [RECIPE.yaml] key=value ...", "",
             "compare (and those of `both` above; with pairs=right, judge_rubric=readability unless given):"]
    lines += [f"  {f'{name}={default}':<44} {kind:<6} {doc}"
              for name, kind, default, doc in describe_config(JudgeCompareConfig)]
    return "\n".join(lines)
