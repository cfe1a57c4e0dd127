"""Record what fixed runs compute, fp32 on one thread, and compare two records number by number.

    python -m bench.same record OUT.json [--real]     in the checkout to record
    python -m bench.same compare BEFORE.json AFTER.json

A change that is not about numbers leaves every record bit-identical: losses, gradient norms, sampled tokens, rewards,
hashes of adapters. The runs are of a tiny random model; --real adds a few steps of SmolLM2-135M. A checkout from before
the packages (commit 16410f4) is recorded with --old: its options and metrics had other names, which are translated.
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
      "sample_every=1 overlong=none verifier=none ")
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
       "sample_every=1 overlong=none verifier=none adapter=@sft ")
REAL = {
    "sft": "sft data=train steps=3 batch_size=4 micro_batch_tokens=1024 packing=false attn=eager lr=1e-3 save_every=2",
    "rl-dapo": BIG + "judge=heuristic",
    "rl-grpo2": BIG + "judge=heuristic loss=grpo updates_per_rollout=2",
    "rl-self": BIG + "judge=self",
    "rl-kl": BIG + "judge=heuristic kl_coef=0.05",
    "eval": "eval data=test limit=6 max_new_tokens=64 adapter=@sft",
}
OLD_OPTIONS = {"max_num_seqs": "slots", "kl_coef": "beta", "judge_weight": "lam_judge", "verifier": "gate",
               "brevity_weight": "lam_length", "format_weight": "lam_format", "micro_batch_tokens": "micro_tokens",
               "loss": "loss_type", "judge=heuristic": "judge=rules", "reward=paper": "reward=rules"}
OLD_METRICS = {  # also the keys of samples.jsonl and completions.jsonl
    "lr": "optim/lr", "grad_norm": "optim/grad_norm", "stepped": "optim/stepped", "skipped": "optim/skipped",
    "tokens": "data/tokens", "epoch": "data/epoch", "eval_accuracy": "eval/accuracy", "eval_mean_tokens": "eval/tokens",
    "entropy": "policy/entropy", "clipped": "policy/clipped", "off_policy": "policy/off_policy",
    "reweighted": "policy/reweighted", "kl_ref": "policy/kl", "trained_tokens": "data/trained_tokens",
    "reward": "reward/mean", "judge_spread": "reward/judge_spread", "part_length": "reward/brevity",
    "right": "rollout/correct", "mean_tokens": "rollout/tokens", "right_tokens": "rollout/correct_tokens",
    "ended": "rollout/finished", "sampled": "rollout/samples", "groups": "rollout/groups",
    "dropped_groups": "rollout/dropped_groups", "surprisal": "rollout/surprisal", "slots": "rollout/max_num_seqs",
    "slot_fill": "rollout/seq_fill", "weights": "rollout/weights", "problems_seen": "curriculum/seen",
    "solve_rate": "curriculum/solve_rate"}
OLD_RECORDS = {"right": "correct", "ended": "finished", "right_steps": "correct_steps", "advantage": "advantages",
               "tokens_per_right": "tokens_per_correct"}
UNSURE = ("seconds", "tokens_per_s", "time/", "_s", "problems_resting")  # times, and what has no heir


def record(target: Path, *, real: bool, old: bool) -> None:
    """Run all and write the record. The models and problems are made once, in a folder beside it."""
    work = target.with_suffix("")
    if not (work / "tiny").exists():
        prepare(work)
    facts = {}
    with tempfile.TemporaryDirectory() as out:
        for kind, lines in (("tiny", TINY), ("real", REAL)) if real else (("tiny", TINY),):
            for name, line in lines.items():
                facts[f"{kind}/{name}"] = run(line, work, kind, Path(out) / kind / name, old)
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


def run(line: str, work: Path, kind: str, out: Path, old: bool) -> dict:
    words = []
    for word in line.split():
        name, equals, value = word.partition("=")
        if name in ("data", "eval_data"):
            value = str(work / "data" / f"{value}.jsonl")
        value = str(out.parent / value[1:]) if value.startswith("@") else value
        if old and equals:
            words.append(OLD_OPTIONS.get(f"{name}={value}", f"{OLD_OPTIONS.get(name, name)}={value}"))
        else:
            words.append(name + equals + value)
    words += [f"model={work / kind}", f"out={out}", "dtype=fp32", "device=cpu", "seed=5"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-m", "minimath", *words], env=env, capture_output=True, text=True)
    return {"failed": (done.stdout + done.stderr)[-2000:]} if done.returncode else collect(out, old)


def collect(folder: Path, old: bool) -> dict:
    """What a run left: its records without times, and hashes of its adapters."""
    facts: dict = {}
    for name in ("metrics.jsonl", "samples.jsonl", "completions.jsonl", "eval.json"):
        if (folder / name).exists():
            text = (folder / name).read_text(encoding="utf-8")
            rows = [json.loads(text)] if name == "eval.json" else [json.loads(row) for row in text.split("\n") if row]
            names = (OLD_METRICS if name == "metrics.jsonl" else OLD_RECORDS) if old else {}
            facts[name] = [{translated(k, names): v for k, v in row.items()} for row in rows]
    for path in sorted(folder.rglob("adapter_model.safetensors")):
        facts[str(path.relative_to(folder))] = hashlib.sha256(path.read_bytes()).hexdigest()
    return facts


def translated(key: str, names: dict[str, str]) -> str:
    if key in names:
        return names[key]
    for before, now in (("judge_skipped_gate", "judge/skipped_few"), ("judge_", "judge/"), ("part_", "reward/")) \
            if names is OLD_METRICS else ():
        if key.startswith(before):
            return now + key.removeprefix(before)
    return key


def compare(before: dict, after: dict) -> int:
    """Print what differs; returns the number of differences."""
    differences = 0
    for name in sorted(before.keys() | after.keys()):
        numbers, found = 0, []
        for what in sorted(before.get(name, {}).keys() | after.get(name, {}).keys()):
            a, b = before.get(name, {}).get(what), after.get(name, {}).get(what)
            rows = list(zip(a, b)) if isinstance(a, list) and isinstance(b, list) and len(a) == len(b) else [(a, b)]
            for number, (one, other) in enumerate(rows):
                pairs = [(k, one.get(k), other.get(k)) for k in sorted(one.keys() | other.keys())] \
                    if isinstance(one, dict) and isinstance(other, dict) else [("", one, other)]
                pairs = [pair for pair in pairs if not any(word in pair[0] for word in UNSURE)]
                numbers += len(pairs)
                found += [f"  {what}[{number}] {k}: {x!r:.120} -> {y!r:.120}" for k, x, y in pairs if not same(x, y)]
        print(f"{name}: {numbers} values, {len(found)} differ", *found[:12], sep="\n")
        differences += len(found)
    return differences


def same(one, other) -> bool:
    both_nan = isinstance(one, float) and isinstance(other, float) and math.isnan(one) and math.isnan(other)
    return both_nan or one == other


if __name__ == "__main__":
    if sys.argv[1:2] == ["compare"]:
        sys.exit(bool(compare(*(json.loads(Path(name).read_text(encoding="utf-8")) for name in sys.argv[2:4]))))
    if sys.argv[1:2] != ["record"]:
        sys.exit(__doc__)
    record(Path(sys.argv[2]), real="--real" in sys.argv, old="--old" in sys.argv)
