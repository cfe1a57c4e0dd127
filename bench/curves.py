"""Length control over three times the demo's steps: accuracy and tokens after every third step, several seeds.

    python -m bench.curves                         # every arm, both rates, seeds 0 1 2: hours; goes on where stopped
    python -m bench.curves --arms minmax-judge ratio-control --seeds 0 --rates 3e-4
    python -m bench.curves --table                 # table and picture of what has been measured so far
    python -m bench.curves --table --against ratio-apart-control    # differences to that arm, not to SFT

The demo's model, problems and SFT adapters (those of bench.ablate, if it has the same --work); stage 2 for 18 steps of
8 x 8 samples at the demo's rate and at a third of it, one thing changed an arm: ARMS below. The curve is of 128
held-out problems, evaluated greedily after every third step, by which stage 2 chooses the checkpoint that it hands on
(`kept`); that and the last one answer the 256 other held-out problems of the ablation. Differences are to the SFT
model of the same seed, problem by problem, with 95% intervals from a bootstrap over seeds and problems. The bar: after
all steps accuracy not below SFT's (mean difference at least -1 point), half the tokens, no smaller share of right
steps.
"""
import json
import sys
from pathlib import Path

import numpy as np

from bench.ablate import (
    AS_IT_IS,
    arms_parser,
    curve_of,
    interval,
    keep_settings,
    row_of,
    run_stage,
    say_changed,
    stage_1,
    train_judge,
    values_of,
)
from bench.measure import RESULTS, new_table, show
from minimath.commands.demo import DemoConfig, demo_model, write_problems
from minimath.config.load import load_config
from minimath.core.errors import UserError
from minimath.core.files import write_whole
from minimath.core.run_folder import METRICS
from minimath.report.figures import COLOURS, INK, new_figure, read_metrics, save_png

STEPS, EVERY = 18, 3
PLAIN = ["judge_weight=0"]  # length alone beside right or wrong
CONTROL, APART = ["brevity_control=accuracy"], ["brevity_scale=apart", "brevity_weight=1"]
SOUND = ["step_weight=0.5"]  # what an equation that does not hold takes from the reward
TRUNCATE = ["brevity=truncate", "brevity_limit=50", "overlong=none"]
CONCISE = ["teacher_system=Be concise. Put the final answer in \\boxed{}.", "reward=none", "verifier=none"]
JUDGED = ["judge=self", "judge_adapter={judge}"]  # the ablation's: single solutions, trained on the policy's own
ARMS = {  # name -> what it changes in the demo's rlaif section
    "minmax-judge": [],  # the demo's settings until now
    "right-only": [*PLAIN, "brevity_weight=0"],  # the control: correct or wrong
    "ratio": [*PLAIN, "brevity=ratio"],
    "log": [*PLAIN, "brevity=log"],
    "cosine": [*PLAIN, "brevity=cosine"],
    "minmax": [*PLAIN, "brevity=minmax"],
    "alp": [*PLAIN, "brevity=alp"],
    "truncate": [*PLAIN, *TRUNCATE],
    "ratio-control": [*PLAIN, "brevity=ratio", *CONTROL],
    "log-control": [*PLAIN, "brevity=log", *CONTROL],
    "ratio-apart": [*PLAIN, "brevity=ratio", *APART],
    "ratio-apart-control": [*PLAIN, "brevity=ratio", *APART, *CONTROL],
    "log-apart-control": [*PLAIN, "brevity=log", *APART, *CONTROL],
    "judge-apart-control": ["brevity=ratio", *APART, *CONTROL],  # right steps first, then shorter
    "judge-steps-apart-control": [*SOUND, "brevity=ratio", *APART, *CONTROL],
    "judge-steps-more-apart-control": ["step_weight=0.75", "brevity=ratio", *APART, *CONTROL],
    "steps-apart": [*PLAIN, *SOUND, "brevity=ratio", *APART],
    "judge-truncate": TRUNCATE,
    "judge-half-apart-control": ["judge_weight=0.5", "brevity=ratio", *APART, *CONTROL],
    "teacher-concise": ["teacher={sft}", *CONCISE],  # no answers: the SFT model, asked to be concise
    "teacher-concise-full": ["teacher={sft}", *CONCISE, "teacher_kl=full"],
    "teacher-longer": ["teacher={longer}", "reward=none", "verifier=none"],  # SFT for twice the steps
    "teacher-longer-right": ["teacher={longer}", "teacher_weight=0.1", *PLAIN, "brevity_weight=0"],
    "teacher-longer-truncate": ["teacher={longer}", "teacher_weight=0.1", *PLAIN, *TRUNCATE],
    "trained-apart-control": [*JUDGED, "brevity=ratio", *APART, *CONTROL],  # by a judge that was trained, not by rules
    "trained-steps": [*JUDGED, *SOUND, "brevity_weight=0"],  # right, sound, that judge; nothing asks for length
    "majority": ["verifier=majority", *PLAIN, "brevity=ratio", *APART, *CONTROL],  # no answers, as the next six
    "majority-share": ["verifier=majority", "majority_share=0.65", *PLAIN, "brevity=ratio", *APART, *CONTROL],
    "majority+steps": ["verifier=majority+steps", *SOUND, "brevity=ratio", *APART, *CONTROL],
    "majority+steps-share": ["verifier=majority+steps", "majority_share=0.65", *PLAIN, *SOUND, "brevity=ratio", *APART,
                             *CONTROL],
    "majority-steps": ["verifier=majority", *SOUND, "brevity=ratio", *APART, *CONTROL],  # the demo's recipe, and votes
    "majority+judge": ["verifier=majority+judge", *JUDGED, *PLAIN, "brevity=ratio", *APART, *CONTROL],
    "judge-verifier": ["verifier=judge", *JUDGED, *PLAIN, "brevity=ratio", *APART, *CONTROL],
}
UNTIL_NOW = ["brevity=minmax", "brevity_control=none", "brevity_scale=together", "brevity_weight=0.2",
             "judge_weight=0.2", "step_weight=0", "overlong=mask"]  # of the demo, which every arm begins from


def parse(words: list[str] | None = None):
    parser = arms_parser("curves", __doc__, ARMS, RESULTS / "curves-cpu.json")
    parser.add_argument("--rates", nargs="+", default=["3e-4", "1e-4"], help="peak learning rates")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--against", choices=ARMS, default="", metavar="ARM",
                        help="the arm, at the same rate, that the others are held against; default: SFT")
    return parser.parse_args(words)


# ---- running

def words_of(arm: str) -> list[str]:
    return [*UNTIL_NOW, *ARMS[arm]]


def run_arm(arm: str, rate: str, seed: int, options) -> dict:
    """Train one arm, evaluate its last and its kept checkpoint; return its row."""
    work, data = options.work, options.work / "data"
    common = [f"model={demo_model()}", f"seed={seed}"]
    sft = stage_1(work, "sft", common, [], options.threads)
    changes = [word.replace("{sft}", str(sft)) for word in words_of(arm)]
    if any("{judge}" in word for word in changes):
        judge = train_judge(work, "single", seed, [*common, f"adapter={sft}"], options.threads)
        changes = [word.replace("{judge}", str(judge)) for word in changes]
    if any("{longer}" in word for word in changes):
        longer = stage_1(work, "longer", common, ["steps=300"], options.threads)
        changes = [word.replace("{longer}", str(longer)) for word in changes]
    out = work / f"curve-{arm}-{rate}-{seed}"
    run_stage(out, ["rlaif", "demo", *common, f"adapter={sft}", f"data={data / 'rl.jsonl'}", f"steps={STEPS}",
                    f"lr={rate}", f"eval_data={data / 'valid.jsonl'}", f"eval_every={EVERY}", "eval_limit=128",
                    "eval_max_new_tokens=200", "final=best", "sample_every=0", *changes], options.threads)
    metrics = read_metrics(out / METRICS)
    row = {"arm": arm, "rate": rate, "seed": seed, "words": words_of(arm), "curve": curve_of(metrics)}
    row["weights"] = [m["brevity/weight"] for m in metrics if "brevity/weight" in m]
    for name, adapter in (("last", out / "checkpoints" / f"step-{STEPS:06d}"), ("kept", out)):
        row[name] = evaluated(work / f"eval-{out.name}-{name}", adapter, common, options)
    return row


def evaluated(folder: Path, adapter: Path, common: list[str], options) -> dict:
    words = ["eval", "demo", *common, f"data={options.work / 'data' / 'test.jsonl'}", f"adapter={adapter}"]
    run_stage(folder, words, options.threads)
    return row_of("", int(common[1].removeprefix("seed=")), folder, None)


# ---- figures

def figures(rows: list[dict], reference: dict[int, dict], name: str) -> dict:
    """Compute means over seeds of `last` or `kept`, and differences to each seed's reference with intervals."""
    mine, theirs = [row[name] for row in rows], [reference[row["seed"]] for row in rows]
    out = {"seeds": len(rows)}
    for what in ("correct", "tokens"):
        out[what] = float(np.mean([values_of(row, what) for row in mine]))
        gap = np.array([values_of(a, what) - values_of(b, what) for a, b in zip(mine, theirs, strict=True)])
        out[f"{what}_gap"], out[f"{what}_interval"] = float(gap.mean()), interval(gap)
    out["saved"] = 100 * (1 - out["tokens"] / float(np.mean([values_of(row, "tokens") for row in theirs])))
    steps = [100 * float(np.mean([row["correct_steps"] for row in each])) for each in (mine, theirs)]
    out["steps"], out["steps_gap"] = steps[0], steps[0] - steps[1]
    wrong = [float(np.mean([(1 - row["correct_steps"]) * row["checked_steps"] / row["problems"] for row in each]))
             for each in (mine, theirs)]
    out["wrong"], out["wrong_gap"] = wrong[0], wrong[0] - wrong[1]
    out["meets"] = out["correct_gap"] >= -1 and out["correct_interval"][1] >= 0 and out["saved"] >= 50 \
        and out["steps_gap"] >= 0
    return out


def groups(rows: dict[str, dict]) -> dict[tuple[str, str], list[dict]]:
    """Sort rows by arm and rate, in the order of ARMS."""
    found = {}
    for row in rows.values():
        found.setdefault((row["arm"], row["rate"]), []).append(row)
    return dict(sorted(found.items(), key=lambda each: (list(ARMS).index(each[0][0]), -float(each[0][1]))))


def table(rows: dict[str, dict], sft: dict[int, dict], against: str = ""):
    out = new_table(f"after {STEPS} steps, against {against or 'the SFT model'} of the same seed (95% intervals)", (
        "arm", "rate", "seeds", "checkpoint", "accuracy, %", "difference", "tokens", "fewer", "right steps",
        "wrong steps a problem", "meets the bar"), left=("checkpoint",))
    found = groups(rows)
    for (arm, rate), mine in found.items():
        for name in ("last", "kept") if arm != against else ():
            theirs = {row["seed"]: row[name] for row in found.get((against, rate), [])} if against else sft
            if not (both := [row for row in mine if row["seed"] in theirs]):
                continue
            f = figures(both, theirs, name)
            low, high = f["correct_interval"]
            out.add_row(arm, rate, str(f["seeds"]), name, f"{f['correct']:.1f}",
                        f"{f['correct_gap']:+.1f} ({low:+.1f} to {high:+.1f})", f"{f['tokens']:.1f}",
                        f"{f['saved']:.0f}%", f"{f['steps']:.1f}% ({f['steps_gap']:+.1f})",
                        f"{f['wrong']:.2f} ({f['wrong_gap']:+.2f})", "yes" if f["meets"] and not against else "")
    return out


def plot(rows: dict[str, dict], path: Path) -> None:
    """Draw accuracy and tokens over steps, one panel an arm, a line a rate: means over seeds."""
    arms = list(dict.fromkeys(arm for arm, _ in groups(rows)))
    across = min(4, len(arms))
    down = -(-len(arms) // across)
    figure, axes = new_figure(3.1 * across, 2.2 * down + 0.4, nrows=down, ncols=across, sharex=True, squeeze=False)
    for axis, arm in zip(axes.flat, arms):
        right = axis.twinx()
        for (name, rate), mine in groups(rows).items():
            if name == arm:
                steps, accuracy, tokens = np.mean([row["curve"] for row in mine], axis=0).T
                style = "-" if float(rate) > 2e-4 else "--"
                axis.plot(steps, 100 * accuracy, style, color=COLOURS[1], label=f"accuracy, {rate}")
                right.plot(steps, tokens, style, color=COLOURS[2], label=f"tokens, {rate}")
        axis.set(title=arm, ylim=(40, 80))
        right.set(ylim=(0, 120))
        right.tick_params(colors=COLOURS[2])
        axis.tick_params(axis="y", colors=COLOURS[1])
    for axis in axes.flat[len(arms):]:
        axis.set_visible(False)
    figure.supxlabel("step of stage 2", color=INK)
    figure.suptitle("accuracy, % (blue, left) and tokens (red, right) on 128 held-out problems; solid 3e-4, dashed "
                    "1e-4", fontsize=9)
    save_png(figure, path)


def main(words: list[str] | None = None) -> int:
    options, failed = parse(words), []
    held = json.loads(options.out.read_text(encoding="utf-8")) if options.out.exists() else {"sft": {}, "rows": {}}
    rows, sft = held["rows"], held["sft"]
    say_changed(rows, {arm: words_of(arm) for arm in ARMS}, options.out)

    def save() -> None:
        lines = [",\n".join(f'  "{name}": {json.dumps(part[name])}' for name in sorted(part)) for part in (sft, rows)]
        write_whole(options.out, f'{{"sft": {{\n{lines[0]}\n}}, "rows": {{\n{lines[1]}\n}}}}\n')

    if not options.table:
        try:
            keep_settings(options.work, options.out, {}, AS_IT_IS)
            demo_model()
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        write_problems(load_config(DemoConfig, "demo", [], "demo", allow_other=True), options.work / "data", 1.0)
        for seed, rate, arm in ((s, r, a) for s in options.seeds for r in options.rates for a in options.arms):
            common, key = [f"model={demo_model()}", f"seed={seed}"], f"{arm}/{rate}/{seed}"
            try:
                if str(seed) not in sft:
                    adapter = stage_1(options.work, "sft", common, [], options.threads)
                    sft[str(seed)] = evaluated(options.work / f"eval-sft-{seed}", adapter, common, options)
                rows[key] = rows.get(key) or run_arm(arm, rate, seed, options)
                save()
                last = rows[key]["last"]
                print(f"{key}: {100 * last['accuracy']:.1f}%, {last['mean_tokens']:.1f} tokens", flush=True)
            except (UserError, OSError, ValueError, KeyError) as error:  # the others go on
                failed.append(key)
                print(f"{key}: {error}", flush=True)
    if rows:
        show(table(rows, {int(s): row for s, row in sft.items()}, options.against), 200)
        plot(rows, options.out.with_suffix(".png"))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
