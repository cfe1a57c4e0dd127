"""A long run does not grow: memory, Python objects, open files and threads stay as they are, and checkpoints rotate.

Each stage runs in a child on the tiny model, with checkpoints, evaluations, samples and a judge at work; it notes its
resident memory, its tracked objects, its open files and its threads as it goes. The run's second and last quarters are
compared: what a step leaves behind adds up between them.
"""
import gc
import json
import os
import statistics
import sys
from pathlib import Path

from harness import Tally, model_and_data, run_child
from toy import make_config, metrics

MEMORY_BYTES = 8 << 20  # between the quarters: the allocator's noise is below it, 8 KB a step of 2,000 steps is above
OBJECTS_A_STEP = 0.5
OBJECTS = 32  # what a first evaluation or plot leaves for good: in a short run it weighs more than the steps
NOTES = 40  # evenly over the run; a full collection of garbage goes before each
LOG_BYTES_A_STEP = 4096
STEPS = {"sft": (2000, 80), "rlaif": (500, 40)}  # full, fast


def run(full: bool, folder: Path) -> list[Tally]:
    model, data = model_and_data(folder, n=16)  # all are seen before the second quarter: solve rates are kept of each
    return [long_run(stage, full, model, data, folder) for stage in STEPS]


def long_run(stage: str, full: bool, model: str, data: str, folder: Path) -> Tally:
    steps = STEPS[stage][0 if full else 1]
    tally = Tally(f"{stage}, {steps:,} steps: {'memory, ' * full}objects, open files, threads, logs, checkpoints")
    out = folder / stage
    notes = folder / f"{stage}.json"
    words = (stage, str(model), data, str(out), str(steps), str(notes))
    status, said = run_child(*words, module="long_run", timeout_s=1800)
    if status:
        tally.add(False, f"ended with status {status}: {said[-300:]}")
        return tally
    seen = json.loads(notes.read_text())
    early, late = seen[len(seen) // 4:len(seen) // 2], seen[-(len(seen) // 4):]
    grown = {name: statistics.median(s[name] for s in late) - statistics.median(s[name] for s in early)
             for name in seen[0]}
    tally.add(len(seen) >= NOTES, f"the run ended after {len(seen)} of {NOTES} notes")
    if full:  # a short run is still filling the allocator's buffers
        tally.add(grown["memory"] < MEMORY_BYTES, f"resident memory grew by {grown['memory'] / 2**20:.1f} MB")
    tally.add(grown["objects"] < max(OBJECTS, OBJECTS_A_STEP * steps / 2), f"{grown['objects']} more Python objects")
    tally.add(grown["files"] <= 0, f"{grown['files']} more open files")
    tally.add(grown["threads"] <= 0, f"{grown['threads']} more threads")
    logs = sum(path.stat().st_size for path in out.glob("*.jsonl"))
    tally.add(logs < LOG_BYTES_A_STEP * steps, f"{logs / steps:.0f} bytes of logs a step")
    tally.add(len(metrics(out)) >= steps, f"metrics.jsonl has {len(metrics(out))} lines")
    kept = [path for path in (out / "checkpoints").iterdir() if path.is_dir()]
    tally.add(len(kept) <= 4, f"{len(kept)} checkpoints are left")  # three newest and the best
    return tally


# ---- the child

def note(seen: list[dict]) -> None:
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    seen.append({"memory": pages * os.sysconf("SC_PAGE_SIZE"), "objects": len(gc.get_objects()),
                 "files": len(os.listdir("/proc/self/fd")), "threads": len(os.listdir("/proc/self/task"))})


def child(stage: str, model: str, data: str, out: str, steps: int, notes: str) -> None:
    """Run the stage, noting what the process holds after every steps / NOTES steps."""
    from minimath.config.schema import RLAIFConfig, SFTConfig
    from minimath.train import optimizer
    from minimath.train.monitor import CollapseMonitor
    from minimath.train.rlaif import rlaif
    from minimath.train.sft import sft
    seen: list[dict] = []
    loop, name = (optimizer, "clip_and_step") if stage == "sft" else (CollapseMonitor, "check")  # each once a step
    real, done = getattr(loop, name), 0

    def noted(*args, **options):
        nonlocal done
        result, done = real(*args, **options), done + 1
        if done % (steps // NOTES) == 0:
            note(seen)
        return result

    setattr(loop, name, noted)
    # in a full run five of them come before the second quarter: the allocator keeps what they took
    often = steps // (20 if steps >= STEPS["rlaif"][0] else 4)
    shared = {"out": out, "data": data, "eval_data": data, "eval_limit": 4, "steps": steps, "save_every": often // 2,
              "eval_every": often, "lora_r": 4, "sample_every": often, "lr": 1e-4}
    if stage == "sft":
        sft(make_config(SFTConfig, model, batch_size=2, eval_max_new_tokens=8, **shared))
    else:  # verifier=none: a random model is never right, and groups without a difference are not trained on
        rlaif(make_config(RLAIFConfig, model, prompts_per_step=2, group_size=3, max_new_tokens=8, judge="self",
                          verifier="none", overlong="none", judge_canary_every=often, **shared))
    Path(notes).write_text(json.dumps(seen))


if __name__ == "__main__":
    stage_, model_, data_, out_, steps_, notes_ = sys.argv[1:]
    child(stage_, model_, data_, out_, int(steps_), notes_)
