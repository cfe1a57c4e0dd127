"""One engine of bench.rollout in a process of its own, rollout by rollout.

    python -m bench.rollout_worker '{"engine": "generate", ...}'    # bench.rollout starts it so

Each engine loads the same model with a new LoRA adapter (minimath's options) and samples the completions of the round's
prompts when the parent says so (train_worker.Turns), after a first, short rollout that warms up. TRL's engine is the
`_generate` of a GRPOTrainer in the middle of its train(), with what accelerate and TRL put around the model there; no
update follows. The spec: bench.rollout.
"""
import contextlib
import dataclasses
import logging
import statistics
import tempfile
from unittest import mock

from bench.train_worker import Turns, config_of, examples_of, load_peer, lora_of, start, touch, trl_grpo

WARM_UP_PROMPTS, WARM_UP_TOKENS = 2, 8


def take_turns(spec: dict, turns: Turns, prompts: list, eos: list[int], roll) -> None:
    """Report that all is loaded, warm up, then one rollout per round.

    prompts: those of all rounds, in order. roll(prompts, limit, round) -> (completions, facts): token ids of all
    completions, at most `limit` each, prompt by prompt, and more to report.
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
    """Keep the ids up to and including the first that ends a completion."""
    return row[:1 + next((i for i, token in enumerate(row) if token in eos), len(row) - 1)]


def length_facts(rows: list[list[int]], eos: list[int]) -> dict:
    """Count sampled tokens, end tokens included, and how their lengths spread."""
    lengths = sorted(len(row) for row in rows)
    return {"tokens": sum(lengths), "completions": len(rows), "mean_length": statistics.fmean(lengths),
            "finished": statistics.fmean(row[-1] in eos for row in rows),
            "length_deciles": [lengths[round(i * (len(lengths) - 1) / 10)] for i in range(11)]}


def padded_fill(calls: list[list[list[int]]]) -> dict:
    """Compute the fill of calls that decode all rows until the longest has ended."""
    used = sum(len(row) for rows in calls for row in rows)
    held = sum(len(rows) * max(map(len, rows)) for rows in calls)
    return {"seq_fill": used / held, "max_num_seqs": max(map(len, calls))}


def prompts_of(spec: dict, cfg, tokenizer) -> list[list[int]]:
    """Encode the prompts of all rounds, in the order in which TRL takes them."""
    from minimath.data.chat import prompt_ids
    return [prompt_ids(tokenizer, e.problem, prompt_template=cfg.prompt.prompt_template)
            for e in examples_of("trl", spec["prompts"] * spec["rounds"])]


def run_minimath(spec: dict, turns: Turns) -> None:
    import torch

    from minimath.models.policy import load_policy
    from minimath.rollout.open import open_engine
    cfg = config_of(spec)
    torch.manual_seed(cfg.run.seed)
    policy, learned = load_policy(cfg, train=True), {}
    touch(policy.model)

    def roll(prompts, limit, number):
        sampling = dataclasses.replace(cfg.sampling, max_new_tokens=limit)
        with pool_of(spec) as beside, open_engine(cfg.engine, sampling, policy, seed=number) as engine:
            engine.load_state_dict(learned)
            engine.eos = [] if spec["tail"] else engine.eos
            groups = engine.generate(prompts, n=spec["samples"])
            learned.update(engine.state_dict())
            rows = statistics.fmean(beside) if beside else None
            return [sample.ids for group in groups for sample in group], {**engine.metrics(), "rows_beside": rows}

    take_turns(spec, turns, prompts_of(spec, cfg, policy.tokenizer), [] if spec["tail"] else policy.eos, roll)


@contextlib.contextmanager
def pool_of(spec: dict):
    """Give rollouts the memory of spec["full"] rows of full length, and with "tail" lengths of which 1 in 20 is full.

    The others get a 19th of it, so that full ones are ten times the mean. "rectangle": rows get full length each, as if
    there were no pool. Yields a list of how many rows each step had while others waited."""
    if not spec["full"]:
        yield []
        return
    from minimath.rollout import blocks, decode
    from minimath.rollout import open as own_engine
    seen, step, end_early = [], decode.Decode.step, decode.Decode.end_early

    def fit(model, longest, expected, wanted, how, **_):
        places = spec["full"] * longest
        most = min(wanted, 128 if spec["tail"] else spec["full"])
        return min(most, places // (longest if spec["rectangle"] else expected)), places

    def counted(batch):
        seen.extend([len(batch.rows)] if batch.queue else [])
        step(batch)

    def cut(batch, table):
        end_early(batch, table)
        for i, (row, state) in enumerate(zip(batch.rows, table)):
            share = 1 if row.job.seed % 20 == 0 else 19
            if spec["tail"] and row.length + 1 - len(row.job.prompt) >= batch.max_new_tokens // share:
                batch.alive[i], state[0] = False, 0

    with mock.patch.object(own_engine, "fitting_rows", fit), mock.patch.multiple(
            decode.Decode, step=counted, end_early=cut), mock.patch.object(
            blocks, "ONE_PAGE", 1 << 30 if spec["rectangle"] else blocks.ONE_PAGE):
        yield seen


# ---- transformers

def adapted_peer(cfg):
    """Load model with a new adapter, tokenizer and end ids by transformers and peft."""
    from peft import get_peft_model
    model, tokenizer, eos = load_peer(cfg)
    return get_peft_model(model, lora_of(cfg)).eval(), tokenizer, eos


def sampling_of(spec: dict, tokenizer, eos: list[int], limit: int):
    """Make the GenerationConfig of minimath's sampling: temperature, nothing cut off."""
    from transformers import GenerationConfig
    return GenerationConfig(do_sample=True, temperature=spec["temperature"], top_k=0, top_p=1.0,
                            repetition_penalty=1.0, max_new_tokens=limit, eos_token_id=eos,
                            pad_token_id=tokenizer.pad_token_id)


def run_generate(spec: dict, turns: Turns) -> None:
    """Call model.generate on left-padded rows, generate_batch of them at a time."""
    import torch
    cfg = config_of(spec)
    device = cfg.model.device
    model, tokenizer, eos = adapted_peer(cfg)

    def call(rows: list[list[int]], limit: int) -> list[list[int]]:
        width = max(map(len, rows))
        ids = torch.tensor([[tokenizer.pad_token_id] * (width - len(row)) + row for row in rows])  # (B, T)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=spec["autocast"]):
            out = model.generate(input_ids=ids.to(device), attention_mask=mask.to(device),
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
    """Run transformers' continuous batching, max_num_seqs requests at a time.

    Its cache is sized here for that many requests of full length: left alone, it takes 0.6 of a CPU's free memory (and
    minutes to fill it), and 0.9 of a GPU's. A new manager each round, as in TRL: the prompts that it keeps would be of
    old weights. It decodes in a thread of its own, out of reach of an autocast here.
    """
    from transformers.generation import ContinuousBatchingConfig
    cfg, requests = config_of(spec), spec["max_num_seqs"]
    model, tokenizer, eos = adapted_peer(cfg)
    prompts = prompts_of(spec, cfg, tokenizer)
    page, longest = 32, max(map(len, prompts)) + spec["max_new_tokens"]
    batching = ContinuousBatchingConfig(
        page_size=page, num_blocks=(requests + 1) * (-(-longest // page) + 1),
        max_batch_tokens=max(longest, 8 * requests), max_requests_per_batch=requests, seed=cfg.run.seed)

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
    """Call GRPOTrainer._generate, whole rounds at once or split_rows at a time."""
    cfg = config_of(spec)
    model, tokenizer, eos = load_peer(cfg)
    with tempfile.TemporaryDirectory() as folder:
        trainer = trl_grpo(spec, cfg, folder, {}, model=model, processing_class=tokenizer, peft_config=lora_of(cfg))
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


if __name__ == "__main__":
    logging.captureWarnings(True)
    start({"minimath": run_minimath, "generate": run_generate, "continuous": run_continuous, "trl": run_trl}, "engine")
