"""One engine of bench.rollout in a process of its own, rollout by rollout.

    python -m bench.rollout_worker '{"engine": "generate", ...}'    # bench.rollout starts it so

Each engine loads the same model with a new LoRA adapter (minimath's options) and samples the completions of
the round's prompts when the parent says so (train_worker.Turns), after a first, short rollout that warms up.
TRL's engine is the `_generate` of a GRPOTrainer in the middle of its train(), with what accelerate and TRL
put around the model there; no update follows. The spec: bench.rollout.
"""
import inspect
import json
import logging
import os
import statistics
import sys
import tempfile

from bench.train_worker import Turns, config_of, examples_of, load_peer, lora_of, touch, trl_grpo

WARM_UP_PROMPTS, WARM_UP_TOKENS = 2, 8


def take_turns(spec: dict, turns: Turns, prompts: list, eos: list[int], roll) -> None:
    """Report that all is loaded, warm up, then one rollout per round, each on prompts of its own.

    prompts: those of all rounds, in order. roll(prompts, limit, round) -> (completions, facts): token ids of
    all completions, at most `limit` each, prompt by prompt, and more to report.
    """
    count = spec["prompts"]
    turns.pause({})
    batches = [(prompts[:WARM_UP_PROMPTS], min(WARM_UP_TOKENS, spec["max_new_tokens"]))]
    batches += [(prompts[i:i + count], spec["max_new_tokens"]) for i in range(0, len(prompts), count)]
    for number, (batch, limit) in enumerate(batches):
        rows, facts = roll(batch, limit, number)
        if len(rows) != len(batch) * spec["samples"]:
            raise RuntimeError(f"{len(rows)} completions for {len(batch)} prompts x {spec['samples']}")
        turns.pause({**length_facts([cut_at_end(row, eos) for row in rows], eos), **facts})


def cut_at_end(row: list[int], eos: list[int]) -> list[int]:
    """The ids up to and including the first that ends a completion; padding behind it goes."""
    return row[:1 + next((i for i, token in enumerate(row) if token in eos), len(row) - 1)]


def length_facts(rows: list[list[int]], eos: list[int]) -> dict:
    """Sampled tokens, end tokens included, and how their lengths spread."""
    lengths = sorted(len(row) for row in rows)
    return {"tokens": sum(lengths), "completions": len(rows), "mean_length": statistics.fmean(lengths),
            "ended": statistics.fmean(row[-1] in eos for row in rows),
            "length_deciles": [lengths[round(i * (len(lengths) - 1) / 10)] for i in range(11)]}


def padded_fill(calls: list[list[list[int]]]) -> dict:
    """Slot fill of calls that decode all rows until the longest has ended; calls: the completions of each."""
    used = sum(len(row) for rows in calls for row in rows)
    held = sum(len(rows) * max(map(len, rows)) for rows in calls)
    return {"slot_fill": used / held, "slots": max(map(len, calls))}


def prompts_of(spec: dict, cfg, tokenizer) -> list[list[int]]:
    """Token ids of the prompts of all rounds, in the order in which TRL takes them."""
    from minimath.data.chat import prompt_ids
    examples = examples_of({"trainer": "trl"}, spec["prompts"] * spec["rounds"])
    return [prompt_ids(tokenizer, e.problem, prompt_template=cfg.prompt.prompt_template) for e in examples]


# ---- minimath

def run_minimath(spec: dict, turns: Turns) -> None:
    import torch

    from minimath.data.chat import eos_ids
    from minimath.models.load import load_model
    from minimath.rollout.engine import generate
    cfg = config_of(spec)
    torch.manual_seed(cfg.run.seed)
    model, tokenizer = load_model(cfg, train=True)
    touch(model)
    eos, tells = eos_ids(tokenizer, model), "facts" in inspect.signature(generate).parameters

    def roll(prompts, limit, number):
        facts = {}
        groups = generate(model, tokenizer, prompts, samples=spec["samples"], max_new_tokens=limit,
                          temperature=cfg.sampling.temperature, eos=eos, seed=number, slots=spec["slots"],
                          **({"facts": facts} if tells else {}))
        return [c.ids for group in groups for c in group], facts

    take_turns(spec, turns, prompts_of(spec, cfg, tokenizer), eos, roll)


# ---- transformers

def sampling_of(spec: dict, tokenizer, eos: list[int], limit: int):
    """GenerationConfig of minimath's sampling: temperature, nothing cut off."""
    from transformers import GenerationConfig
    return GenerationConfig(do_sample=True, temperature=spec["temperature"], top_k=0, top_p=1.0,
                            repetition_penalty=1.0, max_new_tokens=limit, eos_token_id=eos,
                            pad_token_id=tokenizer.pad_token_id)


def run_generate(spec: dict, turns: Turns) -> None:
    """model.generate on left-padded rows, generate_batch of them a call."""
    import torch
    from peft import get_peft_model
    cfg = config_of(spec)
    model, tokenizer, eos = load_peer(cfg)
    model = get_peft_model(model, lora_of(cfg)).eval()

    def call(rows: list[list[int]], limit: int) -> list[list[int]]:
        width = max(map(len, rows))
        ids = torch.tensor([[tokenizer.pad_token_id] * (width - len(row)) + row for row in rows])  # (B, T)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        with torch.no_grad(), torch.autocast(cfg.model.device, torch.bfloat16, enabled=spec["autocast"]):
            out = model.generate(input_ids=ids.to(cfg.model.device), attention_mask=mask.to(cfg.model.device),
                                 generation_config=sampling_of(spec, tokenizer, eos, limit))
        return [cut_at_end(row, eos) for row in out[:, width:].tolist()]

    def roll(prompts, limit, number):
        torch.manual_seed(number)
        rows = [prompt for prompt in prompts for _ in range(spec["samples"])]
        size = spec["generate_batch"]
        calls = [call(rows[i:i + size], limit) for i in range(0, len(rows), size)]
        return [row for rows in calls for row in rows], padded_fill(calls)

    take_turns(spec, turns, prompts_of(spec, cfg, tokenizer), eos, roll)


def run_continuous(spec: dict, turns: Turns) -> None:
    """transformers' continuous batching, with `slots` requests at a time; each prompt forks into its samples.

    Its cache is sized here for that many requests of full length: left alone, it takes 0.6 of a CPU's free
    memory (and minutes to fill it), and 0.9 of a GPU's. A new manager each round, as in TRL: the prompts that
    it keeps would be of old weights. It decodes in a thread of its own, out of reach of an autocast here.
    """
    from peft import get_peft_model
    from transformers.generation import ContinuousBatchingConfig
    cfg = config_of(spec)
    model, tokenizer, eos = load_peer(cfg)
    model = get_peft_model(model, lora_of(cfg)).eval()
    prompts = prompts_of(spec, cfg, tokenizer)
    page, longest = 32, max(map(len, prompts)) + spec["max_new_tokens"]
    batching = ContinuousBatchingConfig(
        page_size=page, num_blocks=(spec["slots"] + 1) * (-(-longest // page) + 1),
        max_batch_tokens=max(longest, 8 * spec["slots"]), max_requests_per_batch=spec["slots"], seed=cfg.run.seed)

    def roll(prompts, limit, number):
        how = sampling_of(spec, tokenizer, eos, limit)
        how.num_return_sequences = spec["samples"]
        out = model.generate_batch(prompts, generation_config=how, continuous_batching_config=batching,
                                   warmup=cfg.model.device == "cuda")
        errors = [str(answer.error) for answer in out.values() if answer.error]
        if errors:
            raise RuntimeError(f"{len(errors)} requests failed: {errors[0]}")
        return [answer.generated_tokens for answer in out.values()], {}

    take_turns(spec, turns, prompts, eos, roll)


# ---- TRL

def run_trl(spec: dict, turns: Turns) -> None:
    """GRPOTrainer._generate, whole rounds at once as TRL does by default, or split_rows at a time."""
    cfg = config_of(spec)
    model, tokenizer, eos = load_peer(cfg)
    with tempfile.TemporaryDirectory() as folder:
        trainer = trl_grpo(spec, cfg, folder, {}, model=model, processing_class=tokenizer,
                           peft_config=lora_of(cfg))
        prompts, generate = list(trainer.train_dataset["prompt"]), trainer._generate

        def roll(prompts, limit, number):
            trainer.generation_config.max_new_tokens = trainer.generation_kwargs["max_new_tokens"] = limit
            rows = [prompt for prompt in prompts for _ in range(spec["samples"])]
            size = spec["split_rows"] or len(rows)
            calls = [generate(rows[i:i + size])[1] for i in range(0, len(rows), size)]
            return [row for rows in calls for row in rows], padded_fill(calls)

        def all_rounds(_):
            take_turns(spec, turns, prompts, eos, roll)
            raise SystemExit(0)

        trainer._generate = all_rounds
        trainer.train()


RUNS = {"minimath": run_minimath, "generate": run_generate, "continuous": run_continuous, "trl": run_trl}


def main() -> int:
    spec = json.loads(sys.argv[1])
    stdout = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print; the protocol has its own file
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.captureWarnings(True)
    if spec["keep_freed_memory"]:
        from minimath.core.run import keep_freed_memory
        keep_freed_memory()
    RUNS[spec["engine"]](spec, Turns(stdout, spec["device"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
