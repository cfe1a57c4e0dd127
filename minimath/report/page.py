"""Write report.html: one run or several on a page that needs nothing else.

    minimath report runs/demo-... [runs/other ...] [out=FOLDER]

A run folder is one of `minimath run` or `minimath demo`, of a single stage, of an evaluation or of a suite of them;
suites beside each other are compared set by set. The page holds the two stages (accuracy against tokens), training
curves, lengths, problems solved by each model with every step marked, the judge's health, all settings and the command.
Pictures are inline SVG in the page's own colours, and PNG files beside it. Texts of models and data are escaped by the
template page.html, and the page's policy allows no script and no address at all.
"""
import base64
import contextlib
import json
from pathlib import Path
from typing import NamedTuple

import jinja2

from minimath.core.errors import UserError
from minimath.core.files import read_json, write_whole
from minimath.core.run_folder import COMPLETIONS, ENVIRONMENT, EVAL, METRICS, REPORT, SUITE
from minimath.core.stats import paired
from minimath.eval.metrics import COLUMNS, read_records, table_row
from minimath.eval.suite import suite_table
from minimath.grading.steps import check_steps
from minimath.report import figures
from minimath.report.judge_plot import JUDGE_PLOT
from minimath.report.metrics import read_metrics, series

PICTURES = "plots"
ARMS = {"base": "base", "sft": "SFT", "rlaif": "SFT + RLAIF", "rlaif-only": "RL only",
        "paper": "SFT + RL (paper's rewards)"}  # parts of a run of the whole recipe, in the order shown
PANELS = {"SFT": {"loss": ["loss"], "gradient norm": ["optim/grad_norm"], "held-out accuracy": ["eval/accuracy"]},
          "RLAIF": {"reward": ["reward/mean"], "share": ["rollout/correct", "rollout/finished", "eval/accuracy"],
                    "tokens": ["rollout/tokens", "rollout/correct_tokens"],
                    "nats a token": ["policy/entropy", "rollout/surprisal"]}}
JUDGE = {"judge/comparisons": "comparisons", "judge/no_votes": "without a vote", "judge/position_bias": "position bias",
         "judge/order_conflicts": "order conflicts", "judge/misfit": "misfit", "judge/seconds": "seconds"}
SHOWN = 6  # problems
LONGEST = 3000  # characters of a solution shown


class Table(NamedTuple):
    """A table of the page."""
    columns: list[str]
    rows: list[list]


class Picture(NamedTuple):
    """A picture of the page; the template does not escape its svg, which we made."""
    svg: str
    caption: str


def report(words: list[str]) -> dict:
    """Write the page of the run folders named; returns its path. Raises UserError."""
    runs = [Path(word) for word in words if "=" not in word]
    options = dict(word.split("=", 1) for word in words if "=" in word)
    if unknown := set(options) - {"out"}:
        raise UserError(f"minimath report takes run folders and out=FOLDER, not {', '.join(sorted(unknown))}=")
    if not runs:
        raise UserError("minimath report needs a run folder: minimath report runs/demo-...")
    page = write_page(runs, Path(options.get("out") or runs[0]))
    print(f"{page}; its pictures are in {page.parent / PICTURES}")
    return {"page": str(page)}


def write_page(runs: list[Path], out: Path) -> Path:
    """Write report.html of the run folders into `out`.

    Raises UserError for a folder with nothing to report.
    """
    evaluations, stages, suites = {}, {}, {}
    for run in runs:
        if (run / SUITE).is_file():
            suites[run.name if sum(other.name == run.name for other in runs) == 1 else str(run)] = run
            continue
        prefix = f"{run.name}: " if len(runs) > 1 else ""
        found = evaluations_of(run), stages_of(run)
        if not any(found):
            raise UserError(f"{run}: no evaluation and no training to report (a folder of minimath run, demo, sft, "
                            f"rlaif or eval is expected; of a suite, one with {SUITE}: its last set is complete)")
        evaluations |= {prefix + name: at for name, at in found[0].items()}
        stages |= {prefix + name: at for name, at in found[1].items()}
    (out / PICTURES).mkdir(parents=True, exist_ok=True)
    try:
        parts = {"change": change(evaluations) if len(runs) == 1 else "",
                 "evaluations": [evaluation_part(evaluations, out)] if evaluations else [],
                 **suite_parts(suites, out), "training": [training_part(name, at, out) for name, at in stages.items()]}
    except KeyError as error:
        raise UserError(f"{', '.join(map(str, runs))}: a record has no {error}: it was made by an earlier version of "
                        "minimath; evaluate or train again") from None
    environments = [environment_of(run) for run in runs]
    page = template().render(
        runs=[run.name for run in runs], started=environments[0].get("started", ""), **parts,
        commands=[" ".join(["minimath", *e["command"][1:]]) for e in environments if e.get("command")],
        files=option_files(runs, stages) | {f"{run.name}: environment": json.dumps(environment, indent=1)
                                            for run, environment in zip(runs, environments)})
    write_whole(out / REPORT, page)
    return out / REPORT


def template() -> jinja2.Template:
    """Load page.html, which escapes whatever is put in; a missing name is an error."""
    folder = Path(__file__).parent
    made = jinja2.Environment(loader=jinja2.FileSystemLoader(folder), autoescape=True, trim_blocks=True,
                              lstrip_blocks=True, keep_trailing_newline=True, undefined=jinja2.StrictUndefined)
    made.globals["style"] = (folder / "page.css").read_text(encoding="utf-8")
    return made.get_template("page.html")


# ---- what the folders hold

def evaluations_of(run: Path) -> dict[str, Path]:
    """Find the complete evaluations: name -> folder, in the order of the stages."""
    if (run / EVAL).is_file():
        return {run.name: run}
    return {name: run / f"eval-{arm}" for arm, name in ARMS.items() if (run / f"eval-{arm}" / EVAL).is_file()}


def stages_of(run: Path) -> dict[str, Path]:
    """Find the stages that have metrics: name -> folder."""
    if (run / METRICS).is_file():
        return {kind_of(read_metrics(run / METRICS)): run}
    return {name.removeprefix("SFT + "): run / arm for arm, name in ARMS.items() if (run / arm / METRICS).is_file()}


def kind_of(metrics: list[dict]) -> str:
    return "RLAIF" if any("reward/mean" in record for record in metrics) else "SFT"


def environment_of(run: Path) -> dict:
    try:
        return read_json(run / ENVIRONMENT)
    except (OSError, ValueError):
        return {}


def option_files(runs: list[Path], stages: dict[str, Path]) -> dict[str, str]:
    """Read the files of options of all runs and stages: name -> content."""
    files = dict.fromkeys(path for folder in [*runs, *stages.values()] for path in sorted(folder.glob("*.yaml")))
    return {f"{path.parent.name}/{path.name}": path.read_text(encoding="utf-8", errors="replace") for path in files}


# ---- parts of the page

def change(evaluations: dict[str, Path]) -> str:
    """Say in a sentence what the two stages changed."""
    rows = [read_json(at / EVAL) for at in evaluations.values()][:3]
    if len(rows) < 2:
        return ""
    first, last = rows[0], rows[-1]
    return (f"Accuracy {100 * first['accuracy']:.1f}% to {100 * last['accuracy']:.1f}%, mean tokens "
            f"{first['mean_tokens']:.0f} to {last['mean_tokens']:.0f}, on {first['problems']} problems.")


def suite_parts(suites: dict[str, Path], out: Path) -> dict:
    """Gather the table of each suite, and set by set the evaluations of all of them."""
    results = {name: read_json(at / SUITE) for name, at in suites.items()}
    sets: dict[str, dict[str, Path]] = {}
    for name, result in results.items():
        for one in result["sets"]:
            sets.setdefault(one, {})[name] = suites[name] / one
    return {"suites": [{"name": name, "table": Table(*suite_table(result))} for name, result in results.items()],
            "sets": [evaluation_part(evaluations, out, one) for one, evaluations in sets.items()]}


def evaluation_part(evaluations: dict[str, Path], out: Path, of_set: str = "") -> dict:
    """Gather what there is of evaluations on the same problems. of_set: of a suite."""
    tail = f"-{of_set}" if of_set else ""  # of the names of pictures, which must differ
    rows = {name: read_json(at / EVAL) for name, at in evaluations.items()}
    records = {name: read_records(at) for name, at in evaluations.items() if (at / COMPLETIONS).is_file()}
    records = {name: found for name, found in records.items() if found}
    pictures = [picture(figures.tradeoff(rows), f"tradeoff{tail}", out, "Accuracy against tokens")]
    if len(rows) >= 3 and not of_set:
        pictures.append(picture(figures.beside_paper(rows), "beside-paper", out, "The two stages beside the paper's, "
                                "each relative to the model before them (arXiv 2507.08267; another scale, the same "
                                "shape)"))
    return {"title": of_set or "Evaluation", "pictures": pictures, "differences": differences(records),
            "table": Table(COLUMNS, [table_row(name, summary) for name, summary in rows.items()]),
            "lengths": picture(figures.lengths(records), f"lengths{tail}", out) if records else None,
            "problems": side_by_side(records) if records else []}


def differences(records: dict[str, list[dict]]) -> Table | None:
    """Compare each evaluation with the first one, on the problems that both have."""
    (first, base), *others = records.items() or [("", [])]
    rows = []
    for name, mine in others:
        with contextlib.suppress(UserError):  # other problems: nothing to compare
            cells = [(paired(mine, base, what), scale) for what, scale in (("correct", 100), ("tokens", 1))]
            rows.append([name, *(f"{scale * mean:+.1f} ({scale * low:+.1f} to {scale * high:+.1f})"
                                 for (mean, low, high), scale in cells)])
    return Table([f"against {first}", "accuracy, points (95%)", "mean tokens (95%)"], rows) if rows else None


def training_part(name: str, at: Path, out: Path) -> dict:
    """Gather the curves of a stage and the health of its judge."""
    metrics = read_metrics(at / METRICS)
    panels = [(label, [one for one in names if series(metrics, one)])
              for label, names in PANELS[kind_of(metrics)].items()]
    panels = [(label, names) for label, names in panels if names]
    judged = [record for record in metrics if record.get("judge/comparisons")]
    columns = [key for key in JUDGE if any(key in record for record in judged)]
    means = [f"{sum(record.get(key) or 0 for record in judged) / len(judged):.3g}" for key in columns]
    plot = at / JUDGE_PLOT  # drawn by the run where canary pairs were judged
    curves = picture(figures.curves(metrics, panels), f"training-{name}", out) if panels else None
    return {"name": name, "curves": curves,
            "judge_plot": base64.b64encode(plot.read_bytes()).decode() if plot.is_file() else "",
            "judge": Table([JUDGE[key] for key in columns], [means]) if judged else None,
            "judge_errors": sorted({record["judge/error"] for record in judged if record.get("judge/error")})[:3]}


def picture(figure, name: str, out: Path, caption: str = "") -> Picture:
    """Draw a figure for the page, and as a PNG file beside it."""
    name = "".join(c if c.isalnum() else "-" for c in name.lower())
    figures.save_png(figure, out / PICTURES / f"{name}.png")
    return Picture(figures.svg(figure, name), caption)


# ---- problems side by side

def side_by_side(records: dict[str, list[dict]]) -> list[dict]:
    """Choose a few problems with each model's first solution, those first that differ."""
    solutions = {name: {r["number"]: r for r in rows if r["sample"] == 0} for name, rows in records.items()}
    first = next(iter(solutions.values()))
    shared = [n for n in first if all(n in by_number for by_number in solutions.values())]

    def order(number: int):
        verdicts = [by_number[number]["correct"] for by_number in solutions.values()]
        return verdicts[0], not verdicts[-1], number  # solved in the end but not at first, then the others

    return [{"text": first[number]["problem"][:LONGEST], "gold": first[number]["gold"],
             "solutions": {name: {**by_number[number], "lines": marked_lines(by_number[number]["text"])}
                           for name, by_number in solutions.items()}}
            for number in spread(sorted(shared, key=order), SHOWN)]


def spread(items: list, count: int) -> list:
    """Take half of `count` from the front, the others evenly from what is left."""
    front, rest = items[:count // 2], items[count // 2:]
    left = count - len(front)
    return front + [rest[i * len(rest) // left] for i in range(min(left, len(rest)))]


def marked_lines(text: str) -> list[tuple[str, bool | None]]:
    """Split a solution into lines; with each whether its steps hold, None without any."""
    lines = text[:LONGEST].split("\n")
    return [(line, correct == total if total else None) for line in lines for correct, total in [check_steps(line)]]
