"""The probe `data` of `minimath judge check`: solutions of known faults, beside what a judge has to beat."""
import contextlib
import dataclasses
import time
from collections.abc import Iterator

from minimath.config.schema import RLAIFConfig
from minimath.core.log import RunLog
from minimath.core.text import comma_list
from minimath.data.examples import describe_report
from minimath.judges.base import Judge
from minimath.judges.certify import Answers, ask_known, figures_of, heuristic, length_alone, questions_of
from minimath.judges.judge import make_judge
from minimath.judges.known import HIDDEN, KnownRows, read_known
from minimath.judges.poll import percent, span
from minimath.models.policy import Policy

ENOUGH_ROWS = 20  # right answers with a wrong step: with fewer a judge is neither recommended nor refused


@contextlib.contextmanager
def priced(judge: Judge, questions: int, log: RunLog, what: str = "cost per comparison") -> Iterator[dict]:
    """Say what each of some questions cost; the dict that it yields then holds it."""
    before, start, cost = judge.counts.copy(), time.monotonic(), {}
    yield cost
    spent = {"s": time.monotonic() - start} | dict(judge.counts - before)
    cost.update((name, n / max(1, questions)) for name, n in spent.items())
    log.say(f"{what}: " + ", ".join(f"{n:.3g} {name}" for name, n in cost.items()))


def open_known(judge: Judge, cfg: RLAIFConfig, log: RunLog) -> KnownRows:
    """Read data=, without what the judge was trained on, and say what is there."""
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
    if cfg.judge.adapter:
        log.say(held_out(known, bool(trained_on)))
    return known


def held_out(known: KnownRows, hashed: bool) -> str:
    """Say whether problems of the check were in the judge's training."""
    if not hashed:
        return "judge.json names no problems: whether these were in the judge's training is not known"
    if known.left_out:
        return f"{known.left_out} of {known.rows} rows left out: their problems were in the judge's training"
    return f"none of the {known.problems} problems was in the judge's training (by hashes)"


def probe_data(judge: Judge, known: KnownRows, policy: Policy | None, cfg: RLAIFConfig, log: RunLog) -> dict:
    """Ask the judge and what it has to beat, and show certify.figures_of each.

    Returns them by name, the judge's first, with `cost` per question, and what was read."""
    def ask(one: Judge, name: str) -> tuple[Answers, dict]:
        if one.name == "heuristic":  # which the data tell no answers
            return heuristic(known), {}
        count = questions_of(one, known)
        with (log.progress(count, f"{name}: data") as advance,
              priced(one, count, log, f"{name}: cost per question") as cost):
            return ask_known(one, known, name, advance), cost

    judges = [ask(judge, judge.name), (length_alone(known), {})]
    if "heuristic" in comma_list(cfg.baselines) and judge.name != "heuristic":
        judges.append((heuristic(known), {}))
    if "untrained" in comma_list(cfg.baselines) and cfg.judge.adapter:
        options = dataclasses.replace(cfg.judge, adapter="", form=judge.form)
        plain = make_judge(options, policy, micro_batch_tokens=cfg.optimizer.micro_batch_tokens, say=log.say)
        plain.reader = judge.reader  # the same prompts
        judges.append(ask(plain, "untrained"))
    report = {one.name: figures_of(one, judges[1][0], known, cfg.run.seed) | {"cost": cost} for one, cost in judges}
    show(report, log)
    read = {name: getattr(known, name) for name in ("rows", "problems", "left_out", "drawn")}
    return {"judges": report, **read, "kinds": dict(known.kinds()), "skipped": dict(known.report.skipped),
            "held_out": held_out(known, bool(judge.card.problems)) if cfg.judge.adapter else ""}


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
    singles, pairs = own.get("auc", {}).get(HIDDEN), own["pairs"].get(HIDDEN)
    what, value, rows = ("AUC", singles["auc"], min(singles["sound"], singles["faulty"])) if singles else \
        ("agreement", pairs["agreement"], pairs["voted"]) if pairs else ("", 0.0, 0)
    if rows < ENOUGH_ROWS:
        return [*lines, f"not enough rows to recommend judge={name}: {rows} of a right answer with a wrong step, and "
                f"{ENOUGH_ROWS} are needed"]
    figures = singles or pairs
    said = (f"on right answers with a wrong step ({rows} rows) its {what} is {percent(value)}, that of length alone "
            f"{percent(figures['length'])}: {above(figures['gain'])[0]} points, {above(figures['gain'])[1]}")
    if figures["gain"][1] > 0:
        return [*lines, f"judge={name} is recommended: {said}"]
    return [*lines, f"judge={name} is not recommended, it does not surely beat length alone: {said}"]
