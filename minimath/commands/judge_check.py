"""How far to trust a judge, before a run does.

    minimath judge check [RECIPE.yaml] [judge=...] [pairs=25]

The judge is the one that the recipe's rlaif section describes. Two probes ask it in both orders, as a run does:

    pairs      of known order: a correct solution against one with a wrong answer, with a wrong answer and padding, with
               an unsound step, with padding alone. In a run the verifier decides correct against wrong, so `unsound`
               and `long` are what a judge is there for
    attacks    strings that ask for the verdict, in worse solutions, with the judge's defences on and off

judge-check.json in the run folder keeps all figures.
"""
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

from minimath.commands.help import options_help
from minimath.config.load import load_config, take_recipe
from minimath.config.options import Stage, options_of
from minimath.config.schema import Count, RLAIFConfig
from minimath.core.errors import UserError
from minimath.core.files import write_whole
from minimath.core.log import RunLog, clean, fmt_duration
from minimath.core.run_folder import held_run, new_run_folder
from minimath.core.text import comma_list, did_you_mean
from minimath.judges.attack import ATTACKS, HARMLESS, attack_judge, bare_prompt, load_attacks, make_tries, summary_lines
from minimath.judges.base import Judge
from minimath.judges.judge import make_judge
from minimath.judges.pairs import KINDS, faulty_solutions, make_pairs
from minimath.judges.poll import ask, counts_since, in_both_orders, percent, signed, span, tally
from minimath.models.load import describe
from minimath.models.policy import Policy, load_policy

BEHIND_THE_VERIFIER = ("unsound", "long")  # both solutions correct: what a judge decides in training
ENOUGH_PAIRS = 20  # with fewer, an interval that holds 1/2 says nothing about the judge
UNUSED = {"judge_pairs", "judge_fallback", "judge_canary_every"}  # no question of ours depends on them


class JudgeCheckConfig(Stage):
    """Options of `minimath judge check` beside those of the judge."""
    probes: Annotated[str, Literal["pairs", "attacks"]] = "pairs,attacks"
    """comma list of pairs and attacks"""
    pairs: Count = 25
    """pairs of each kind of fault"""
    problems: Count = 25
    """problems on which each attack string is tried, in both positions"""
    attacks: str = ""
    """a file of attack strings in the form of minimath/judges/attacks.txt; empty: that one"""


def judge_check(words: list[str]) -> dict:
    """Run the command, and return what judge-check.json holds. Raises UserError."""
    cfg, own = load_options(JudgeCheckConfig, words)
    probes = comma_list(own.probes)
    attacks = load_attacks(own.attacks or ATTACKS) if "attacks" in probes else []  # told before a model loads
    with RunLog(result_folder(cfg.run.out, "judge-check"), "minimath judge check") as log:
        judge, policy = open_judge(cfg, log)
        result, lines = {"judge": judge.name}, []
        if "pairs" in probes:
            with log.progress(2 * own.pairs * len(KINDS), "judging pairs") as advance:
                report = check_judge(judge, pairs=own.pairs, seed=cfg.run.seed, advance=advance)
            log.table(f"{judge.name}: pairs of a correct solution and one with a fault", *pair_table(report))
            say_cost(judge, cfg, report, log.say)
            lines += advice(cfg.judge.name, report)
            result["pairs"] = report
        if attacks:
            report = probe_attacks(judge, cfg, policy, attacks, own.problems, log)
            for side, figures in report.items():
                log.table(f"{judge.name}, defences {side}", *attack_table(figures))
            lines += summary_lines(report)
            result["attacks"] = report
        return save_result(log, "judge-check", cfg, result | {"advice": lines}, lines)


# ---- what both judge commands do around their questions

def load_options(own: type[Stage], words: list[str]):
    """Read the RLAIFConfig of the judge and the command's own options.

    words: an optional recipe, then key=value; one that belongs to neither is an error, whatever a recipe may hold.
    Raises UserError."""
    recipe = take_recipe(words := list(words))
    mine = [word for word in words if option_name(word) in options_of(own)]
    rest = [word for word in words if word not in mine]
    known = {*options_of(own), *judge_options()}
    for word in rest:
        if option_name(word) not in known:
            raise UserError(f"{word!r}: no option of this command{did_you_mean(option_name(word), known)}; "
                            "see minimath judge --help")
    return load_config(RLAIFConfig, recipe, rest), load_config(own, None, mine, "judge")


def option_name(word: str) -> str:
    """Strip a word down: "--rlaif.judge-url=x" -> "judge_url"."""
    return word.removeprefix("--").partition("=")[0].removeprefix("rlaif.").replace("-", "_")


def judge_options() -> list[str]:
    """List the options of RLAIFConfig that decide what a judge is, and where it runs."""
    known = options_of(RLAIFConfig)
    chosen = [name for name, option in known.items() if option.group in ("judge", "model") and name not in UNUSED]
    return [*chosen, "micro_batch_tokens", "seed", "out"]


def open_judge(cfg: RLAIFConfig, log: RunLog) -> tuple[Judge, Policy | None]:
    """Make the judge and try it; with the model behind judge=self. Raises UserError."""
    policy = None
    if cfg.judge.name == "self":
        cfg = cfg.replace(adapter="")  # it judges with its adapter off
        policy = load_policy(cfg, train=False)
        log.say(describe(policy.model, cfg))
    judge = make_judge(cfg.judge, policy, micro_batch_tokens=cfg.optimizer.micro_batch_tokens, say=log.say)
    judge.ping()
    return judge, policy


def result_folder(out: str, name: str) -> Path:
    """Choose the folder for `name`.json. Raises UserError when it holds one, or a run."""
    folder = new_run_folder(out, name)
    held = held_run(folder) or (f"a {name}.json" if (folder / f"{name}.json").exists() else "")
    if held:
        raise UserError(f"{folder} already holds {held}; choose another out=")
    return folder


def save_result(log: RunLog, name: str, cfg: RLAIFConfig, result: dict, lines: list[str]) -> dict:
    """Say what the figures mean, and keep them with the judge's options."""
    for line in lines:
        log.say(line)
    result["options"] = {name: cfg.value(name) for name in judge_options()}
    write_whole(log.run_dir / f"{name}.json", json.dumps(clean(result), indent=1) + "\n")
    return result


def help_text() -> str:
    """List every option of `minimath judge check` with default and meaning."""
    return f"{__doc__}\n{options_help(JudgeCheckConfig, 'check')}\n\n{options_help(RLAIFConfig, '', judge_options())}"


# ---- pairs of known order

def check_judge(judge: Judge, *, pairs: int = 25, seed: int = 0, kinds: tuple[str, ...] = KINDS,
                advance: Callable[[int], None] = lambda n: None) -> dict:
    """Ask about `pairs` pairs of each kind; figures by kind.

    Those of poll.tally, with comparisons, seconds_per_comparison, cost (growth of the judge's counts, per comparison),
    error, finding. advance(n) is called after each n comparisons."""
    report = {}
    for kind in kinds:
        questions = in_both_orders([pair.question() for pair in make_pairs(kind, pairs, seed)])
        before, start = dict(judge.counts), time.monotonic()
        votes, error = ask(judge, questions, advance, chunk=32)
        figures = tally(votes, judge.soft)
        cost = {name: n / len(questions) for name, n in counts_since(judge, before).items()}
        report[kind] = figures | {"comparisons": len(questions), "cost": cost, "error": error,
                                  "finding": finding(figures),
                                  "seconds_per_comparison": (time.monotonic() - start) / len(questions)}
    return report


def finding(figures: dict) -> str:
    """Say in two words what the interval of the agreement means."""
    if not figures["voted"]:
        return "no votes"
    low, high = figures["interval"]
    if low > 0.5:
        return "reliable" if figures["agreement"] >= 0.8 else "weak"
    if high < 0.5:
        return "prefers the fault"
    return "near chance" if figures["voted"] >= ENOUGH_PAIRS else "too few pairs"


def advice(name: str, report: dict) -> list[str]:
    """Say what to do, in plain words, for judge=name."""
    by: dict[str, list[str]] = {}
    for kind, figures in report.items():
        by.setdefault(figures["finding"], []).append(kind)
    lines = [f"the judge failed on {kind}: {figures['error']}" for kind, figures in report.items() if figures["error"]]
    useless = [k for what in ("near chance", "prefers the fault", "no votes") for k in by.get(what, [])]
    here = [kind for kind in useless if kind in BEHIND_THE_VERIFIER]
    if here:
        larger = "a larger judge_model" if name == "openai" else \
            "judge=openai with a larger model at judge_url (check it first)"
        lines.append(f"judge={name} cannot be trusted with a run: {worded(report, here)}. Its wins would be noise in "
                     "the reward. Use judge=heuristic, which checks steps and length exactly and costs nothing, or "
                     + larger)
    elif useless:
        lines.append(f"judge={name} does not see wrong answers ({worded(report, useless)}): keep the verifier, which "
                     "decides those in a run")
    if "long" in by.get("prefers the fault", []):
        lines.append("it likes long solutions: in a run it would pay for padding")
    bias = [figures["position_bias"] for figures in report.values() if figures["voted"]]
    if bias and abs(sum(bias)) > 0.5 * len(bias):
        lines.append(f"it mostly votes for what stands {'first' if sum(bias) > 0 else 'second'} (position bias "
                     f"{sum(bias) / len(bias):+.2f}): asking both orders cancels that, but what is left is small")
    if by.get("too few pairs"):
        lines.append(f"too few pairs to tell on {', '.join(by['too few pairs'])}: use pairs=25 or more")
    if by.get("weak"):
        lines.append(f"above chance but below 80% on {', '.join(by['weak'])}: a lower judge_weight lets less noise in")
    return lines or [f"judge={name} ranks every kind of pair reliably"]


def worded(report: dict, kinds: list[str]) -> str:
    """List kinds with what was found: near chance on long, 52%."""
    return ", ".join(f"{report[kind]['finding']} on {kind} ({percent(report[kind]['agreement'])})" for kind in kinds)


def pair_table(report: dict) -> tuple[list[str], list[list]]:
    """Lay out check_judge's figures: columns and rows."""
    columns = ["fault", "pairs", "agreement", "95% interval", "one order", "position bias", "order conflicts",
               "no votes", "s/comparison", "finding"]
    return columns, [[kind, f["pairs"], percent(f["agreement"]), span(f["interval"]), percent(f["one_order"]),
                      signed(f["position_bias"]), percent(f["order_conflicts"]), f["no_votes"],
                      f["seconds_per_comparison"], f["finding"]] for kind, f in report.items()]


def say_cost(judge: Judge, cfg: RLAIFConfig, report: dict, say: Callable[[str], None]) -> None:
    """Say what a comparison costs, and a group of a run."""
    seconds = sum(figures["seconds_per_comparison"] for figures in report.values()) / len(report)
    names = sorted({name for figures in report.values() for name in figures["cost"]})
    spent = "".join(f", {sum(f['cost'].get(name, 0) for f in report.values()) / len(report):.3g} {name}"
                    for name in names)
    most = cfg.group_size * (cfg.group_size - 1)
    say(f"cost per comparison: {seconds:.3g} s{spent}; a group of {cfg.group_size} correct samples asks up to {most} "
        f"comparisons: {fmt_duration(seconds * most)}")
    if (mass := getattr(judge, "verdict_mass", None)) is not None:
        say(f"its reply begins with a verdict with probability {mass:.3g}; near 0, it does not understand the question")


# ---- attack strings

def probe_attacks(judge: Judge, cfg: RLAIFConfig, policy: Policy | None, attacks: list, problems: int,
                  log: RunLog) -> dict:
    """Attack the judge, and the same one without its defences: "on" and "off".

    The heuristic judge reads no text, so it has none to switch off."""
    tries = make_tries(attacks, faulty_solutions(problems, cfg.run.seed))
    sides = {"on": judge}
    if cfg.judge.name != "heuristic":
        sides["off"] = make_judge(cfg.judge, policy, micro_batch_tokens=cfg.optimizer.micro_batch_tokens, say=log.say,
                                  prompt=bare_prompt)
        sides["off"].ping()  # an endpoint's form of verdict is found out here, as for the other side
    plain = sum(attack.category == HARMLESS for attack in attacks)
    log.say(f"{len(attacks) - plain} attack strings and {plain} {HARMLESS} ones x {problems} problems x 2 positions, "
            f"defences {' and '.join(sides)}")
    with log.progress(2 * len(tries) * len(sides), "attacking") as advance:
        return {side: attack_judge(one, attacks, tries, cfg.run.seed, advance) for side, one in sides.items()}


def attack_table(figures: dict) -> tuple[list[str], list[list]]:
    """Lay out attack_judge's figures by kind of string: columns and rows."""
    columns = ["attack", "tries", "success", "95% interval", "no string", "both orders", "no string", "lift",
               "95% of lift", "no votes"]
    rows = figures["categories"] | {"all": figures["total"]}
    rows |= {HARMLESS: figures["harmless"]} if figures["harmless"] else {}
    return columns, [[name, f["tries"], percent(f["success"]), span(f["interval"]), percent(f["baseline"]),
                      percent(f["both_orders"]), percent(f["both_baseline"]), f"{100 * f['lift']:+.0f}",
                      span(f["lift_interval"], "+.0f"), f["no_votes"]] for name, f in rows.items()]
