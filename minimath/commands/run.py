"""Both stages and their evaluation from one recipe.

    minimath run RECIPE.yaml [key=value ...]

    base -> eval;  base -> sft -> eval;  sft -> rlaif -> eval
    with full (minimath demo --full) also base -> rlaif and sft -> rlaif with the paper's rewards, each with its eval

`sft.lr=1e-4` is for one stage, `lr=1e-4` for both. Each stage has its own folder in the run folder. With resume=true
out=FOLDER a run goes on, and a stage that is complete is not run again.
"""
import contextlib
import gc
import json
import time
from pathlib import Path

import torch

from minimath.commands.train import rlaif, sft
from minimath.config.load import load_config, save_config
from minimath.config.schema import EvalConfig, RLAIFConfig, SFTConfig
from minimath.core import dist, interrupt, run_folder
from minimath.core.errors import Interrupted, UserError
from minimath.core.files import read_json, write_whole
from minimath.core.log import RunLog, fmt_duration
from minimath.core.run_folder import CONFIG, EVAL, EVAL_CONFIG, PART, SUMMARY, find_adapter, new_run_folder, stop_files
from minimath.eval.evaluate import evaluate
from minimath.eval.metrics import COLUMNS, table_row
from minimath.report import figures
from minimath.report.page import write_page
from minimath.train.rewards import make_reward
from minimath.train.verifier import Verifier


def run(recipe: str, overrides: list[str], *, full: bool = False, command: str = "run") -> dict:
    """Run the recipe; returns the summary, which is also in the run folder.

    full: add RL without SFT, and RL with the paper's rewards. A signal ends the run with the stage's checkpoint or the
    evaluation's completions saved. Raises UserError, and Interrupted after a signal.
    """
    sft_cfg, rl_cfg, eval_cfg = load_stages(recipe, overrides)
    out = new_run_folder(sft_cfg.run.out, command)
    dist.barrier()  # until all have chosen the same folder, the first must not begin to fill it
    if dist.is_main() and any(out.glob(f"*/{CONFIG}")) and not sft_cfg.run.resume:
        raise UserError(f"{out} already holds a run; add resume=true to go on with it, or choose another out=")
    started = time.monotonic()
    with RunLog(out, f"minimath {command}") as log, how_to_go_on(log, command):
        for name, cfg in (("sft.yaml", sft_cfg), ("rlaif.yaml", rl_cfg), (EVAL_CONFIG, eval_cfg)):
            if dist.is_main():
                save_config(cfg, out / name)
        rows = run_arms(out, sft_cfg, rl_cfg, eval_cfg, full)
        summary = {"rows": rows, "minutes": (time.monotonic() - started) / 60, "model": sft_cfg.model.name,
                   "problems": next(iter(rows.values()))["problems"]}
        if dist.is_main():
            write_whole(out / SUMMARY, json.dumps(summary, indent=1) + "\n")
            figures.save_png(figures.tradeoff(rows), out / "tradeoff.png")
            log.table(f"{summary['problems']} held-out problems", COLUMNS, [table_row(*row) for row in rows.items()])
            report_page(out, log)
            log.say(f"{fmt_duration(60 * summary['minutes'])}; everything is in {out}")
    return summary


def load_stages(recipe: str, overrides: list[str]) -> tuple[SFTConfig, RLAIFConfig, EvalConfig]:
    """Read the options of all stages, and find out now what would fail later.

    Raises UserError.
    """
    sft_cfg, rl_cfg = (load_config(cls, recipe, overrides, allow_other=True) for cls in (SFTConfig, RLAIFConfig))
    # limit= is for the training problems, eval.limit= for the others
    eval_cfg = load_config(EvalConfig, recipe, [w for w in overrides if not w.startswith("limit=")], allow_other=True)
    if not (sft_cfg.data.source and rl_cfg.data.source and eval_cfg.data.source):
        raise UserError("a run needs training and held-out problems: set sft.data=, rlaif.data= and eval.data=")
    make_reward(rl_cfg, None)  # functions of the user's that can't be loaded
    Verifier(rl_cfg.verifier)
    return sft_cfg, rl_cfg, eval_cfg


def run_arms(out: Path, sft_cfg: SFTConfig, rl_cfg: RLAIFConfig, eval_cfg: EvalConfig, full: bool) -> dict[str, dict]:
    """Train and evaluate what is to be compared: name -> summary of the evaluation."""
    reward = rl_cfg.reward.name
    judged = {"judge": f"{rl_cfg.judge.name} judge", "paper": "paper's rewards"}.get(reward, reward)
    rows = {"base": evaluation(eval_cfg, run_folder.evaluation_folder(out, "base"), "")}

    def arm(name: str, stage, cfg, how: str = "") -> str:
        adapter = train_stage(stage, cfg, out / name)
        rows[run_folder.ARMS[name] + how] = evaluation(eval_cfg, run_folder.evaluation_folder(out, name), adapter)
        return adapter

    after_sft = arm("sft", sft, sft_cfg)
    arm("rlaif", rlaif, rl_cfg.replace(adapter=after_sft), f" ({judged})")
    if full:
        arm("rlaif-only", rlaif, rl_cfg.replace(adapter=sft_cfg.adapter.path), f" ({judged})")
        arm("paper", rlaif, rl_cfg.replace(adapter=after_sft, reward="paper"))
    return rows


def train_stage(stage, cfg, out: Path) -> str:
    """Run one stage, or find it complete; returns its folder, the next one's adapter."""
    if dist.broadcast((out / SUMMARY).exists()):
        find_adapter(out)
        return str(out)
    result = stage(cfg.replace(out=str(out), resume=dist.broadcast(cfg.run.resume and out.exists())))
    free_memory()
    if result["signal"]:
        raise Interrupted(result["signal"])
    write_whole(out / SUMMARY, json.dumps(result, indent=1) + "\n")
    dist.barrier()  # for the adapter, which the first process writes
    return str(out)


def evaluation(cfg: EvalConfig, out: Path, adapter: str) -> dict:
    """Evaluate base and adapter, go on with it, or read the result of a complete one."""
    if dist.broadcast((out / EVAL).exists()):
        return read_json(out / EVAL)
    resume = dist.broadcast(cfg.run.resume and (out / PART).exists())
    summary = evaluate(cfg.replace(out=str(out), adapter=adapter, resume=resume))
    free_memory()
    if number := interrupt.requested():  # it came when the last completion was there
        raise Interrupted(number)
    return summary


def free_memory() -> None:
    """Let go of the stage's model before the next one loads."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextlib.contextmanager
def how_to_go_on(log: RunLog, command: str):
    """Notice signals between the stages too, and say after one how the run goes on.

    A stage names only its own folder. Raises Interrupted.
    """
    try:
        with interrupt.interruptible(stop_files(log.run_dir), log.say):
            yield
    except Interrupted:
        out = f"--out {log.run_dir}" if command == "demo" else f"out={log.run_dir}"
        log.say(f"the run goes on from there with the same command and {out} resume=true")
        raise


def report_page(out: Path, log: RunLog) -> None:
    """Write report.html of the run. What fails is said, never raised: all else is saved."""
    try:
        log.say(f"report: {write_page([out], out)}")
    except Exception as error:
        log.say(f"report.html could not be written, everything else is saved ({type(error).__name__}: {error}); "
                f"minimath report {out} tries again")
