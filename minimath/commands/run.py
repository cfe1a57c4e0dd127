"""Both stages and their evaluation from one recipe: what `minimath run` and `minimath demo` do.

    base -> eval;  base -> sft -> eval;  sft -> rlaif -> eval;  with full also base -> rlaif and sft -> rlaif (rules)

Each stage has its own folder in the run folder. A stage that is complete is not run again with resume=true.
"""
import contextlib
import dataclasses
import gc
import json
import time
from pathlib import Path

import torch

from minimath.report import figures
from minimath.core import dist
from minimath.core.run_folder import find_adapter
from minimath.config.load import load_config, save_config
from minimath.config.schema import EvalConfig, RLAIFConfig, SFTConfig
from minimath.core.errors import Interrupted, UserError
from minimath.eval.evaluate import COLUMNS, evaluate, row
from minimath.train.verifier import make_gate
from minimath.core.log import RunLog, fmt_duration
from minimath.report.page import write_page
from minimath.train.rewards import check_reward
from minimath.train.rlaif import rlaif
from minimath.core.files import write_whole
from minimath.core.run import PART, Stop, new_run_folder
from minimath.train.sft import sft

SUMMARY = "summary.json"  # in a stage's folder: the stage is complete


def run(recipe: str | None, overrides: list[str], *, full: bool = False, command: str = "run") -> dict:
    """Run the recipe. full adds RL without SFT and the paper's rules mode. Returns the summary.

    A signal ends the run with the stage's checkpoint, or the evaluation's completions, saved; `resume=true out=...`
    goes on.
    """
    sft_cfg = load_config(SFTConfig, recipe, overrides, allow_other=True)
    rl_cfg = load_config(RLAIFConfig, recipe, overrides, allow_other=True)
    check_reward(rl_cfg)  # a function that cannot be loaded should not be found out after the first stage
    make_gate(rl_cfg, None)
    eval_cfg = load_config(EvalConfig, recipe, [w for w in overrides if not w.startswith("limit=")], allow_other=True)
    if not (sft_cfg.data.source and rl_cfg.data.source and eval_cfg.data.source):
        raise UserError("a run needs training and held-out problems: set sft.data=, rlaif.data= and eval.data=")
    out = new_run_folder(sft_cfg.run.out, command)
    dist.barrier()  # until all have chosen the same folder, the first must not begin to fill it
    if dist.is_main() and out.exists() and any(out.glob("*/config.yaml")) and not sft_cfg.run.resume:
        raise UserError(f"{out} already holds a run; add resume=true to go on with it, or choose another out=")
    started = time.monotonic()
    with RunLog(out, f"minimath {command}") as log, how_to_go_on(log, command):
        for name, cfg in (("sft", sft_cfg), ("rlaif", rl_cfg), ("eval", eval_cfg)):
            if dist.is_main():
                save_config(cfg, out / f"{name}.yaml")
        rows = {"base": evaluation(eval_cfg, out / "eval-base", "")}
        after_sft = train_stage(sft, sft_cfg, out / "sft")
        rows["SFT"] = evaluation(eval_cfg, out / "eval-sft", after_sft)
        judged = {"judge": f"{rl_cfg.judge.name} judge", "rules": "paper's rules"}.get(rl_cfg.reward.name, rl_cfg.reward.name)
        after_rl = train_stage(rlaif, rl_cfg.replace(adapter=after_sft), out / "rlaif")
        rows[f"SFT + RLAIF ({judged})"] = evaluation(eval_cfg, out / "eval-rlaif", after_rl)
        if full:
            alone = train_stage(rlaif, rl_cfg.replace(adapter=sft_cfg.adapter.path), out / "rlaif-only")
            rows[f"RL only ({judged})"] = evaluation(eval_cfg, out / "eval-rlaif-only", alone)
            rules = rl_cfg.replace(adapter=after_sft, reward="paper",
                                        reward_parts=RLAIFConfig.reward_parts)
            rows["SFT + RL (paper's rules)"] = evaluation(eval_cfg, out / "eval-rules",
                                                          train_stage(rlaif, rules, out / "rules"))
        summary = {"rows": rows, "minutes": (time.monotonic() - started) / 60, "model": sft_cfg.model.name,
                   "problems": next(iter(rows.values()))["problems"]}
        if dist.is_main():
            write_whole(out / SUMMARY, json.dumps(summary, indent=1) + "\n")
            figures.save_png(figures.tradeoff(rows), out / "tradeoff.png")
            log.table(f"{summary['problems']} held-out problems", COLUMNS, [row(name, r) for name, r in rows.items()])
            report_page(out, log)
            log.say(f"{fmt_duration(60 * summary['minutes'])}; everything is in {out}")
    return summary


def report_page(out: Path, log: RunLog) -> None:
    """report.html of the whole run. Whatever fails is said, never raised: the run is complete without it."""
    try:
        log.say(f"report: {write_page([out], out)}")
    except Exception as error:
        log.say(f"report.html could not be written, everything else is saved ({type(error).__name__}: {error}); "
                f"minimath report {out} tries again")


@contextlib.contextmanager
def how_to_go_on(log: RunLog, command: str):
    """When a signal stops a stage, say the words that go on with the whole run: the stage names only its own folder."""
    try:
        yield
    except Interrupted:
        out = f"--out {log.run_dir}" if command == "demo" else f"out={log.run_dir}"
        log.say(f"the run goes on from there with the same command and {out} resume=true")
        raise


def train_stage(stage, cfg, out: Path) -> str:
    """Run one stage in its folder, or find it complete; returns the run folder as the next stage's adapter."""
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
    """Evaluate base + adapter, go on with an unfinished evaluation, or read the result of a complete one."""
    if dist.broadcast((out / "eval.json").exists()):
        return json.loads((out / "eval.json").read_text(encoding="utf-8"))
    resume = dist.broadcast(cfg.run.resume and (out / PART).exists())
    stop = Stop(0.0)
    summary = evaluate(cfg.replace(out=str(out), adapter=adapter, resume=resume), within=stop)
    free_memory()
    if stop.signal:  # it came when the last completion was there
        raise Interrupted(stop.signal)
    return summary


def free_memory() -> None:
    """Let go of the stage's model before the next one loads."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
