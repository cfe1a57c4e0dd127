"""Both stages and their evaluation from one recipe.

    minimath run RECIPE.yaml [key=value ...]

    base -> eval;  base -> sft -> eval;  sft -> judge, with a section judge_train;  sft -> rlaif -> eval
    with full (minimath demo --full) also base -> rlaif and sft -> rlaif with the paper's rewards, each with its eval

`sft.lr=1e-4` is for one stage, `lr=1e-4` for all. Each stage has its own folder in the run folder. With resume=true
out=FOLDER a run goes on, and a stage that is complete is not run again.

A recipe with a section judge_train (or words judge_train.key=value) trains a judge, on SFT's problems with RLAIF's
sampling where that section sets no others, and RLAIF asks it: judge=self judge_adapter=OUT/judge. Words that name
another judge, or any judge_adapter, leave that stage out."""
import contextlib
import gc
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch

from minimath.config.load import config_text, load_config, read_recipe, read_words, words_of_own_judge
from minimath.config.options import Stage
from minimath.config.schema import BY_JUDGE, EvalConfig, RLAIFConfig, SFTConfig
from minimath.core import dist, interrupt, run_folder
from minimath.core.errors import Interrupted, UserError
from minimath.core.files import read_json, write_whole
from minimath.core.log import RunLog, fmt_duration
from minimath.eval.evaluate import evaluate
from minimath.eval.metrics import COLUMNS, table_row
from minimath.judges.card import JudgeCard
from minimath.judges.rubrics import load_rubric
from minimath.report.page import judge_facts, write_page
from minimath.train.judge import JudgeConfig, judge_train
from minimath.train.rewards import make_reward
from minimath.train.rlaif import rlaif
from minimath.train.sft import sft
from minimath.train.verifier import Verifier


def run(recipe: str | None, overrides: list[str], *, full: bool = False, command: str = "run") -> dict:
    """Run the recipe; returns the summary, which is also in the run folder.

    full: add RL without SFT, and RL with the paper's rewards. A signal ends the run with the stage's checkpoint or the
    evaluation's completions saved. Raises UserError, and Interrupted after a signal."""
    out, cfgs = load_stages(recipe, overrides, command)
    dist.barrier()  # until all have chosen the same folder, the first must not begin to fill it
    held = run_folder.held_run(out) if dist.is_main() else None
    if held not in (None, run_folder.Held.WHOLE):
        raise UserError(f"{out} already holds {held.value} of its own; choose another out=")
    begun = any(out.glob(f"*/{run_folder.CONFIG}"))
    if dist.is_main() and begun and not cfgs["sft"].run.resume:
        raise UserError(f"{out} already holds a run; add resume=true to go on with it, or choose another out=")
    if dist.is_main():
        run_folder.refuse_foreign(out, *(f"{name}.yaml" for name in cfgs), run_folder.SUMMARY, run_folder.MINUTES)
    with RunLog(out, f"minimath {command}") as log, \
            how_to_go_on(log, command, minutes := clock(out / run_folder.MINUTES, log.say)):
        if cfgs["sft"].run.resume and not begun:
            log.say(f"{out} holds no run to go on with: beginning one")
        if trains_on(cfgs):
            log.say("warning: a stage trains on the rows of eval.data=, so accuracy there says little of other "
                    "problems: set eval.data= to held-out ones")
        for name, cfg in cfgs.items():
            keep_options(out, name, config_text(cfg), log.say)
        rows = run_arms(out, cfgs, full, minutes)
        summary = {"rows": rows, "minutes": minutes(), "model": cfgs["sft"].model.name,
                   "problems": rows["base"]["problems"]}
        if "judge" in cfgs:
            summary["judge"] = read_json(out / "judge" / run_folder.SUMMARY)["held_out"]
            log.table("the trained judge, on held-out problems of its training", *judge_facts(summary["judge"]))
        write_whole(out / run_folder.SUMMARY, json.dumps(summary, indent=1) + "\n")
        log.table(f"{summary['problems']} held-out problems", COLUMNS, [table_row(*row) for row in rows.items()])
        if dist.is_main():
            draw(run_folder.REPORT, lambda: write_page([out], out), log.say)
        log.say(f"{fmt_duration(60 * summary['minutes'])}; everything is in {out}")
    return summary


def trains_on(cfgs: dict[str, Stage]) -> bool:
    """Tell whether a stage's data and the evaluation's have one name, and so the same rows."""
    source, split = (held_out := cfgs["eval"].data).source, held_out.split
    no_split = Path(source).expanduser().is_file() or source.count(":") == 2  # a name that has its own
    return any(cfg.data.source == source and (no_split or cfg.data.split == split)
               for cfg in (cfgs["sft"], cfgs["rlaif"]))


def keep_options(out: Path, name: str, text: str, say: Callable[[str], None]) -> None:
    """Write a stage's options; those of a complete one stay, and others are said to change nothing."""
    path = out / f"{name}.yaml"
    if not ((out / name / run_folder.SUMMARY).exists() and path.exists()):
        return write_whole(path, text)
    before = path.read_text(encoding="utf-8").splitlines()
    if new := [line for line in text.splitlines() if line not in before and not line.startswith("resume:")]:
        say(f"{name} is complete, and not run again with {', '.join(new)}: for that choose another out=")


def load_stages(recipe: str | None, words: list[str], command: str) -> tuple[Path, dict[str, Stage]]:
    """Read the run folder and all stages' options. UserError: what would fail later."""
    if recipe is None:
        raise UserError("minimath run needs a recipe: minimath run RECIPE.yaml [key=value ...]")
    sft_cfg = load_config(SFTConfig, recipe, words, allow_other=True)
    out = run_folder.new_run_folder(sft_cfg.run.out, command, resume=sft_cfg.run.resume)
    own = words_of_own_judge(recipe, words, out / "judge")
    rl_cfg = load_config(RLAIFConfig, recipe, own + words, allow_other=True)
    # limit= is for the training problems, eval.limit= for the others
    held_out = [word for word in words if not word.removeprefix("--").startswith("limit=")]
    cfgs = {"sft": sft_cfg, "rlaif": rl_cfg, "eval": load_config(EvalConfig, recipe, held_out, allow_other=True)}
    if own and rl_cfg.uses_judge():
        cfgs["judge"] = judge_config(recipe, words, sft_cfg, rl_cfg)
    if not all(cfg.data.source for cfg in cfgs.values()):
        raise UserError("a run needs training and held-out problems: set sft.data=, rlaif.data= and eval.data=")
    if cfgs["eval"].suite:
        raise UserError("a run evaluates on the problems of eval.data=: leave suite= out, it is for minimath eval")
    make_reward(rl_cfg, None)  # functions of the user's that can't be loaded
    Verifier(rl_cfg.verifier)
    return out, cfgs


def judge_config(recipe: str, words: list[str], sft_cfg: SFTConfig, rl_cfg: RLAIFConfig) -> JudgeConfig:
    """Read judge_train's options. Raises UserError.

    Where it says nothing of them, its data is SFT's, whose solutions teach it as well, and it samples as RLAIF does."""
    if dist.world() > 1:
        raise UserError("a judge is trained by one process: train it first with minimath judge train, then give its "
                        "folder as judge_adapter=")
    cfg = load_config(JudgeConfig, recipe, words, "judge_train", allow_other=True)
    own = {*read_recipe(recipe).get("judge_train", ()), *read_words(words).get("judge_train", ())}
    taken = rl_cfg.shared(JudgeConfig, "model", "prompt", "engine", "sampling")
    if "data" not in own:  # the split of other data is its own
        taken |= sft_cfg.shared(JudgeConfig, "data")
    load_rubric(cfg.rubric)
    JudgeCard(form=cfg.form).form_of(rl_cfg.judge.form)
    if rl_cfg.verifier in BY_JUDGE and cfg.form == "pair":
        raise UserError(f"verifier={rl_cfg.verifier} needs a judge that grades: set judge_train.form=single")
    return cfg.replace(**{name: value for name, value in taken.items() if name not in own})


def clock(path: Path, say: Callable[[str], None]) -> Callable[[], float]:
    """Make a function that keeps in a file, and returns, a run's minutes, those of earlier processes included."""
    started, before = time.monotonic(), 0.0
    try:
        before = float(path.read_text(encoding="utf-8")) if path.exists() else 0.0
    except ValueError:
        say(f"{path} is damaged: the minutes of this run are counted from here on")

    def minutes() -> float:
        now = before + (time.monotonic() - started) / 60
        write_whole(path, f"{now:.3f}\n")
        return now
    return minutes


def run_arms(out: Path, cfgs: dict[str, Stage], full: bool, minutes: Callable[[], float]) -> dict[str, dict]:
    """Train and evaluate what is to be compared: name -> summary of the evaluation.

    minutes: called after each part, to keep what a killed process took."""
    rl_cfg, rows, after_sft = cfgs["rlaif"], {}, str(out / "sft")
    judge, reward = "trained" if rl_cfg.judge.adapter else rl_cfg.judge.name, rl_cfg.reward.name
    judge = judge if rl_cfg.uses_judge() else "no"
    judged = {"judge": f" ({judge} judge)", "paper": " (paper's rewards)"}.get(reward, f" ({reward})")

    def trained(name: str, stage, cfg) -> str:
        summary = out / name / run_folder.SUMMARY
        if not dist.broadcast(summary.exists()):
            write_whole(summary, json.dumps(part(stage, cfg, out / name), indent=1) + "\n")
            minutes()
            dist.barrier()  # for the adapter, which the first process writes
        return str(out / name)

    def arm(name: str, stage=None, cfg=None, note: str = "") -> None:
        cfg = cfgs["eval"].replace(adapter=trained(name, stage, cfg) if stage else "")
        rows[run_folder.ARMS[name] + note] = part(evaluate, cfg, run_folder.evaluation_folder(out, name))
        minutes()

    arm("base")
    arm("sft", sft, cfgs["sft"])
    if "judge" in cfgs:
        trained("judge", judge_train, cfgs["judge"].replace(adapter=after_sft))
    arm("rlaif", rlaif, rl_cfg.replace(adapter=after_sft), judged)
    if full:
        arm("rlaif-only", rlaif, rl_cfg.replace(adapter=cfgs["sft"].adapter.path), judged)
        arm("paper", rlaif, rl_cfg.replace(
            adapter=after_sft, reward="paper", judge_refresh=0, brevity="ratio", brevity_limit=0, teacher="",
            teacher_system="", scale_advantage="group"))
    return rows


def part(work, cfg, out: Path) -> dict:
    """Run a stage or an evaluation in its folder, or go on there. Raises Interrupted."""
    summary = work(cfg.replace(out=str(out), resume=dist.broadcast(cfg.run.resume and out.exists())))
    gc.collect()  # its model goes before the next one loads
    torch.cuda.empty_cache()
    if number := summary.get("signal") or interrupt.requested():
        raise Interrupted(number)
    return summary


@contextlib.contextmanager
def how_to_go_on(log: RunLog, command: str, minutes: Callable[[], float]):
    """Notice signals between stages too, and say how to go on. Raises Interrupted."""
    try:
        with interrupt.interruptible(run_folder.stop_files(log.run_dir), log.say):
            yield
    except Interrupted:
        minutes()
        log.say(f"minimath {command} goes on from there with the same words and out={log.run_dir} resume=true")
        raise


def draw(what: str, write: Callable[[], Path], say: Callable[[str], None]) -> None:
    """Write a page, and say where it is or why it failed; never raises."""
    try:
        say(f"{what}: {write()}")
    except Exception as error:
        say(f"{what} could not be written, everything else is saved ({type(error).__name__}: {error}); "
            "minimath report RUN tries again")
