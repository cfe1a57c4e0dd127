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
import contextlib
import dataclasses
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from minimath.config.load import load_config, take_recipe
from minimath.config.options import Main, options_of
from minimath.config.schema import Count, DataOptions, RLAIFConfig
from minimath.config.trained import as_trained
from minimath.core.errors import UserError
from minimath.core.files import write_whole
from minimath.core.log import RunLog, clean
from minimath.core.run_folder import held_run, new_run_folder
from minimath.core.text import comma_list, did_you_mean, mask
from minimath.data.examples import describe_report
from minimath.eval.evaluate import load_and_say
from minimath.judges.attack import ATTACKS, HARMLESS, attack_judge, bare_prompt, load_attacks, make_tries
from minimath.judges.base import Judge
from minimath.judges.certify import Answers, ask_known, figures_of, heuristic, length_alone, questions_of
from minimath.judges.compare import TALLY, percent, span, tally_cells
from minimath.judges.judge import make_judge
from minimath.judges.known import HIDDEN, KnownRows, read_known
from minimath.judges.pairs import BEHIND_THE_VERIFIER, faulty_solutions, judge_known, make_pairs
from minimath.judges.rubrics import judge_prompt
from minimath.models.policy import Policy

ENOUGH_ROWS = 20  # right answers with a wrong step: with fewer a judge is neither recommended nor refused
ENOUGH_PAIRS = 20  # with fewer, an interval that holds 1/2 says nothing about the judge
DOUBTS = {"too few pairs": "take pairs=25 or more", "weak": "a lower judge_weight lets less noise in"}
UNUSED = {"judge_pairs", "judge_fallback", "judge_canary_every", "judge_refresh", "judge_refresh_steps",
          "judge_refresh_lr"}  # no question of ours depends on them


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
    cfg = cfg.replace(**{name: option.default for name, option in options_of(JudgeCheckConfig).items()
                         if option.group == "data" and name not in given})  # a recipe's are a run's
    if not (probes := comma_list(cfg.probes)):
        raise UserError("probes= names none: use pairs, attacks and data")
    if idle := [name for name in ("data", "attacks") if name in given and name not in probes]:
        raise UserError(f"{idle[0]}= is for the probe {idle[0]}, which probes={cfg.probes} leaves out: name it there")
    if not cfg.data.source and (given & {"limit", "baselines"} or "probes" in given and "data" in probes):
        raise UserError("the probe data needs data=FILE: pairs, or solutions whose wrong steps are marked; see --help")
    attacks = load_attacks(cfg.attacks or ATTACKS)
    with RunLog(result_folder(cfg.run.out, "judge-check"), "minimath judge check") as log:
        judge, policy = open_judge(cfg, log)
        result, lines = {"judge": judge.name}, []
        known, held_out = open_known(judge, cfg, log) if cfg.data.source and "data" in probes else (None, "")
        if "pairs" in probes:
            result["pairs"] = probe_pairs(judge, cfg, log)
            lines += advice(cfg.judge.name, result["pairs"])
        if known:
            result["data"] = probe_data(judge, known, policy, cfg, log) | {"held_out": held_out}
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
            raise UserError(f"{mask(word)!r}: no option of this command{did_you_mean(name, known)}; see --help")
    cfg = load_config(cls, recipe, words, "rlaif")
    return as_trained(cfg.replace(adapter=cfg.judge.adapter)).replace(adapter="")  # it judges on the base it has


def option_named(word: str) -> str:
    return word.removeprefix("--").partition("=")[0].removeprefix("rlaif.").replace("-", "_")


def option_names(cls: type[RLAIFConfig]) -> set[str]:
    """List a command's own options, and those that decide what a judge is."""
    known, groups = options_of(cls), ("judge", "model", *(["data"] if cls is JudgeCheckConfig else []))
    judge = {name for name, option in known.items() if option.group in groups} - UNUSED
    return (known.keys() - options_of(RLAIFConfig)) | judge | {"micro_batch_tokens", "seed", "out"}


def open_judge(cfg: RLAIFConfig, log: RunLog) -> tuple[Judge, Policy | None]:
    """Make and try the judge; returns also the model behind judge=self. UserError."""
    policy = None
    if cfg.judge.name == "self":
        policy = load_and_say(cfg, log)
    judge = make_judge(cfg.judge, policy, say=log.say, micro_batch_tokens=cfg.optimizer.micro_batch_tokens)
    judge.ping()
    return judge, policy


def result_folder(out: str, name: str) -> Path:
    """Choose the folder for `name`.json. Raises UserError when it holds one, or a run."""
    folder = new_run_folder(out, name)
    held = held_run(folder)
    if held or (folder / f"{name}.json").exists():
        raise UserError(f"{folder} already holds {held.value if held else f'a {name}.json'}; choose another out=")
    return folder


def save_result(log: RunLog, name: str, cfg: RLAIFConfig, result: dict, lines: list[str]) -> dict:
    """Say what the figures mean, and keep them with the options."""
    for line in lines:
        log.say(line)
    result["options"] = {option: cfg.value(option) for option in sorted(option_names(type(cfg)))}
    write_whole(log.run_dir / f"{name}.json", json.dumps(clean(result), indent=1) + "\n")
    return result


def probe_pairs(judge: Judge, cfg: JudgeCheckConfig, log: RunLog) -> dict:
    """Ask about pairs of each kind, show how it went, and return pairs.judge_known."""
    pairs = make_pairs(cfg.pairs, cfg.run.seed)
    with log.progress(2 * len(pairs), "judging pairs") as advance, priced(judge, 2 * len(pairs), log):
        report = judge_known(judge, pairs, advance)
    log.table(f"{judge.name}: pairs of a correct solution and one with a fault",
              ["fault", *TALLY, "no votes", "finding"],
              [[kind, *tally_cells(f), f["no_votes"], finding(f)] for kind, f in report.items()])
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
    for doubt, then in DOUBTS.items():
        lines += [f"{what} on {kind}: {then}" for kind, what in found.items() if what == doubt]
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
    if (lost := total["no_votes"] / (2 * total["tries"])) > 0.5:
        return [*lines, f"attacks: {percent(lost)} of the questions have no vote, nothing can be said"]
    worked = [name for name, f in kinds.items() if f["lift_interval"][0] > max(0.0, harmless["lift"])]
    lines.append(f"with defences on, the lift of {', '.join(worked) or 'no kind of attack'} is surely above that of "
                 "strings that ask for nothing")
    if total["baseline"] > 0.35:
        lines.append(f"without any attack this judge prefers the worse solution in {percent(total['baseline'])}: "
                     "it is near chance, which is worse than being fooled")
    return lines


# ---- data of known faults

@contextlib.contextmanager
def priced(judge: Judge, questions: int, log: RunLog, what: str = "cost per comparison") -> Iterator[dict]:
    """Say what each of some questions cost; the dict that it yields then holds it."""
    before, start, cost = judge.counts.copy(), time.monotonic(), {}
    yield cost
    spent = {"s": time.monotonic() - start} | dict(judge.counts - before)
    cost.update((name, n / max(1, questions)) for name, n in spent.items())
    log.say(f"{what}: " + ", ".join(f"{n:.3g} {name}" for name, n in cost.items()))


def open_known(judge: Judge, cfg: RLAIFConfig, log: RunLog) -> tuple[KnownRows, str]:
    """Read data=; say what is there, and say and return if the judge trained on it."""
    trained_on = set(judge.card.problems) if cfg.judge.adapter else set()
    known = read_known(cfg.data, cfg.run.seed, trained_on)
    if known.report.skipped:
        log.say(describe_report(known.report))
    left = known.rows - known.left_out
    drawn = f" of {left}, drawn by seed={cfg.run.seed}" if known.drawn < left else ""
    kinds = ", ".join(f"{count} {kind}" for kind, count in known.kinds().items())
    paired = len({place for pair in known.pairs for place in pair[1:]})
    log.say(f"data: {known.drawn} rows{drawn}; solutions with a label: {kinds or 'none'}; {len(known.pairs)} pairs "
            f"within a problem, of {paired} of {len(known.solutions)} solutions")
    if not cfg.judge.adapter:
        return known, ""
    held_out = f"none of the {known.problems} problems was in the judge's training (by hashes)"
    if known.left_out:
        held_out = f"{known.left_out} of {known.rows} rows left out: their problems were in the judge's training"
    if not trained_on:
        held_out = "judge.json names no problems: whether these were in the judge's training is not known"
    log.say(held_out)
    return known, held_out


def probe_data(judge: Judge, known: KnownRows, policy: Policy | None, cfg: RLAIFConfig, log: RunLog) -> dict:
    """Ask the judge and what it has to beat; show and return certify.figures_of each."""
    def ask(one: Judge, name: str) -> tuple[Answers, dict]:
        if one.name == "heuristic":  # which the data tell no answers
            return heuristic(known), {}
        count = questions_of(one, known)
        with (log.progress(count, f"{name}: data") as advance,
              priced(one, count, log, f"{name}: cost per question") as cost):
            return ask_known(one, known, name, advance), cost

    judges = [ask(judge, judge.name), (length_alone(known), {})]
    baselines = comma_list(cfg.baselines)
    if "heuristic" in baselines and judge.name != "heuristic":
        judges.append((heuristic(known), {}))
    if "untrained" in baselines and cfg.judge.adapter:
        options = dataclasses.replace(cfg.judge, adapter="", form=judge.form)
        plain = make_judge(options, policy, micro_batch_tokens=cfg.optimizer.micro_batch_tokens, say=log.say)
        plain.reader = judge.reader  # the same prompts
        judges.append(ask(plain, "untrained"))
    report = {one.name: figures_of(one, judges[1][0], known, cfg.run.seed) | {"cost": cost} for one, cost in judges}
    show(report, log)
    read = {name: getattr(known, name) for name in ("rows", "problems", "left_out", "drawn")}
    return {"judges": report, **read, "kinds": dict(known.kinds()), "skipped": dict(known.report.skipped)}


def show(report: dict, log: RunLog) -> None:
    """Print tables of figures, a line for each judge on each kind of rows."""
    own = next(iter(report.values()))

    def table(title: str, name: str, columns: list[str], cells) -> None:
        if own.get(name):
            log.table(title, [*columns], [[kind, judge, *cells(figures[name][kind])] for kind in own[name]
                                          for judge, figures in report.items() if kind in figures.get(name, {})])

    table("pairs of a sound and a faulty solution: which is better", "pairs",
          ["fault", "judge", "pairs", "agreement", "95% interval", "above length", "95% interval", "like lengths",
           "position bias", "order conflicts", "no votes"],
          lambda f: [f["pairs"], percent(f["agreement"]), span(f["interval"]), *above(f["gain"]),
                     f"{percent(f['even']['share'])} of {f['even']['pairs']}", percent(f["position_bias"]),
                     percent(f["order_conflicts"]), f["no_votes"]])
    table("single solutions: AUC of sound against faulty ones", "auc",
          ["fault", "judge", "sound", "faulty", "AUC", "95% interval", "above length", "95% interval"],
          lambda f: [f["sound"], f["faulty"], percent(f["auc"]), span(f["interval"]), *above(f["gain"])])
    table("the first wrong step, below 1/2 for the first time", "process",
          ["rows", "judge", "faulty", "found exactly", "sound", "none named", "F1"],
          lambda f: [f["faulty_rows"], percent(f["erroneous"], 1), f["sound_rows"], percent(f["correct"], 1),
                     percent(f["f1"], 1)])
    graded = {judge: found for judge, figures in report.items() if (found := figures.get("calibration"))}
    for judge, figures in graded.items():
        log.table(f"{judge}: grades of {figures['solutions']} solutions; Brier score {figures['brier']:.3f}, "
                  f"{figures['constant']:.3f} for always saying {figures['sound']:.2f}",
                  ["mean grade", "sound", "solutions"],
                  [[f"{mean:.2f}", percent(share), count] for mean, share, count in figures["reliability"]])


def above(gain: list[float] | None) -> list[str]:
    """Word what is above length alone, and its interval, in points."""
    return ["-", "-"] if gain is None else [f"{100 * gain[0]:+.0f}", span(gain[1:], "+.0f")]


def certificate(name: str, data: dict) -> list[str]:
    """Say whether the figures of `probe_data` recommend judge=name, and why."""
    own = next(iter(data["judges"].values()))
    lines = [f"the judge failed on data: {own['error']}"] if own["error"] else []
    what, rows, figures, of = "AUC", 0, own.get("auc", {}).get(HIDDEN), "of a right answer with a wrong step"
    if figures:
        value, rows = figures["auc"], min(figures["sound"], figures["faulty"])
        of = of if rows == figures["faulty"] else "sound ones to hold against those"
    elif figures := own["pairs"].get(HIDDEN):
        what, value, rows = "agreement", figures["agreement"], figures["voted"]
    if rows < ENOUGH_ROWS:
        return [*lines, f"not enough rows to recommend judge={name}: {rows} {of}, and {ENOUGH_ROWS} are needed"]
    found = "recommended" if figures["gain"][1] > 0 else "not recommended, it does not surely beat length alone"
    points, interval = above(figures["gain"])
    return [*lines, f"judge={name} is {found}: on right answers with a wrong step ({rows} rows) its {what} is "
            f"{percent(value)}, that of length alone {percent(figures['length'])}: {points} points, {interval}"]
