"""Rollouts and SFT steps on a quiet machine, and beside one busy process for every core but one.

    python -m bench.busy                       # SmolLM2-135M on all cores of this machine's CPU, some 8 minutes

Two workers take turns (bench.turns): `follows` is minimath as its command line runs it (threads follow what others
leave free, core/threads.py; short spins, core/entry.py); `fixed` is torch's own choice: as many threads as cores, and
spins of libgomp's default length. A round of a worker is a part of a rollout (64 prompts x 64 samples, as many side by
side as minimath takes by itself: 128) and SFT steps over one batch of 8 made problems, with nothing beside, then with
the busy processes. The first --settle seconds of each are not counted.

tokens/s of the rollout, seconds per SFT step: medians over rounds. slower: busy against quiet of that worker, paired by
round. A round begins when nothing else runs, or after --patience seconds. others: cores that other processes used, by
/proc/stat; above 0.2 while quiet, the figures are not those of a quiet machine. threads: at the end. Linux only. Writes
bench/results/busy-cpu.json.
"""
import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import time

import minimath.core.entry  # noqa: F401  before torch: it sets how long threads spin
from bench import train, turns
from bench.measure import RESULTS, machine, positive

PROMPTS, SAMPLES, BATCH = 64, 64, 8
VARIANTS = {"follows": {}, "fixed": {"OMP_NUM_THREADS": str(os.cpu_count()), "GOMP_SPINCOUNT": "300000"}}


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = train.common_parser("busy", __doc__, peers=False)
    parser.add_argument("--rounds", type=positive, default=3, help="rounds of each worker")
    parser.add_argument("--seconds", type=float, default=8.0, help="measured, of each of the four parts of a round")
    parser.add_argument("--settle", type=float, default=8.0, help="before them")
    parser.add_argument("--patience", type=float, default=120.0, help="longest wait for a quiet machine")
    return parser.parse_args(words)


@contextlib.contextmanager
def busy_processes(count: int):
    beside = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for each in beside:
            each.kill()
            each.wait()


# ---- a worker

def run_worker(spec: dict, pause) -> None:
    import torch

    from bench.train_worker import config_of, examples_of, touch
    from minimath.config.schema import SamplingOptions
    from minimath.core.threads import cpu_seconds
    from minimath.data.chat import encode
    from minimath.models.policy import load_policy
    from minimath.rollout.open import open_engine
    from minimath.train.optimizer import Optimizer
    from minimath.train.sft import update
    cfg = config_of(spec)
    policy = load_policy(cfg, train=True)
    touch(policy.model)
    optimizer, examples = Optimizer(policy, cfg, print), examples_of("minimath", PROMPTS)
    rows = [encode(policy.tokenizer, each, prompt_template="{problem}", max_len=cfg.max_len) for each in examples]
    sampling = SamplingOptions(temperature=1.0, max_new_tokens=spec["max_new_tokens"])

    def rollout():
        """Tokens sampled so far, after every decode step."""
        done, prompts = 0, [policy.prompt_ids(each) for each in examples]
        with open_engine(cfg.engine, sampling, policy) as engine:
            for finished in engine.stream(prompts, SAMPLES):
                done += sum(len(sample.ids) for *_, sample in finished)
                yield done + sum(len(ids) for *_, ids in engine.running())

    def steps():
        """Steps taken so far."""
        for count in range(1, 10**9):
            update(policy, optimizer, rows[:BATCH], packing=cfg.packing)
            yield count

    def rate(work) -> dict:
        """Units a second, after the first spec["settle"] seconds."""
        began, start = time.monotonic(), None
        for count in work:
            now = time.monotonic()
            if start is None and now - began >= spec["settle"]:
                start, first, before = now, count, cpu_seconds()
            elif start is not None and now - start >= spec["seconds"]:
                break
        return {"rate": (count - first) / (now - start), "others": (cpu_seconds()[1] - before[1]) / (now - start),
                "threads": torch.get_num_threads()}

    def wait_for_quiet() -> None:
        began, others = time.monotonic(), 1.0
        while others > 0.2 and time.monotonic() - began < spec["patience"]:
            before = cpu_seconds()[1]
            time.sleep(1.0)
            others = cpu_seconds()[1] - before

    pause({})
    for _ in range(spec["rounds"]):
        told = {}
        wait_for_quiet()
        for load, beside in (("quiet", 0), ("busy", max(1, (os.cpu_count() or 1) - 1))):
            with busy_processes(beside):
                told |= {f"rollout {load}": rate(rollout()), f"sft {load}": rate(steps())}
        pause(told)


# ---- the comparison

def summarise(rounds: dict[str, list[dict]]) -> list[dict]:
    """Make a row per worker and kind of work: medians over rounds."""
    rows = []
    for name in rounds:
        for work in ("rollout", "sft"):
            quiet, busy = ([told[f"{work} {load}"]["rate"] for told in rounds[name]] for load in ("quiet", "busy"))
            slower = [one / other for one, other in zip(quiet, busy, strict=True)]
            unit = 1 if work == "rollout" else -1  # of SFT: seconds
            rows.append({"worker": name, "work": work, "quiet": statistics.median(quiet) ** unit,
                         "busy": statistics.median(busy) ** unit, "slower": statistics.median(slower)})
    return rows


def run(options: argparse.Namespace, model: str) -> None:
    spec = {"model": model, "device": "cpu", "dtype": options.dtype, "attn": "eager", "stage": "sft", "total_steps": 1,
            "micro_batch_tokens": options.micro_batch_tokens, "batch_size": BATCH, "packing": False, "trainer": "busy",
            "keep_freed_memory": True, "max_new_tokens": 16 if options.tiny else 200, "rounds": options.rounds,
            "seconds": options.seconds, "settle": options.settle, "patience": options.patience}
    unset = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "MKL_", "GOMP_"))}

    def start(name: str, log):
        return turns.start_worker("bench.busy", spec, log, unset | VARIANTS[name])
    facts = machine("cpu")
    rounds = turns.take_turns(list(VARIANTS), start, options.rounds, "busy", 0)
    summary, units = summarise(rounds), {"rollout": "tokens/s", "sft": "s a step"}
    for row in summary:
        print("{worker}, {work}: {quiet:.2f} {unit} quiet, {busy:.2f} busy: {slower:.2f} x slower".format(
            **row, unit=units[row["work"]]))
    if path := options.out or (None if options.tiny else RESULTS / "busy-cpu.json"):
        train.save(path, options.dtype, {**facts, "settings": spec | {"model": os.path.basename(model)},
                                         "busy processes": max(1, (os.cpu_count() or 1) - 1), "summary": summary,
                                         "rounds": rounds})
        print(f"wrote {path.name}")


def main(words: list[str] | None = None) -> int:
    return train.run_on_model(parse(words), run, "")


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1].startswith("{"):
        from bench.train_worker import start
        start({"busy": lambda spec, pauses: run_worker(spec, pauses.pause)}, "trainer")
    else:
        sys.exit(main())
