"""Calibrate a freshly trained judge on held-out solutions of its policy, and measure it there."""
import numpy as np

from minimath.core.log import RunLog, clean
from minimath.judges.base import asked
from minimath.judges.calibrate import Calibration, auc_within, brier, fit_calibration, reliability, sigmoid
from minimath.judges.compare import TALLY, percent, tally_cells
from minimath.judges.lessons import Solved, own_pairs
from minimath.judges.pairs import judge_known
from minimath.judges.self_judge import SelfJudge

KEPT_PAIRS = 64  # held-out pairs for the canary


def measure_judge(judge: SelfJudge, held_out: list[Solved], log: RunLog) -> None:
    """Fill in the card of a judge: calibration, figures, canary pairs; and show them.

    figures: pairs (compare.tally by kind) and, of form single, grades (grade_figures)."""
    card = judge.card
    if judge.form != "pair":
        card.calibration, card.figures["grades"] = grade_figures(judge, held_out)
        show_grades(card.figures["grades"], card.calibration, log)
    pairs = [pair for each in held_out for pair in own_pairs(each)]
    card.figures["pairs"] = report = judge_known(judge, pairs)
    card.figures = clean(card.figures)  # NaN, where there is only right or only wrong, is not JSON
    card.pairs = [[p.problem, p.first.text, p.second.text] for p in pairs if p.kind == "own wrong"][:KEPT_PAIRS]
    log.table(f"the policy's own solutions of {len(held_out)} held-out problems",
              ["kind", *TALLY], [[kind, *tally_cells(f)] for kind, f in report.items()])


def grade_figures(judge: SelfJudge, held_out: list[Solved]) -> tuple[Calibration, dict]:
    """Calibrate the grades of all held-out solutions; return that and figures.

    These are of two other calibrations, each fitted to one half of the problems and measured on the other: auc over all
    solutions, auc_within over right and wrong ones of one problem, auc_like_lengths over those of them that are as
    long, the same of either sign alone, brier before and after, reliability (calibrate.py)."""
    rows = [(number, each.example.problem, record) for number, each in enumerate(held_out)
            for record in each.records if record["text"].strip()]
    signs = judge.signs([asked(problem, record["text"]) for _, problem, record in rows])
    known = [(number, r["correct"], r["tokens"], *of_row[-1])
             for (number, _, r), of_row in zip(rows, signs, strict=True)
             if of_row is not None and np.isfinite(of_row[-1]).all()]
    if not known:
        return Calibration(), {"solutions": 0}
    number, right, tokens, z, logp = (np.array(column) for column in zip(*known))
    signs, p = np.column_stack([z, logp]), np.empty(len(right))
    for half in (number % 2 == 0, number % 2 == 1):  # each by what was fitted to the other one
        other = fit_calibration(signs[~half], right[~half], number[~half])
        p[half] = [other.probability(*each) for each in signs[half]]
    return fit_calibration(signs, right, number), {
        "solutions": len(known), "right": float(right.mean()), "auc": auc_within(0 * number, right, p),
        "auc_within": auc_within(number, right, p), "auc_like_lengths": auc_within(number, right, p, tokens),
        "auc_of_verdict": auc_within(number, right, z), "auc_of_numbers": auc_within(number, right, logp),
        "brier_uncalibrated": brier([sigmoid(each) for each in z], right), "brier": brier(p, right),
        "brier_of_the_mean": brier(np.full(len(right), right.mean()), right), "reliability": reliability(p, right)}


def show_grades(f: dict, calibration: Calibration, log: RunLog) -> None:
    if not f["solutions"]:
        return log.say("no solution of a held-out problem to calibrate on: grades are as the judge gives them")
    log.say(f"{f['solutions']} held-out solutions, {percent(f['right'])} right. AUC {f['auc']:.3f} over all, "
            f"{f['auc_within']:.3f} within a problem, {f['auc_like_lengths']:.3f} of those as long. Brier score "
            f"{f['brier']:.3f} (uncalibrated {f['brier_uncalibrated']:.3f}, always the mean "
            f"{f['brier_of_the_mean']:.3f}); temperature {calibration.temperature:.2f}, bias {calibration.bias:+.2f}, "
            f"likelihood {calibration.likelihood:.2f} (within a problem, the verdict alone {f['auc_of_verdict']:.3f}, "
            f"the log-prob of its numbers alone {f['auc_of_numbers']:.3f})")
    log.table("reliability of the calibrated grades", ["grade", "right", "solutions"],
              [[f"{p:.2f}", percent(share), count] for p, share, count in f["reliability"]])
