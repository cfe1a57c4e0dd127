"""How far to trust a judge, before a run does: minimath judge check [RECIPE.yaml] [judge=...] [pairs=25]

Pairs of known order (judge_pairs.py): a right solution against one with a wrong answer, with a wrong answer and
padding, with an unsound step, with padding alone. Each pair is asked in both orders, as in training. In a run the
answer gate decides right against wrong, so `unsound` and `long` are what a judge is there for. The judge is the one
that the recipe's rlaif section describes; judge-check.json keeps the figures.
"""
import dataclasses
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from minimath.config.load import config_dict, describe_config, fields_of, load_config
from minimath.config.schema import ModelConfig, RLAIFConfig
from minimath.core.errors import UserError
from minimath.core.text import did_you_mean
from minimath.judges.judge import Judge, make_judge
from minimath.judges.pairs import KINDS, ask, faulty_solutions, make_pairs, questions_of, tally
from minimath.core.log import RunLog, fmt_duration
from minimath.core.log import clean as jsonable
from minimath.models.load import describe, load_model
from minimath.core.files import write_whole
from minimath.core.run import held_run, new_run_folder

BEHIND_THE_GATE = ("unsound", "long")  # both candidates right: what a judge decides in training
ENOUGH_PAIRS = 20  # with fewer, an interval that holds 1/2 says nothing about the judge
UNUSED = {"adapter", "prompt_template", "system", "judge_plan", "judge_fallback"}  # no pair of ours depends on them
COLUMNS = ["fault", "pairs", "agreement", "95% interval", "one order", "position bias", "order conflicts", "no votes",
           "s/comparison", "finding"]


@dataclass
class JudgeCheckConfig:
    """Options of `minimath judge check` beside those of the judge."""
    pairs: int = 25
    """pairs of each kind of fault"""


# ---- figures and findings

def check_judge(judge: Judge, *, pairs: int = 25, seed: int = 0, kinds: tuple[str, ...] = KINDS,
                advance: Callable = lambda n: None) -> dict:
    """kind -> `tally`, with seconds per comparison, cost (each counter of the judge, per comparison), error, finding.

    advance(n) is called after each n comparisons.
    """
    report = {}
    for kind in kinds:
        questions = questions_of(make_pairs(kind, pairs, seed))
        before, start = dict(judge.counts), time.monotonic()
        votes, error = ask(judge, questions, advance)
        facts = tally(votes, judge.soft)
        cost = {name: (value - before.get(name, 0)) / len(questions) for name, value in judge.counts.items()
                if name != "verdict_mass"}
        report[kind] = facts | {"comparisons": len(questions), "cost": cost, "error": error, "finding": finding(facts),
                                "seconds_per_comparison": (time.monotonic() - start) / len(questions)}
    return report


def finding(facts: dict) -> str:
    """What the interval of the agreement says, in two words."""
    if not facts["voted"]:
        return "no votes"
    low, high = facts["interval"]
    if low > 0.5:
        return "reliable" if facts["agreement"] >= 0.8 else "weak"
    if high < 0.5:
        return "prefers the fault"
    return "near chance" if facts["voted"] >= ENOUGH_PAIRS else "too few pairs"


def advice(kind_of_judge: str, report: dict) -> list[str]:
    """What to do, in plain words, for judge=kind_of_judge."""
    lines, by = [], {}
    for kind, facts in report.items():
        by.setdefault(facts["finding"], []).append(kind)
        if facts["error"]:
            lines.append(f"the judge failed on {kind}: {facts['error']}")
    useless = [k for name in ("near chance", "prefers the fault", "no votes") for k in by.get(name, [])]
    here = [kind for kind in useless if kind in BEHIND_THE_GATE]
    if here:
        larger = "a larger judge_model" if kind_of_judge == "openai" else \
            "judge=openai with a larger model at judge_url (check it first)"
        lines.append(f"judge={kind_of_judge} cannot be trusted with a run: {worded(report, here)}. Its wins would be "
                     f"noise in the reward. Use judge=heuristic, which checks steps and length exactly and costs nothing, "
                     f"or {larger}")
    elif useless:
        lines.append(f"judge={kind_of_judge} does not see wrong answers ({worded(report, useless)}): keep the answer "
                     "gate, which decides those in a run")
    if "long" in by.get("prefers the fault", []):
        lines.append("it likes long solutions: in a run it would pay for padding")
    bias = [facts["position_bias"] for facts in report.values() if facts["voted"]]
    if bias and abs(sum(bias)) > 0.5 * len(bias):
        lines.append(f"it mostly votes for what stands {'first' if sum(bias) > 0 else 'second'} (position bias "
                     f"{sum(bias) / len(bias):+.2f}): asking both orders cancels that, but what is left is small")
    if by.get("too few pairs"):
        lines.append(f"too few pairs to tell on {', '.join(by['too few pairs'])}: use pairs=25 or more")
    if by.get("weak"):
        lines.append(f"above chance but below 80% on {', '.join(by['weak'])}: a lower judge_weight lets less noise in")
    return lines or [f"judge={kind_of_judge} ranks every kind of pair reliably"]


def worded(report: dict, kinds: list[str]) -> str:
    """"near chance on long (52%), unsound (48%)"."""
    groups: dict[str, list[str]] = {}
    for kind in kinds:
        facts = report[kind]
        share = f" ({100 * facts['agreement']:.0f}%)" if facts["voted"] else ""
        groups.setdefault(facts["finding"], []).append(kind + share)
    return "; ".join(f"{name} on {', '.join(members)}" for name, members in groups.items())


# ---- the command

def load_options(own, recipe: str | None, words: list[str]):
    """(RLAIFConfig of the judge, `own` filled): words that belong to neither are errors, whatever a recipe holds."""
    mine = [word for word in words if option_name(word) in fields_of(own)]
    rest = [word for word in words if word not in mine]
    known = {**fields_of(own), **dict.fromkeys(judge_options())}
    for word in rest:
        if option_name(word) not in known:
            raise UserError(f"{word!r}: no option of this command{did_you_mean(option_name(word), known)}; "
                            "see minimath judge --help")
    return load_config(RLAIFConfig, recipe, rest), load_config(own, None, mine)


def help_text() -> str:
    """All options of both judge commands with default and meaning."""
    from minimath.judges.attack import JudgeAttackConfig
    lines = ["minimath judge check  [RECIPE.yaml] key=value ...", "minimath judge attack [RECIPE.yaml] key=value ..."]
    judge = [row for row in describe_config(RLAIFConfig) if row[0] in judge_options()]
    for title, rows in (("check:", describe_config(JudgeCheckConfig)), ("attack:", describe_config(JudgeAttackConfig)),
                        ("both:", judge)):
        lines += ["", title, *(f"  {f'{name}={default}':<44} {kind:<6} {doc}" for name, kind, default, doc in rows)]
    return "\n".join(lines)


def option_name(word: str) -> str:
    """"--rlaif.judge-url=x" -> "judge_url"."""
    return word.removeprefix("--").partition("=")[0].removeprefix("rlaif.").replace("-", "_")


def judge_options() -> list[str]:
    """The options of RLAIFConfig that decide what a judge is and where it runs."""
    names = [name for name in fields_of(RLAIFConfig) if name.startswith("judge") and "canary" not in name]
    return [name for name in (*names, "micro_batch_tokens", *fields_of(ModelConfig)) if name not in UNUSED]


def open_judge(cfg: RLAIFConfig, log: RunLog):
    """(judge, model, tokenizer); the last two are None unless the judge is the model itself. Raises UserError."""
    model = tokenizer = None
    if cfg.judge.name == "self":
        cfg = cfg.replace(adapter="")  # it judges with its adapter off
        model, tokenizer = load_model(cfg, train=False)
        log.say(describe(model, cfg))
    judge = make_judge(cfg, model, tokenizer)
    judge.ping()
    return judge, model, tokenizer


def result_folder(out: str, name: str) -> Path:
    """The folder for a result `name`.json; UserError when it holds one, or a run."""
    folder = new_run_folder(out, name)
    held = held_run(folder) or (f"a {name}.json" if (folder / f"{name}.json").exists() else "")
    if held:
        raise UserError(f"{folder} already holds {held}; choose another out=")
    return folder


def judge_check(recipe: str | None, words: list[str]) -> dict:
    """The command: prints the table and the advice, writes judge-check.json. Returns its contents. UserError."""
    cfg, own = load_options(JudgeCheckConfig, recipe, words)
    total = 2 * own.pairs * len(KINDS)
    faulty_solutions(own.pairs, cfg.run.seed)  # a wrong number of pairs is told before a model loads
    with RunLog(result_folder(cfg.run.out, "judge-check"), "minimath judge check") as log:
        judge, _, _ = open_judge(cfg, log)
        with log.progress(total, "judging") as advance:
            report = check_judge(judge, pairs=own.pairs, seed=cfg.run.seed, advance=advance)
        log.table(f"{judge.name}: pairs of a right solution and one with a fault", COLUMNS,
                  [table_row(kind, facts) for kind, facts in report.items()])
        seconds = sum(facts["seconds_per_comparison"] for facts in report.values()) / len(report)
        log.say(f"cost per comparison: {seconds:.3g} s{worded_cost(report)}; a group of {cfg.group_size} right "
                f"candidates asks up to {cfg.group_size * (cfg.group_size - 1)} comparisons: "
                f"{fmt_duration(seconds * cfg.group_size * (cfg.group_size - 1))}")
        if (mass := judge.counts.get("verdict_mass")) is not None:
            log.say(f"its reply begins with a verdict with probability {mass:.3g}; near 0, it does not understand the "
                    "question")
        lines = advice(cfg.judge.name, report)
        for line in lines:
            log.say(line)
        options = {name: config_dict(cfg)[name] for name in judge_options()}
        result = {"judge": judge.name, "pairs": own.pairs, "options": options, "kinds": report, "advice": lines}
        write_whole(log.run_dir / "judge-check.json", json.dumps(jsonable(result), indent=1) + "\n")
    return result


def table_row(kind: str, facts: dict) -> list:
    """One row of the table whose columns are COLUMNS."""
    if not facts["voted"]:
        return [kind, facts["pairs"], *["-"] * 5, facts["no_votes"], facts["seconds_per_comparison"], facts["finding"]]
    low, high = facts["interval"]
    return [kind, facts["pairs"], f"{100 * facts['agreement']:.0f}%", f"{100 * low:.0f} to {100 * high:.0f}",
            f"{100 * facts['one_order']:.0f}%", f"{facts['position_bias']:+.2f}",
            f"{100 * facts['order_conflicts']:.0f}%", facts["no_votes"], facts["seconds_per_comparison"],
            facts["finding"]]


def worded_cost(report: dict) -> str:
    """", 1 prompts, 412 prompt_tokens": means over the kinds of what the judge counted."""
    names = {name for facts in report.values() for name in facts["cost"]}
    means = {name: sum(facts["cost"].get(name, 0.0) for facts in report.values()) / len(report) for name in names}
    return "".join(f", {value:.3g} {name}" for name, value in sorted(means.items()) if value)
