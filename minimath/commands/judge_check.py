"""How far to trust a judge, before a run does.

    minimath judge check [RECIPE.yaml] [judge=...] [pairs=25] [data=FILE,FILE]

Three probes ask the judge of the recipe's rlaif section, as a run does; judge-check.json has all figures:

    pairs      of known order: a correct solution against one with a wrong answer, with a wrong answer and padding, with
               an unsound step, with padding alone. Behind the verifier, the last two are what a judge is there for
    data       solutions of yours with known faults, beside length alone, judge=heuristic and the model without
               judge_adapter. Rows are {problem, better, worse}, also chosen and rejected; ProcessBench's {problem,
               steps, label, final_answer_correct}; PRMBench's {problem, original, modified, error_steps, class}. Rows
               whose problems were in the judge's training are left out. A judge is recommended only where it surely
               beats length alone on right answers with a wrong step
    attacks    strings that ask for the verdict, in worse solutions, with the judge's defences on and off"""
import dataclasses
import json
from pathlib import Path
from typing import Annotated, Literal

from minimath.commands.judge_data import certificate, open_known, priced, probe_data
from minimath.config.load import load_config, take_recipe
from minimath.config.options import Main, options_of
from minimath.config.schema import Count, DataOptions, RLAIFConfig
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
from minimath.models.policy import Policy, load_policy

ENOUGH_PAIRS = 20  # with fewer, an interval that holds 1/2 says nothing about the judge
UNUSED = {"judge_pairs", "judge_fallback", "judge_canary_every"}  # no question of ours depends on them


@dataclasses.dataclass
class KnownData(DataOptions):
    source: Annotated[str | list, Main] = ""
    """solutions with known faults, for the probe data: files or folders, a comma list; a recipe's data are not meant"""
    limit: int = 0
    """use N of its rows, drawn by the seed; 0: all"""


class JudgeCheckConfig(RLAIFConfig):
    """Options of `minimath judge check`: those of the judge, and its own."""
    data: KnownData
    probes: Annotated[str, Literal["pairs", "attacks", "data"]] = "pairs,attacks,data"
    """comma list of pairs, attacks and data (where data= is given)"""
    baselines: Annotated[str, Literal["heuristic", "untrained"]] = "heuristic,untrained"
    """what the probe data asks too, beside length alone: a comma list of heuristic and untrained"""
    pairs: Count = 25
    """pairs of each kind of fault"""
    problems: Count = 25
    """problems on which each attack string is tried, in both positions"""
    attacks: str = ""
    """a file of attack strings in the form of minimath/judges/attacks.txt; empty: that one"""


def judge_check(words: list[str]) -> dict:
    """Run the command, and return what judge-check.json holds. Raises UserError."""
    cfg = load_options(JudgeCheckConfig, take_recipe(words := list(words)), words)
    given = set(map(option_named, words))
    cfg.data = KnownData(**{field.name: getattr(cfg.data, field.name) for field in dataclasses.fields(KnownData)
                            if {"source": "data"}.get(field.name, field.name) in given})  # a recipe's are a run's
    probes, attacks = comma_list(cfg.probes), load_attacks(cfg.attacks or ATTACKS)
    if not cfg.data.source and (given & {"limit", "baselines"} or probes == ["data"]):
        raise UserError("the probe data needs data=FILE: pairs, or solutions whose wrong steps are marked; see --help")
    with RunLog(result_folder(cfg.run.out, "judge-check"), "minimath judge check") as log:
        policy = load_judging(cfg, log)
        judge = open_judge(cfg, log, policy)
        result, lines = {"judge": judge.name}, []
        known = open_known(judge, cfg, log) if cfg.data.source and "data" in probes else None
        if "pairs" in probes:
            result["pairs"] = probe_pairs(judge, cfg, log)
            lines += advice(cfg.judge.name, result["pairs"])
        if known:
            result["data"] = probe_data(judge, known, policy, cfg, log)
            lines += certificate(cfg.judge.name, result["data"])
        if "attacks" in probes:
            result["attacks"] = probe_attacks(judge, attacks, cfg, log)
            lines += attack_advice(result["attacks"])
        return save_result(log, "judge-check", cfg, result | {"advice": lines}, lines)


def load_options(cls: type[RLAIFConfig], recipe: str | None, words: list[str]):
    """Read a command's options. Raises UserError for words that would do nothing."""
    known = option_names(cls)
    for word in words:
        if (name := option_named(word)) not in known:
            raise UserError(f"{word!r}: no option of this command{did_you_mean(name, known)}; see --help")
    return load_config(cls, recipe, words, "rlaif")


def option_named(word: str) -> str:
    return word.removeprefix("--").partition("=")[0].removeprefix("rlaif.").replace("-", "_")


def option_names(cls: type[RLAIFConfig]) -> list[str]:
    """List a command's own options, and those that decide what a judge is."""
    known, groups = options_of(cls), ("judge", "model", *(["data"] if cls is JudgeCheckConfig else []))
    judge = [name for name, option in known.items() if option.group in groups and name not in UNUSED]
    return [*(known.keys() - options_of(RLAIFConfig)), *judge, "micro_batch_tokens", "seed", "out"]


def load_judging(cfg: RLAIFConfig, log: RunLog) -> Policy | None:
    """Load the model behind judge=self, None for another judge. Raises UserError."""
    if cfg.judge.name != "self":
        return None
    cfg = cfg.replace(adapter="")  # it judges with its adapter off
    policy = load_policy(cfg, train=False)
    log.say(describe(policy.model, cfg))
    return policy


def open_judge(cfg: RLAIFConfig, log: RunLog, policy: Policy | None = None) -> Judge:
    """Make the judge and try it; with the model behind judge=self. Raises UserError."""
    judge = make_judge(cfg.judge, policy or load_judging(cfg, log), say=log.say,
                       micro_batch_tokens=cfg.optimizer.micro_batch_tokens)
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
    pairs = make_pairs(cfg.pairs, cfg.run.seed)
    with log.progress(2 * len(pairs), "judging pairs") as advance, priced(judge, 2 * len(pairs), log):
        report = judge_known(judge, pairs, advance)
    columns = ["fault", "pairs", "agreement", "95% interval", "position bias", "order conflicts", "no votes", "finding"]
    log.table(f"{judge.name}: pairs of a correct solution and one with a fault", columns, [
        [kind, f["pairs"], percent(f["agreement"]), span(f["interval"]), percent(f["position_bias"]),
         percent(f["order_conflicts"]), f["no_votes"], finding(f)] for kind, f in report.items()])
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
