"""report.html: a run, or several beside each other, on one page that needs nothing else.

    minimath report runs/demo-... [runs/other ...] [out=FOLDER]

A run folder is one of `minimath run` or `minimath demo`, of a single stage, of an evaluation or of a suite of them;
suites beside each other are compared set by set. The page holds the two stages (accuracy against tokens), training
curves, lengths, problems solved by each model with every step marked, the judge's health, all settings and the command.
Pictures are inline SVG in the page's own colours, and PNG files beside it. Texts of models and data are escaped, and
the page's policy allows no script and no address at all.
"""
import base64
import contextlib
import html
import json
import sys
from pathlib import Path

from minimath.report import figures
from minimath.core.errors import UserError
from minimath.core.stats import paired
from minimath.eval.evaluate import COLUMNS, read_records
from minimath.eval.evaluate import row as table_row
from minimath.report.metrics import read_metrics
from minimath.core.files import write_whole
from minimath.grading.steps import check_steps
from minimath.eval.suite import SUITE, suite_table

PAGE, PICTURES = "report.html", "plots"
MODELS = {"eval-base": "base", "eval-sft": "SFT", "eval-rlaif": "SFT + RLAIF", "eval-rlaif-only": "RL only",
          "eval-rules": "SFT + RL (paper's rules)"}
STAGES = {"sft": "SFT", "rlaif": "RLAIF", "rlaif-only": "RL only", "rules": "RL (paper's rules)"}
PANELS = {"SFT": [("loss", ["loss"]), ("gradient norm", ["grad_norm"]), ("held-out accuracy", ["eval_accuracy"])],
          "RL": [("reward", ["reward"]), ("share", ["right", "ended", "eval_accuracy"]),
                 ("tokens", ["mean_tokens", "right_tokens"]), ("nats a token", ["entropy", "surprisal"])]}
JUDGE = {"judge_comparisons": "comparisons", "judge_no_votes": "without a vote", "judge_position_bias": "position bias",
         "judge_order_conflicts": "order conflicts", "judge_misfit": "misfit", "judge_seconds": "seconds"}
SHOWN = 6  # problems
LONGEST = 3000  # characters of a solution shown

STYLE = Path(__file__).with_name("page.css")


def report(words: list[str]) -> dict:
    """The command: writes the page of the run folders named. Returns {"page": path}. Raises UserError."""
    folders = [Path(word) for word in words if "=" not in word]
    options = dict(word.split("=", 1) for word in words if "=" in word)
    if unknown := set(options) - {"out"}:
        raise UserError(f"minimath report takes run folders and out=FOLDER, not {', '.join(sorted(unknown))}=")
    if not folders:
        raise UserError("minimath report needs a run folder: minimath report runs/demo-...")
    page = write_page(folders, Path(options.get("out") or folders[0]))
    print(f"{page}; its pictures are in {page.parent / PICTURES}")
    return {"page": str(page)}


def write_page(folders: list[Path], out: Path) -> Path:
    """report.html in `out`, of one run folder or several. UserError for a folder that holds nothing to report."""
    evaluations, stages, suites = {}, {}, {}
    for folder in folders:
        if (folder / SUITE).is_file():
            suites[folder.name if sum(f.name == folder.name for f in folders) == 1 else str(folder)] = folder
            continue
        prefix = f"{folder.name}: " if len(folders) > 1 else ""
        found = evaluations_of(folder), stages_of(folder)
        if not any(found):
            raise UserError(f"{folder}: no evaluation and no training to report (a folder of minimath run, demo, sft, "
                            f"rlaif or eval is expected; of a suite, one with {SUITE}: its last set is complete)")
        evaluations |= {prefix + name: at for name, at in found[0].items()}
        stages |= {prefix + name: at for name, at in found[1].items()}
    out.mkdir(parents=True, exist_ok=True)
    (out / PICTURES).mkdir(exist_ok=True)
    parts = [header(folders, evaluations), *evaluation_parts(evaluations, out), *suite_parts(suites, out),
             *training_parts(stages, out), settings_part(folders, stages)]
    body = "\n".join(part for part in parts if part)
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    write_whole(out / PAGE, f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{text(folders[0].name)}: minimath report</title>
<style>
{STYLE.read_text(encoding='utf-8')}</style></head><body>
{body}
</body></html>
""")
    return out / PAGE


def text(value) -> str:
    return html.escape(str(value), quote=True)


# ---- what the folders hold

def evaluations_of(folder: Path) -> dict[str, Path]:
    """Name -> folder of each complete evaluation, in the order of the stages."""
    if (folder / "eval.json").is_file():
        return {folder.name: folder}
    return {name: folder / part for part, name in MODELS.items() if (folder / part / "eval.json").is_file()}


def stages_of(folder: Path) -> dict[str, Path]:
    """Name -> folder of each stage that has metrics."""
    if (folder / "metrics.jsonl").is_file():
        rl = any("reward" in m for m in read_metrics(folder / "metrics.jsonl"))
        return {"RLAIF" if rl else "SFT": folder}
    return {name: folder / part for part, name in STAGES.items() if (folder / part / "metrics.jsonl").is_file()}


def completions(folder: Path) -> list[dict]:
    return read_records(folder) if (folder / "completions.jsonl").is_file() else []


def environment_of(folder: Path) -> dict:
    try:
        return json.loads((folder / "environment.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


# ---- parts of the page

def header(folders: list[Path], evaluations: dict[str, Path]) -> str:
    started = environment_of(folders[0]).get("started", "")
    lines = [f"<h1>{text(', '.join(f.name for f in folders))}</h1>"]
    rows = [json.loads((at / "eval.json").read_text(encoding="utf-8")) for at in evaluations.values()]
    if len(rows) > 1 and len(folders) == 1:
        first, last = rows[0], rows[min(2, len(rows) - 1)]
        lines.append(f"<p>Accuracy {100 * first['accuracy']:.1f}% to {100 * last['accuracy']:.1f}%, mean tokens "
                     f"{first['mean_tokens']:.0f} to {last['mean_tokens']:.0f}, on {first['problems']} problems.</p>")
    return "\n".join([*lines, f'<p class="dim">{text(started)}</p>' if started else ""])


def suite_parts(suites: dict[str, Path], out: Path) -> list[str]:
    """The table of each suite, then set by set what evaluation_parts shows, the suites beside each other."""
    parts: list[str] = []
    sets: dict[str, dict[str, Path]] = {}
    for label, folder in suites.items():
        result = json.loads((folder / SUITE).read_text(encoding="utf-8"))
        parts += [f"<h2>Suite: {text(label)}</h2>", html_table(*suite_table(result)),
                  '<p class="dim">In the mean each set counts the same.</p>']
        for name in result["sets"]:
            sets.setdefault(name, {})[label] = folder / name
    for name, evaluations in sets.items():
        parts += evaluation_parts(evaluations, out, name)
    return parts


def evaluation_parts(evaluations: dict[str, Path], out: Path, of_set: str = "") -> list[str]:
    """Table, pictures, differences and solutions of evaluations on the same problems. of_set: of a suite."""
    if not evaluations:
        return []
    tail = f"-{of_set}" if of_set else ""  # of the names of pictures, which must differ
    rows = {name: json.loads((at / "eval.json").read_text(encoding="utf-8")) for name, at in evaluations.items()}
    records = {name: completions(at) for name, at in evaluations.items()}
    parts = [f"<h2>{text(of_set) or 'Evaluation'}</h2>",
             html_table(COLUMNS, [table_row(name, r) for name, r in rows.items()]),
             '<p class="dim">Right steps are a tripwire, not a score: most wrong solutions pass it too.</p>',
             picture(figures.tradeoff(rows), f"tradeoff{tail}", out, "Accuracy against tokens")]
    if len(rows) >= 3 and not of_set:
        parts.append(picture(figures.beside_paper(rows), "beside-paper", out, "The two stages beside the paper's, each "
                             "relative to the model before them (arXiv 2507.08267; another scale, the same shape)"))
    if any(records.values()):
        parts.append(differences(records))
        there = {name: found for name, found in records.items() if found}
        parts += [picture(figures.lengths(there), f"lengths{tail}", out, "Lengths of solutions"), side_by_side(there)]
    return parts


def differences(records: dict[str, list[dict]]) -> str:
    """Each evaluation against the first one that has completions, on the problems that both have."""
    (first, base), *others = [(name, rows) for name, rows in records.items() if rows]
    rows = []
    for name, mine in others:
        with contextlib.suppress(UserError):  # other problems: nothing to compare
            cells = [(paired(mine, base, what), scale) for what, scale in (("right", 100), ("tokens", 1))]
            rows.append([name, *(f"{scale * mean:+.1f} ({scale * low:+.1f} to {scale * high:+.1f})"
                                 for (mean, low, high), scale in cells)])
    return html_table([f"against {first}", "accuracy, points (95%)", "mean tokens (95%)"], rows) if rows else ""


def training_parts(stages: dict[str, Path], out: Path) -> list[str]:
    parts = []
    for name, at in stages.items():
        metrics = read_metrics(at / "metrics.jsonl")
        panels = [(label, [n for n in names if any(isinstance(m.get(n), (int, float)) for m in metrics)])
                  for label, names in PANELS["RL" if any("reward" in m for m in metrics) else "SFT"]]
        panels = [(label, names) for label, names in panels if names]
        if panels:
            parts += [f"<h2>Training: {text(name)}</h2>",
                      picture(figures.curves(metrics, panels), f"training-{name}", out)]
        if (at / "judge.png").is_file():  # made by the run where canary pairs were judged
            data = base64.b64encode((at / "judge.png").read_bytes()).decode()
            parts.append(f'<figure><img alt="wins of wrong solutions" src="data:image/png;base64,{data}"></figure>')
        judged = [m for m in metrics if m.get("judge_comparisons")]
        if judged:
            mean = {key: sum(m.get(key) or 0 for m in judged) / len(judged) for key in JUDGE}
            parts += ["<h3>The judge, per step</h3>",
                      html_table([*JUDGE.values()], [[f"{mean[key]:.3g}" for key in JUDGE]])]
            errors = {m["judge_error"] for m in judged if m.get("judge_error")}
            parts += [f'<p class="wrong">{text(error)}</p>' for error in sorted(errors)[:3]]
    return parts


def settings_part(folders: list[Path], stages: dict[str, Path]) -> str:
    parts = ["<h2>How it was made</h2>"]
    for folder in folders:
        facts = environment_of(folder)
        if facts.get("command"):
            words = ["minimath", *facts["command"][1:]]
            parts.append(f"<pre>{text(' '.join(words))}</pre>")
    files = [path for folder in [*folders, *stages.values()] for path in sorted(folder.glob("*.yaml"))]
    for path in dict.fromkeys(files):
        content = path.read_text(encoding="utf-8", errors="replace")
        parts.append(details(f"{path.parent.name}/{path.name}", content))
    for folder in folders:
        parts.append(details(f"{folder.name}: environment", json.dumps(environment_of(folder), indent=1)))
    return "\n".join(parts)


def details(title: str, content: str) -> str:
    return f"<details><summary>{text(title)}</summary><pre>{text(content)}</pre></details>"


def html_table(columns: list[str], rows: list[list]) -> str:
    head = "".join(f"<th>{text(c)}</th>" for c in columns)
    body = "".join("<tr>" + "".join(f"<td>{text(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def picture(figure, name: str, out: Path, caption: str = "") -> str:
    """The figure inline, and as a PNG file beside the page."""
    name = "".join(c if c.isalnum() else "-" for c in name.lower())
    figures.save_png(figure, out / PICTURES / f"{name}.png")
    words = f'<figcaption class="dim">{text(caption)}</figcaption>' if caption else ""
    return f"<figure>{figures.svg(figure, name)}{words}</figure>"


# ---- problems side by side

def side_by_side(records: dict[str, list[dict]]) -> str:
    """A few problems with the first solution of each model, steps marked; those first where the models differ."""
    solutions = {name: {r["number"]: r for r in rows if r["sample"] == 0} for name, rows in records.items()}
    first = next(iter(solutions.values()))
    shared = [n for n in first if all(n in by_number for by_number in solutions.values())]

    def order(number: int):
        verdicts = [by_number[number]["right"] for by_number in solutions.values()]
        return verdicts[0], not verdicts[-1], number  # solved in the end but not at first, then the others

    blocks = [f"<h2>{'The same problems, model by model' if len(solutions) > 1 else 'Solutions'}</h2>"]
    for number in spread(sorted(shared, key=order), SHOWN):
        record = first[number]
        cards = "".join(solution_card(name, by_number[number]) for name, by_number in solutions.items())
        blocks.append(f'<h3>{text(record["problem"][:LONGEST])}</h3><p class="dim">answer: {text(record["gold"])}</p>'
                      f'<div class="solutions">{cards}</div>')
    return "\n".join(blocks)


def spread(items: list, count: int) -> list:
    """Half of `count` from the front, the others evenly from what is left."""
    front, rest = items[:count // 2], items[count // 2:]
    left = count - len(front)
    return front + [rest[i * len(rest) // left] for i in range(min(left, len(rest)))]


def solution_card(name: str, record: dict) -> str:
    verdict = '<span class="right">right</span>' if record["right"] else '<span class="wrong">wrong</span>'
    cut = "" if record["ended"] else ", cut"
    lines = "\n".join(marked(line) for line in record["text"][:LONGEST].split("\n"))
    size = f'<span class="dim">{record["tokens"]} tokens{cut}</span>'
    return f'<div class="solution"><h4>{text(name)}: {verdict} {size}</h4><div class="text">{lines}</div></div>'


def marked(line: str) -> str:
    """A line of a solution, escaped, with what its arithmetic steps are."""
    steps = check_steps(line)
    if not steps.total:
        return text(line)
    mark = ("right", "&#10003;") if steps.right == steps.total else ("wrong", "&#10007;")
    return f'{text(line)} <span class="{mark[0]}">{mark[1]}</span>'


if __name__ == "__main__":
    from minimath.cli import dispatch, run_command
    sys.exit(run_command(lambda: dispatch("report", sys.argv[1:])))
