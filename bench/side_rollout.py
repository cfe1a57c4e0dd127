"""Decisions around rollouts, measured: NF4 weights dequantised once, drafts by prompt look-up, shared prompts.

    python -m bench.side_rollout                       # the demo's model on a CPU; about 8 minutes
    python -m bench.side_rollout --only update
    python -m bench.side_rollout --device cuda --model Qwen/Qwen2.5-0.5B-Instruct

1. Seconds of a decode step with NF4 weights dequantised in every layer and step (what the model does by itself)
   and once per rollout into a copy (linears.decoding_linears), alternating, for several numbers of rows.
2. Drafting the next tokens from an earlier place where the last ones occurred (prompt look-up) is lossless here for
   nothing: a token is a function of its logits and its own random number. It pays if the tokens gained outweigh the
   dearer step: gained are counted on worked solutions (of the demo's made problems, and of --data, a jsonl file with
   problem and solution), a step that tries k more tokens a row is timed as one of (1 + k) times the rows, without
   more keys and values to read: its least cost.
3. Seconds of an update's gradient, 8 prompts of 75 to 105 tokens x 8 completions of 8 to 160, with each prompt
   computed once for its completions (prefix.py) and with rows apart, under eager attention and sdpa.
"""
import argparse
import dataclasses
import json
import random
import statistics
import sys
import time
from pathlib import Path

from bench.measure import RESULTS, machine
from minimath.config.schema import AdapterConfig
from minimath.core.errors import UserError
from minimath.data.examples import load_examples
from minimath.data.problems import make_problems

ROWS = (1, 8, 32, 64)
DRAFT = 2  # tokens tried beside the next one
NGRAM = 3  # longest run of tokens that is looked up, down to 2
ROUNDS = 3
STEPS = 16


def drafted(context: list[int], ngram: int, draft: int) -> list[int]:
    """Up to `draft` tokens that followed the latest earlier occurrence of the context's last tokens."""
    for length in range(ngram, 1, -1):
        last = context[-length:]
        for start in range(len(context) - length - 1, -1, -1):
            if context[start:start + length] == last:
                return context[start + length:start + length + draft]
    return []


def tokens_per_step(pairs: list[tuple[list[int], list[int]]], ngram: int = NGRAM, draft: int = DRAFT) -> float:
    """Tokens that a step yields, the next one and the drafted ones that are right, over (prompt, completion) ids."""
    steps = tokens = 0
    for prompt, completion in pairs:
        place = 0
        while place < len(completion):
            guess = drafted(prompt + completion[:place], ngram, draft)
            right = 0
            while right < len(guess) and completion[place + right:place + right + 1] == guess[right:right + 1]:
                right += 1
            place += right + 1
            steps += 1
        tokens += len(completion)
    return tokens / steps


def step_seconds(model, tokenizer, prompt: list[int], rows: int) -> float:
    """Seconds of one decode step of `rows` rows: a longer rollout less a shorter one."""
    from minimath.rollout.engine import generate
    took = []
    for new in (4, 4 + STEPS):
        start = time.perf_counter()
        generate(model, tokenizer, [prompt], samples=rows, max_new_tokens=new, eos=[], slots=rows)
        took.append(time.perf_counter() - start)
    return (took[1] - took[0]) / STEPS


def measure_nf4(cfg: AdapterConfig, prompt: list[int], load) -> list[dict]:
    """Seconds per step by number of rows, dequantised per layer and once."""
    from minimath.rollout import engine as rollout
    model, tokenizer = load(cfg.replace(quant="nf4"))
    free = rollout.free_bytes
    table = []
    try:
        for rows in ROWS:
            took = {"per layer": [], "once": []}
            for _ in range(ROUNDS):
                for name in took:  # no free memory, no copy
                    rollout.free_bytes = (lambda device: 0) if name == "per layer" else free
                    took[name].append(step_seconds(model, tokenizer, prompt, rows))
            medians = {name: statistics.median(each) for name, each in took.items()}
            table.append({"rows": rows, **{f"{name}_s": s for name, s in medians.items()},
                          "speed-up": medians["per layer"] / medians["once"], "rounds": took})
    finally:
        rollout.free_bytes = free
    return table


def measure_lookup(cfg: AdapterConfig, prompt: list[int], load, pairs: dict) -> dict:
    """Tokens per step of each set of solutions, and what a step of (1 + DRAFT) tokens a row costs at least."""
    model, tokenizer = load(cfg)
    ids = {name: [tuple(tokenizer(text, add_special_tokens=False)["input_ids"] for text in pair) for pair in each]
           for name, each in pairs.items()}
    gain = {name: tokens_per_step(each) for name, each in ids.items()}
    costs = []
    for rows in ROWS:
        took = [[step_seconds(model, tokenizer, prompt, n) for n in (rows, (1 + DRAFT) * rows)] for _ in range(ROUNDS)]
        cost = statistics.median(more for _, more in took) / statistics.median(one for one, _ in took)
        costs.append({"rows": rows, "cost": cost, **{name: g / cost for name, g in gain.items()}})
    return {"tokens per step": gain, "speed-up at most": costs}


def update_rows(prompts: int = 8, group: int = 8):
    """(rows, samples) as rlaif.training_rows makes them, of random tokens."""
    from minimath.data.chat import Encoded
    from minimath.rollout.engine import Completion
    draw, rows, samples = random.Random(0), [], []
    for _ in range(prompts):
        prompt = [draw.randint(10, 300) for _ in range(draw.randint(75, 105))]
        for _ in range(group):
            count = min(160, max(8, round(draw.gauss(85, 40))))
            completion = [draw.randint(10, 300) for _ in range(count)]
            rows.append(Encoded(prompt + completion, [False] * len(prompt) + [True] * count, False))
            samples.append((Completion(completion, [-1.0] * count, True), draw.gauss(0, 1)))
    return rows, samples


def measure_update(model: str, device: str, rows, samples) -> list[dict]:
    """Seconds of policy_gradient by attention, prompts shared or not; micro-batches of 1,024 tokens."""
    from minimath.train import rlaif
    from minimath.config.schema import RLAIFConfig
    from minimath.models.load import load_model
    table = []
    for attn in ("eager", "sdpa"):
        cfg = RLAIFConfig(model=model, device=device, attn=attn, micro_batch_tokens=1024)
        loaded, tokenizer = load_model(cfg, train=True)
        took = {"apart": [], "shared": []}
        for _ in range(ROUNDS):
            for name in took:
                loaded.zero_grad()
                start = time.perf_counter()
                rlaif.policy_gradient(cfg.replace(shared_prefix=name == "shared"), loaded, tokenizer,
                                      rows=rows, samples=samples, old=None, ref=None, scale=1.0)
                took[name].append(time.perf_counter() - start)
        medians = {name: statistics.median(each) for name, each in took.items()}
        table.append({"attn": attn, **{f"{name}_s": s for name, s in medians.items()},
                      "speed-up": medians["apart"] / medians["shared"], "rounds": took})
    return table


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.side_rollout", description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="", help="folder or hub id; default: the demo's SmolLM2-135M-Instruct")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--data", nargs="*", default=[], help="jsonl files with problem and solution")
    parser.add_argument("--only", nargs="+", choices=("nf4", "lookup", "update"), default=["nf4", "lookup", "update"])
    parser.add_argument("--out", type=Path, help="result file; default: bench/results/side-rollout-<device>.json")
    options = parser.parse_args(words)
    try:
        run(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def run(options: argparse.Namespace) -> None:
    from minimath.data.chat import prompt_ids
    from minimath.commands.demo import demo_model
    from minimath.models.load import load_model
    from minimath.core.run import keep_freed_memory
    keep_freed_memory()
    facts = machine(options.device)
    pairs = {"made": [(e.problem, e.solution) for e in make_problems(60, seed=1)]}
    for path in options.data:
        examples, _ = load_examples(path, limit=60, need=("solution",))
        pairs[Path(path).stem] = [(e.problem, e.solution) for e in examples]
    cfg = AdapterConfig(model=options.model or str(demo_model()), device=options.device)
    _, tokenizer = load_model(cfg, train=True)
    prompt = prompt_ids(tokenizer, pairs["made"][0][0], prompt_template=cfg.prompt.prompt_template)

    def load(cfg):
        return load_model(cfg, train=True)

    path = options.out or RESULTS / f"side-rollout-{options.device}.json"
    # what is measured anew replaces its part of an earlier result
    result = json.loads(path.read_text()) if path.exists() else {}
    measured = {}
    if "nf4" in options.only:
        measured["nf4"] = measure_nf4(cfg, prompt, load)
    if "lookup" in options.only:
        measured["lookup"] = measure_lookup(cfg, prompt, load, pairs)
    if "update" in options.only:
        measured["update"] = measure_update(cfg.model.name, options.device, *update_rows())
    tell(measured)
    result |= {name: {"machine": facts, "result": each} for name, each in measured.items()}
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {path.name}")


def tell(measured: dict) -> None:
    for row in measured.get("nf4", ()):
        print(f"NF4, {row['rows']:3} rows: {1e3 * row['per layer_s']:.0f} ms a step dequantised per layer, "
              f"{1e3 * row['once_s']:.0f} ms once, {row['speed-up']:.2f}x")
    if "lookup" in measured:
        gain = measured["lookup"]["tokens per step"]
        print("tokens per step with look-up:", {name: round(g, 2) for name, g in gain.items()})
        for row in measured["lookup"]["speed-up at most"]:
            told = ", ".join(f"{name} {row[name]:.2f}x" for name in gain)
            print(f"look-up, {row['rows']:3} rows: a step costs {row['cost']:.2f} as much; at most {told}")
    for row in measured.get("update", ()):
        print(f"update, {row['attn']}: {row['apart_s']:.1f} s with rows apart, {row['shared_s']:.1f} s behind shared "
              f"prompts, {row['speed-up']:.2f}x")


if __name__ == "__main__":
    sys.exit(main())
