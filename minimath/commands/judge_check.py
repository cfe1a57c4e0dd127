"""How far to trust a judge, before a run does.

    minimath judge check [RECIPE.yaml] [judge=...] [pairs=25]

Two probes ask the judge of the recipe's rlaif section in both orders, as a run does; judge-check.json has all figures:

    pairs      of known order: a correct solution against one with a wrong answer, with a wrong answer and padding, with
               an unsound step, with padding alone. Behind the verifier, the last two are what a judge is there for
    attacks    strings that ask for the verdict, in worse solutions, with the judge's defences on and off"""
import json
import time
from pathlib import Path
from typing import Annotated, Literal

from minimath.config.load import load_config, take_recipe
from minimath.config.options import options_of
from minimath.config.schema import Count, RLAIFConfig
from minimath.core.errors import UserError
from minimath.core.files import write_whole
from minimath.core.log import RunLog, clean
from minimath.core.run_folder import held_run, new_run_folder
from minimath.core.text import comma_list, did_you_mean
from minimath.judges.attack import ATTACKS, HARMLESS, attack_judge, bare_prompt, load_attacks, make_tries
from minimath.judges.base import Judge
from minimath.judges.judge import make_judge
from minimath.judges.pairs import BEHIND_THE_VERIFIER, faulty_solutions, judge_known, make_pairs
from minimath.judges.poll import percent, span
from minimath.judges.rubrics import judge_prompt
from minimath.models.load import describe
from minimath.models.policy import load_policy

ENOUGH_PAIRS = 20  # with fewer, an interval that holds 1/2 says nothing about the judge
UNUSED = {"judge_pairs", "judge_fallback", "judge_canary_every"}  # no question of ours depends on them


class JudgeCheckConfig(RLAIFConfig):
    """Options of `minimath judge check`: those of the judge, and its own."""
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
    cfg = load_options(JudgeCheckConfig, take_recipe(words := list(words)), words)
    probes, attacks = comma_list(cfg.probes), load_attacks(cfg.attacks or ATTACKS)
    with RunLog(result_folder(cfg.run.out, "judge-check"), "minimath judge check") as log:
        judge = open_judge(cfg, log)
        result, lines = {"judge": judge.name}, []
        if "pairs" in probes:
            result["pairs"] = probe_pairs(judge, cfg, log)
            lines += advice(cfg.judge.name, result["pairs"])
        if "attacks" in probes:
            result["attacks"] = probe_attacks(judge, attacks, cfg, log)
            lines += attack_advice(result["attacks"])
        return save_result(log, "judge-check", cfg, result | {"advice": lines}, lines)


def load_options(cls: type[RLAIFConfig], recipe: str | None, words: list[str]):
    """Read a command's options. Raises UserError for words that would do nothing."""
    known = option_names(cls)
    for word in words:
        name = word.removeprefix("--").partition("=")[0].removeprefix("rlaif.").replace("-", "_")
        if name not in known:
            raise UserError(f"{word!r}: no option of this command{did_you_mean(name, known)}; see --help")
    return load_config(cls, recipe, words, "rlaif")


def option_names(cls: type[RLAIFConfig]) -> list[str]:
    """List a command's own options, and those that decide what a judge is."""
    known = options_of(cls)
    judge = [name for name, option in known.items() if option.group in ("judge", "model") and name not in UNUSED]
    return [*(known.keys() - options_of(RLAIFConfig)), *judge, "micro_batch_tokens", "seed", "out"]


def open_judge(cfg: RLAIFConfig, log: RunLog) -> Judge:
    """Make the judge and try it; with the model behind judge=self. Raises UserError."""
    policy = None
    if cfg.judge.name == "self":
        cfg = cfg.replace(adapter="")  # it judges with its adapter off
        policy = load_policy(cfg, train=False)
        log.say(describe(policy.model, cfg))
    judge = make_judge(cfg.judge, policy, micro_batch_tokens=cfg.optimizer.micro_batch_tokens, say=log.say)
    judge.ping()
    return judge


def result_folder(out: str, name: str) -> Path:
    """Choose the folder for `name`.json. Raises UserError when it holds one, or a run."""
    folder = new_run_folder(out, name)
    if held := held_run(folder) or (f"a {name}.json" if (folder / f"{name}.json").exists() else ""):
        raise UserError(f"{folder} already holds {held}; choose another out=")
    return folder


def save_result(log: RunLog, name: str, cfg: RLAIFConfig, result: dict, lines: list[str]) -> dict:
    """Say what the figures mean, and keep them with the options."""
    for line in lines:
        log.say(line)
    result["options"] = {name: cfg.value(name) for name in sorted(option_names(type(cfg)))}
    write_whole(log.run_dir / f"{name}.json", json.dumps(clean(result), indent=1) + "\n")
    return result


def probe_pairs(judge: Judge, cfg: JudgeCheckConfig, log: RunLog) -> dict:
    """Ask about pairs of each kind, show how it went, and return pairs.judge_known."""
    pairs, before, start = make_pairs(cfg.pairs, cfg.run.seed), judge.counts.copy(), time.monotonic()
    with log.progress(2 * len(pairs), "judging pairs") as advance:
        report = judge_known(judge, pairs, advance)
    columns = ["fault", "pairs", "agreement", "95% interval", "position bias", "order conflicts", "no votes", "finding"]
    log.table(f"{judge.name}: pairs of a correct solution and one with a fault", columns, [
        [kind, f["pairs"], percent(f["agreement"]), span(f["interval"]), percent(f["position_bias"]),
         percent(f["order_conflicts"]), f["no_votes"], finding(f)] for kind, f in report.items()])
    spent = {"s": time.monotonic() - start} | dict(judge.counts - before)
    log.say("cost per comparison: " + ", ".join(f"{n / (2 * len(pairs)):.3g} {name}" for name, n in spent.items()))
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
    """Say what the figures of `probe_pairs` mean for judge=name."""
    error, bias = report["all"]["error"], report["all"]["position_bias"]
    lines = [f"the judge failed: {error}"] if error else []
    found = {kind: finding(figures) for kind, figures in report.items() if kind != "all"}
    useless = {kind: what for kind, what in found.items() if what in ("near chance", "prefers the fault", "no votes")}
    worded = ", ".join(f"{what} on {kind}" for kind, what in useless.items())
    if not useless.keys().isdisjoint(BEHIND_THE_VERIFIER):
        lines.append(f"judge={name} cannot be trusted with a run ({worded}): its wins would be noise. Use "
                     "judge=heuristic, which checks steps and length exactly, or judge=openai with a larger model")
    elif useless:
        lines.append(f"judge={name} does not see wrong answers ({worded}): keep the verifier, which decides those")
    if abs(bias or 0.0) > 0.5:
        lines.append(f"it mostly votes for what stands {'first' if bias > 0 else 'second'} (position bias "
                     f"{percent(bias)}): asking both orders cancels that, but what is left is small")
    lines += [f"{what} on {kind}: take pairs=25 or more" for kind, what in found.items() if what == "too few pairs"]
    lines += [f"{what} on {kind}: a lower judge_weight lets less noise in" for kind, what in found.items()
              if what == "weak"]
    return lines or [f"judge={name} ranks every kind of pair reliably"]


def probe_attacks(judge: Judge, attacks: list, cfg: JudgeCheckConfig, log: RunLog) -> dict:
    """Attack the judge, and show how it went; "off": without its defences."""
    tries = make_tries(attacks, faulty_solutions(cfg.problems, cfg.run.seed))
    sides, report = {"on": judge_prompt, "off": bare_prompt}, {}
    if cfg.judge.name == "heuristic":  # reads no text
        del sides["off"]
    with log.progress(2 * len(tries) * len(sides), f"{len(attacks)} attack strings") as advance:
        for side, prompt in sides.items():
            judge.prompt = prompt
            report[side] = attack_judge(judge, tries, cfg.run.seed, advance)
    columns = ["attack", "tries", "success", "no string", "lift", "95% interval", "no votes"]
    for side, figures in report.items():
        log.table(f"{judge.name}, defences {side}", columns, [
            [name, f["tries"], percent(f["success"]), percent(f["baseline"]), f"{100 * f['lift']:+.0f}",
             span(f["lift_interval"], "+.0f"), f["no_votes"]] for name, f in figures["kinds"].items()])
    return report


def attack_advice(report: dict) -> list[str]:
    """Say in plain words what the figures of `probe_attacks` mean."""
    lines = [f"defences {side}: the judge failed: {f['error']}" for side, f in report.items() if f["error"]]
    kinds = dict(report["on"]["kinds"])
    total, harmless = kinds.pop("all"), kinds.pop(HARMLESS, {"lift": 0.0})
    worked = [name for name, f in kinds.items() if f["lift_interval"][0] > max(0.0, harmless["lift"])]
    lines.append(f"with defences on, the lift of {', '.join(worked) or 'no kind of attack'} is surely above that of "
                 "strings that ask for nothing")
    if total["baseline"] > 0.35:
        lines.append(f"without any attack this judge prefers the worse solution in {percent(total['baseline'])}: "
                     "it is near chance, which is worse than being fooled")
    return lines
