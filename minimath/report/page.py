"""Write report.html: one run or several on a page that needs nothing else.

    minimath report runs/demo-... [runs/other ...] [out=FOLDER]

A run folder is one of `minimath run` or `minimath demo`, of a single stage, of an evaluation or of a suite of them;
suites beside each other are compared set by set. Pictures are inline SVG in the page's own colours, and PNG files
beside it. Texts of models and data are escaped by the template page.html; the page allows no script and no address."""
import contextlib
import json
import re
import statistics
from pathlib import Path

import jinja2

from minimath.config.load import is_option, read_recipe
from minimath.core import run_folder as folder
from minimath.core.errors import UserError
from minimath.core.files import read_json, write_whole
from minimath.core.stats import by_text, paired
from minimath.eval.metrics import COLUMNS, read_records, table_row, thought_chars
from minimath.eval.suite import suite_table
from minimath.grading.steps import check_steps
from minimath.judges.card import CARD
from minimath.judges.compare import percent
from minimath.report import figures
from minimath.report.figures import read_metrics, series

PICTURES = "plots"
PANELS = {"reward": ["reward/mean"], "loss": ["loss"], "gradient norm": ["optim/grad_norm"],
          "share": ["rollout/correct", "rollout/finished", "eval/accuracy"],
          "tokens": ["rollout/tokens", "rollout/correct_tokens", "eval/tokens"],
          "nats a token": ["policy/entropy", "rollout/surprisal"],
          "weight of brevity": ["brevity/weight"], "accuracy held": ["brevity/accuracy", "brevity/reference"],
          "nats from the teacher": ["teacher/kl"],
          "label-free": ["verifier/agrees", "verifier/decided", "verifier/share"]}
JUDGE = {"judge/comparisons": "comparisons", "judge/no_votes": "without a vote", "judge/position_bias": "position bias",
         "judge/order_conflicts": "order conflicts", "judge/seconds": "seconds"}
GRADES = {"auc_within": "AUC within a problem", "brier": "Brier score", "brier_of_the_mean": "of always the mean"}
SHOWN = 6  # problems
LONGEST = 3000  # characters of a solution shown


def report(words: list[str]) -> dict:
    """Write the page of the run folders named; returns its path. Raises UserError."""
    runs = [Path(word) for word in words if not is_option(word)]
    options = dict(word.removeprefix("--").partition("=")[::2] for word in words if is_option(word))
    if not runs or options.keys() - {"out"}:
        raise UserError(f"minimath report takes run folders and out=FOLDER, not {' '.join(words) or 'nothing'}: "
                        "minimath report runs/demo-...")
    page = write_page(runs, Path(options.get("out") or runs[0]))
    print(f"{page}; its pictures are in {page.parent / PICTURES}")
    return {"page": str(page)}


def write_page(runs: list[Path], out: Path) -> Path:
    """Write report.html of the run folders. UserError: one has nothing to report."""
    evaluations, stages, suites, settings = {}, {}, {}, {}
    names = [run.name or run.absolute().name for run in runs]  # of the folder that `.` is, too
    labels = {run: name if names.count(name) == 1 else str(run) for run, name in zip(runs, names)}
    for run, label in labels.items():
        prefix, trained = f"{label}: " if len(labels) > 1 else "", {}
        if (run / folder.SUITE).is_file():
            suites[label] = run
        else:  # an evaluation or a stage, or a whole run, which has folders of both
            places = [(label, label, run, run), *(
                (prefix + name, prefix + name.removeprefix("SFT + "), folder.evaluation_folder(run, arm), run / arm)
                for arm, name in folder.ARMS.items())]
            found = {name: at for name, _, at, _ in places if (at / folder.EVAL).is_file()}
            trained = {name: at for _, name, _, at in places if (at / folder.METRICS).is_file()}
            if not (found or trained):
                raise UserError(f"{run}: no evaluation and no training to report (a folder of minimath run, demo, sft, "
                                f"rlaif or eval is expected; of a suite, one with {folder.SUITE}: its last set is "
                                "complete)")
            evaluations, stages = evaluations | found, stages | trained
        for at in dict.fromkeys((run, *trained.values())):
            settings |= {f"{prefix}{at.name}/{file.name}": file.read_text(encoding="utf-8", errors="replace")
                         for file in sorted(at.glob("*.yaml"))}
    (out / PICTURES).mkdir(parents=True, exist_ok=True)
    try:
        environments = {label: read_json(run / folder.ENVIRONMENT) for run, label in labels.items()
                        if (run / folder.ENVIRONMENT).is_file()}
        results = {name: read_json(at / folder.SUITE) for name, at in suites.items()}
        sets = {one: {name: suites[name] / one for name, other in results.items() if one in other["sets"]}
                for result in results.values() for one in result["sets"]}  # of all suites
        parts = {"suites": {name: suite_table(result) for name, result in results.items()},
                 "evaluations": [evaluation_part(at, out, one) for one, at in {"": evaluations, **sets}.items() if at],
                 "training": {name: training_part(name, at, out) for name, at in stages.items()}}
        settings |= {f"{label}: environment": json.dumps(found, indent=1) for label, found in environments.items()}
        page = TEMPLATES.get_template("page.html").render(
            marked_lines=marked_lines, runs=list(labels.values()), environments=list(environments.values()),
            settings=settings, **parts)
    except KeyError as error:
        raise UserError(f"{', '.join(map(str, runs))}: a record has no {error}: it was made by an earlier version of "
                        "minimath; evaluate or train again") from error
    except (ValueError, TypeError, AttributeError, FileNotFoundError, jinja2.UndefinedError) as error:
        raise UserError(f"{', '.join(map(str, runs))}: a record is damaged or gone ({error}); evaluate or train "
                        "again") from error
    write_whole(out / folder.REPORT, page)
    return out / folder.REPORT


def evaluation_part(evaluations: dict[str, Path], out: Path, of_set: str) -> dict:
    """Gather what there is of evaluations on the same problems. of_set: of a suite."""
    rows = {name: read_json(at / folder.EVAL) for name, at in evaluations.items()}
    records = {name: read_records(at) for name, at in evaluations.items() if (at / folder.COMPLETIONS).is_file()}
    drawn = {"tradeoff": figures.tradeoff(rows)} | ({"lengths": figures.lengths(records)} if records else {})
    return {"title": of_set or "Evaluation", "summaries": list(rows.values()), "differences": differences(records),
            "table": (COLUMNS, [table_row(name, summary) for name, summary in rows.items()]),
            "pictures": {name: picture(figure, f"{name} {of_set}", out) for name, figure in drawn.items()},
            "problems": side_by_side(records) if records else []}


def differences(records: dict[str, list[dict]]) -> tuple[list[str], list[list[str]]]:
    """Compare each evaluation with the first one, on the problems that both have."""
    (first, base), *others = records.items() or [("", [])]
    rows = []
    for name, mine in others:
        with contextlib.suppress(UserError):  # other problems: nothing to compare
            cells = [(paired(mine, base, what), scale) for what, scale in (("correct", 100), ("tokens", 1))]
            rows.append([name, *(f"{scale * mean:+.1f} ({scale * low:+.1f} to {scale * high:+.1f})"
                                 for (mean, low, high), scale in cells)])
    return [f"against {first}", "accuracy, points (95%)", "mean tokens (95%)"], rows


def training_part(name: str, at: Path, out: Path) -> dict:
    """Gather the curves of a stage and the health of its judge."""
    metrics = read_metrics(at / folder.METRICS)
    panels = {label: shown for label, names in PANELS.items() if (shown := [n for n in names if series(metrics, n)])}
    drawn = {"training": figures.curves(metrics, panels) if panels else None, "judge": figures.judged(metrics)}
    asked = [record for record in metrics if record.get("judge/comparisons")]
    columns = [key for key in JUDGE if series(asked, key)]
    means = [f"{statistics.fmean(y for _, y in series(asked, key)):.3g}" for key in columns]
    made = read_recipe(str(file))[""] if (file := at / folder.CONFIG).is_file() else {}
    judge = Path(made["judge_adapter"].text or at) if "judge_adapter" in made else at  # that it asked, or trained
    cards = (each / CARD for each in (at / folder.ADAPTER, judge / folder.ADAPTER, judge))
    return {"pictures": [picture(figure, f"{kind} {name}", out) for kind, figure in drawn.items() if figure],
            "trained_judge": judge_facts(next((read_json(card)["figures"] for card in cards if card.is_file()), {})),
            "judge": ([JUDGE[key] for key in columns], [means] if means else []),
            "judge_errors": sorted({record["judge/error"] for record in asked if record.get("judge/error")})[:3]}


def judge_facts(figures: dict) -> tuple[list[str], list[list[str]]]:
    """Word the figures of judges/measure.py as a table of one row, of none without any."""
    row = {name: "-" if (value := figures["grades"].get(key)) is None else f"{value:.3f}"
           for key, name in GRADES.items() if "grades" in figures}
    for kind, tally in figures.get("pairs", {}).items():
        if kind != "all":
            row |= {f"agreement, {kind}": percent(tally["agreement"]),
                    f"order conflicts, {kind}": percent(tally["order_conflicts"])}
    return list(row), [list(row.values())] if row else []


def picture(figure: figures.Figure, name: str, out: Path) -> str:
    """Draw a figure as SVG for the page, and as a PNG file beside it."""
    name = re.sub(r"\W+", "-", name.lower()).strip("-")
    figures.save_png(figure, out / PICTURES / f"{name}.png")
    return figures.svg(figure, name)


def side_by_side(records: dict[str, list[dict]]) -> list[dict]:
    """Choose a few problems with each model's first solution, those first that differ."""
    solutions = {name: {key: next((r for r in of_one if r["sample"] == 0), of_one[0])
                        for key, of_one in by_text(rows).items()} for name, rows in records.items()}
    every = list(solutions.values())
    shared = sorted(set.intersection(*map(set, every)), key=lambda key: (  # solved in the end, not at first; the others
        every[0][key]["correct"], not every[-1][key]["correct"], every[0][key]["number"]))
    return [{name: by_key[key] for name, by_key in solutions.items()} for key in spread(shared, SHOWN)]


def spread(items: list, count: int) -> list:
    """Take half of `count` from the front, the others evenly from what is left."""
    front, rest = items[:count // 2], items[count // 2:]
    return (front + rest[::max(1, len(rest) // (count - len(front)))])[:count]


def marked_lines(record: dict) -> list[tuple[str, bool | None]]:
    """Split a record's text into lines; with each whether its steps hold, None without any, or in a thought."""
    lines, left = [], thought_chars(record)
    for line in record["text"][:LONGEST].split("\n"):
        correct, total = check_steps(line[max(0, left):])
        lines.append((line, correct == total if total else None))
        left -= len(line) + 1
    return lines


# escapes whatever is put in, and takes a missing name for an error
TEMPLATES = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True,
                               lstrip_blocks=True, keep_trailing_newline=True, undefined=jinja2.StrictUndefined)
