"""Record what fixed runs compute, fp32 on one thread, and compare two records number by number.

    python -m bench.same record OUT.json [--real]     in the checkout to record
    python -m bench.same compare BEFORE.json AFTER.json

A change that is not about numbers leaves every record bit-identical: losses, gradient norms, sampled tokens, rewards,
hashes of adapters. The runs are of a tiny random model; --real adds a few steps of SmolLM2-135M.
"""
import hashlib
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

RL = ("rlaif data=rl prompts_per_step=3 group_size=6 steps=4 lr=1e-3 max_new_tokens=48 max_refill=1 save_every=2 "
      "sample_every=1 overlong=none verifier=none brevity=minmax brevity_weight=0.25 brevity_scale=together "
      "brevity_control=none ")
TINY = {
    "sft": "sft data=train steps=6 batch_size=4 micro_batch_tokens=256 lr=1e-3 save_every=3 eval_data=test "
           "eval_every=3 eval_limit=4 eval_max_new_tokens=12",
    "sft-padded": "sft data=train steps=4 batch_size=4 micro_batch_tokens=200 packing=false lora_dropout=0.1 lr=1e-3 "
                  "save_every=2",
    "rl-dapo": RL + "judge=heuristic",
    "rl-grpo2": RL + "judge=heuristic loss=grpo updates_per_rollout=2",
    "rl-self": RL + "judge=self",
    "rl-kl": RL + "judge=heuristic kl_coef=0.05 judge_weight=0",
    "rl-gspo2": RL + "judge=heuristic loss=gspo updates_per_rollout=2",
    "rl-cispo": RL + "judge=heuristic loss=cispo scale_advantage=rloo overlong=penalty",
    "rl-paper": RL + "reward=paper curriculum=learnable",
    "rl-exact": RL.replace("verifier=none", "verifier=exact") + "judge=heuristic format_weight=0.1",
    "eval": "eval data=test max_new_tokens=24",
    "eval-4": "eval data=test max_new_tokens=24 samples=4 temperature=0.8 top_p=0.9 budgets=8,16 adapter=@sft",
}
BIG = ("rlaif data=rl prompts_per_step=2 group_size=4 steps=2 lr=1e-4 max_new_tokens=48 max_refill=0 save_every=1 "
       "sample_every=1 overlong=none verifier=none adapter=@sft brevity=minmax brevity_weight=0.25 "
      "brevity_scale=together brevity_control=none ")
REAL = {
    "sft": "sft data=train steps=3 batch_size=4 micro_batch_tokens=1024 packing=false attn=eager lr=1e-3 save_every=2",
    "rl-dapo": BIG + "judge=heuristic",
    "rl-grpo2": BIG + "judge=heuristic loss=grpo updates_per_rollout=2",
    "rl-self": BIG + "judge=self",
    "rl-kl": BIG + "judge=heuristic kl_coef=0.05",
    "eval": "eval data=test limit=6 max_new_tokens=64 adapter=@sft",
}


def record(target: Path, *, real: bool) -> None:
    """Run all and write the record. The models and problems are made once, in a folder beside it."""
    work = target.with_suffix("")
    if not (work / "tiny").exists():
        prepare(work)
    facts = {}
    with tempfile.TemporaryDirectory() as out:
        for kind, lines in (("tiny", TINY), ("real", REAL)) if real else (("tiny", TINY),):
            for name, line in lines.items():
                facts[f"{kind}/{name}"] = run(line, work, kind, Path(out) / kind / name)
                print(kind, name, facts[f"{kind}/{name}"].get("failed", "ok"), flush=True)
                target.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def prepare(work: Path) -> None:
    """Make the models and the problems. Of this checkout: to record an older one, copy the folder."""
    sys.path.insert(0, "tests/helpers")
    from tiny import write_tiny

    from minimath.commands.demo import DemoConfig, demo_model, write_problems
    write_tiny(work / "tiny")
    (work / "real").symlink_to(demo_model())
    write_problems(DemoConfig(train_problems=64, rl_problems=40, test_problems=12, largest=24), work / "data", 1.0)


def run(line: str, work: Path, kind: str, out: Path) -> dict:
    words = []
    for word in line.split():
        name, equals, value = word.partition("=")
        if name in ("data", "eval_data"):
            value = str(work / "data" / f"{value}.jsonl")
        value = str(out.parent / value[1:]) if value.startswith("@") else value
        words.append(name + equals + value)
    words += [f"model={work / kind}", f"out={out}", "dtype=fp32", "device=cpu", "seed=5"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-m", "minimath", *words], env=env, capture_output=True, text=True)
    return {"failed": (done.stdout + done.stderr)[-2000:]} if done.returncode else collect(out)


def collect(folder: Path) -> dict:
    """What a run left: its records without times, and hashes of its adapters."""
    facts: dict = {}
    for name in ("metrics.jsonl", "samples.jsonl", "completions.jsonl", "eval.json"):
        if (folder / name).exists():
            text = (folder / name).read_text(encoding="utf-8")
            facts[name] = [json.loads(row) for row in ([text] if name == "eval.json" else text.split("\n")) if row]
    for path in sorted(folder.rglob("adapter_model.safetensors")):
        facts[str(path.relative_to(folder))] = hashlib.sha256(path.read_bytes()).hexdigest()
    return facts


def compare(before: dict, after: dict) -> int:
    """Print what differs, and what failed; returns the number of both."""
    differences = 0
    for name in sorted(before.keys() | after.keys()):
        numbers = 0
        found = ["  it failed, so it says nothing of the numbers"] * any(
            "failed" in each.get(name, {}) for each in (before, after))
        for what in sorted(before.get(name, {}).keys() | after.get(name, {}).keys()):
            a, b = before.get(name, {}).get(what), after.get(name, {}).get(what)
            rows = list(zip(a, b)) if isinstance(a, list) and isinstance(b, list) and len(a) == len(b) else [(a, b)]
            for number, (one, other) in enumerate(rows):
                pairs = [(k, one.get(k), other.get(k)) for k in sorted(one.keys() | other.keys())] \
                    if isinstance(one, dict) and isinstance(other, dict) else [("", one, other)]
                pairs = [pair for pair in pairs if not is_time(pair[0])]
                numbers += len(pairs)
                found += [f"  {what}[{number}] {k}: {x!r:.120} -> {y!r:.120}" for k, x, y in pairs if not same(x, y)]
        print(f"{name}: {numbers} values, {len(found)} differ", *found[:12], sep="\n")
        differences += len(found)
    return differences


def is_time(key: str) -> bool:
    return "seconds" in key or "time/" in key or key.endswith("_s")


def same(one, other) -> bool:
    both_nan = isinstance(one, float) and isinstance(other, float) and math.isnan(one) and math.isnan(other)
    return both_nan or one == other


if __name__ == "__main__":
    if sys.argv[1:2] == ["compare"]:
        sys.exit(bool(compare(*(json.loads(Path(name).read_text(encoding="utf-8")) for name in sys.argv[2:4]))))
    if sys.argv[1:2] != ["record"]:
        sys.exit(__doc__)
    record(Path(sys.argv[2]), real="--real" in sys.argv)
