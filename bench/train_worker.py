"""One trainer of bench.train in a process of its own, run step by step.

    python -m bench.train_worker '{"trainer": "trl", "stage": "sft", ...}'    # bench.train starts it so

The real loops run here (minimath.train.sft and rlaif, trl.SFTTrainer, trl.GRPOTrainer); each stops after every
optimizer step, tells what it measured as one JSON line on stdout, and goes on when it reads a line. Whatever else is
printed goes to stderr. It ends at the end of its stdin. The spec: bench.train.
"""
import contextlib
import hashlib
import json
import math
import os
import sys
import tempfile
import time
from pathlib import Path

from bench.measure import peak_bytes, reset_peak, resident_bytes


class Turns:
    """Gives the parent one step at a time; measures seconds and peak memory."""
    def __init__(self, stdout, device: str):
        self.stdout, self.device = stdout, device
        self.started = self.loaded_bytes = None

    def pause(self, facts: dict) -> None:
        """Wait for the parent: once when all is loaded, then after each step."""
        if self.device == "cuda":
            import torch
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self.started is None:
            if self.device == "cuda" or sys.platform == "linux":  # weights are loaded, no step has run
                self.loaded_bytes = reset_peak(self.device)
            if self.device != "cuda" and self.loaded_bytes:
                stay_within_memory()
            facts = {"loaded_bytes": self.loaded_bytes}
        else:
            peak = self.loaded_bytes and peak_bytes(self.device) - self.loaded_bytes  # None where that is unknown
            facts = {"seconds": now - self.started, **facts, "peak_extra_bytes": peak}
        print(json.dumps(facts), file=self.stdout, flush=True)
        if not sys.stdin.readline():
            raise SystemExit(0)
        self.started = time.perf_counter()


def stay_within_memory() -> None:
    """Let this process grow by no more than is free: else Linux would kill something."""
    import resource
    free = next(int(line.split()[1]) * 1024 for line in Path("/proc/meminfo").read_text().splitlines()
                if line.startswith("MemAvailable:"))
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = resident_bytes("VmSize") + free
    if hard != resource.RLIM_INFINITY:
        limit = min(limit, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


# ---- work that both trainers do alike

def config_of(spec: dict):
    """Make the minimath options of the spec; TRL gets its own from these."""
    from minimath.config.schema import RLAIFConfig, SFTConfig
    common = {"model": spec["model"], "device": spec["device"], "dtype": spec["dtype"], "attn": spec["attn"],
              "steps": spec["total_steps"], "micro_batch_tokens": spec["micro_batch_tokens"],
              "lr_schedule": "constant", "warmup": 0.0, "save_every": 0}
    if spec["stage"] == "sft":
        return SFTConfig(**common, batch_size=spec["batch_size"], packing=spec["packing"])
    # every group counts and none is drawn anew, so that both trainers update on every completion
    return RLAIFConfig(**common, prompts_per_step=spec["prompts"], group_size=spec["group_size"],
                       max_new_tokens=spec["max_new_tokens"], max_num_seqs=spec.get("max_num_seqs") or 0,
                       max_refill=0, overlong="none", sample_every=0, reward=spread_reward)


def examples_of(trainer: str, count: int) -> list:
    """Make examples in the order in which the trainer gets minimath's order of them."""
    from minimath.data.batch import step_indices
    from minimath.data.problems import make_problems
    examples = make_problems(count, seed=0)
    return [examples[i] for i in step_indices(0, count, count, 0)] if trainer == "trl" else examples


def completion_rewards(correct: list[bool], ids: list[list[int]]) -> list[float]:
    """Give 1 for a correct answer plus less than 0.5 that differs by completion.

    A base model is correct too rarely: without the second term most groups would have no signal, and minimath, which
    drops such groups where TRL trains on zeros, would win by doing less.
    """
    spread = [hashlib.sha256(str(i).encode()).digest()[0] / 512 for i in ids]
    return [float(ok) + part for ok, part in zip(correct, spread, strict=True)]


def spread_reward(samples: list, example) -> list[float]:
    """Reward minimath's samples as TRL's are rewarded."""
    return completion_rewards([sample.correct for sample in samples], [sample.ids for sample in samples])


def touch(model) -> None:
    """Read every weight, so that pages of a mapped file count as loaded."""
    for parameter in model.parameters():
        parameter.detach().sum()


# ---- minimath

def pause_after_steps(turns: Turns) -> None:
    """Make every run of this process take turns, at its start and after each step."""
    from minimath.core.log import RunLog
    progress, metrics = RunLog.progress, RunLog.metrics

    @contextlib.contextmanager
    def begin(log, *args, **options):
        with progress(log, *args, **options) as advance:
            if turns.started is None:
                turns.pause({})
            yield advance

    def end(log, step: int, **numbers) -> None:
        metrics(log, step, **numbers)
        turns.pause(step_facts(numbers))

    RunLog.progress, RunLog.metrics = begin, end


def step_facts(numbers: dict) -> dict:
    """Pick what is reported out of a step's metrics."""
    if "rollout/samples" not in numbers:
        return {"tokens": numbers["data/tokens"]}
    return {"tokens": round(numbers["rollout/tokens"] * numbers["rollout/samples"]),
            "completions": numbers["rollout/samples"], "trained_groups": numbers["rollout/groups"],
            "rollout_seconds": numbers["time/rollout"], "update_seconds": numbers["time/update"]}


def run_minimath(spec: dict, turns: Turns) -> None:
    from minimath.models import policy
    from minimath.train.rlaif import rlaif
    from minimath.train.sft import sft
    cfg, load = config_of(spec), policy.load_model

    def load_and_touch(*args, **options):
        model, tokenizer = load(*args, **options)
        touch(model)
        return model, tokenizer

    policy.load_model = load_and_touch
    pause_after_steps(turns)
    count = cfg.steps * (cfg.batch_size if spec["stage"] == "sft" else cfg.prompts_per_step)
    data = [{"problem": e.problem, "solution": e.solution, "answer": e.answer} for e in examples_of("minimath", count)]
    with tempfile.TemporaryDirectory() as folder:
        train = sft if spec["stage"] == "sft" else rlaif
        train(cfg.replace(data=data, out=f"{folder}/run"))


# ---- TRL

def rows_per_forward(rows: int, longest: int, micro_batch_tokens: int) -> int:
    """Find the largest divisor of `rows` that stays within micro_batch_tokens."""
    return max([d for d in range(1, rows + 1) if rows % d == 0 and d * longest <= micro_batch_tokens], default=1)


def trl_arguments(spec: dict, cfg, rows: int, longest: int) -> dict:
    """Make TrainingArguments that equal minimath's options and add no other work."""
    at_once = rows_per_forward(math.gcd(rows, spec.get("rows_per_generation") or rows), longest,
                               spec["micro_batch_tokens"])
    return {
        "use_cpu": spec["device"] == "cpu", "bf16": spec["autocast"] and cfg.model.dtype == "bf16", "fp16": False,
        "gradient_checkpointing": False, "per_device_train_batch_size": at_once,
        "gradient_accumulation_steps": rows // at_once, "max_steps": cfg.steps, "learning_rate": cfg.optimizer.lr,
        "lr_scheduler_type": "constant", "warmup_steps": 0, "optim": "adamw_torch_fused",
        "weight_decay": cfg.optimizer.weight_decay, "max_grad_norm": cfg.optimizer.max_grad_norm,
        "seed": cfg.run.seed, "save_strategy": "no", "logging_strategy": "no", "report_to": "none",
        "disable_tqdm": True, "dataloader_pin_memory": False}


def load_peer(cfg):
    """Load model without adapter, tokenizer and end ids as transformers does."""
    import torch
    from transformers import AutoModelForCausalLM

    from minimath.data.chat import eos_ids
    from minimath.models.load import DTYPES, load_tokenizer
    torch.manual_seed(cfg.run.seed)
    tokenizer = load_tokenizer(cfg)
    model = AutoModelForCausalLM.from_pretrained(cfg.model.name, dtype=DTYPES[cfg.model.dtype],
                                                 attn_implementation=cfg.model.attn)
    model.to(cfg.model.device)
    touch(model)
    model.generation_config.eos_token_id = eos = eos_ids(tokenizer, model)  # what ends minimath's rows
    return model, tokenizer, eos


def lora_of(cfg):
    """Make peft's config of the adapter that minimath gives the model."""
    from peft import LoraConfig
    return LoraConfig(r=cfg.adapter.lora_r, lora_alpha=cfg.adapter.lora_alpha, lora_dropout=cfg.adapter.lora_dropout,
                      target_modules=cfg.adapter.lora_targets, task_type="CAUSAL_LM")


def run_trl(spec: dict, turns: Turns) -> None:
    from transformers import TrainerCallback
    cfg, facts = config_of(spec), {}
    model, tokenizer, _ = load_peer(cfg)

    class Pauses(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            turns.pause({})

        def on_step_end(self, args, state, control, **kwargs):
            if "batches" in facts:
                turns.pause({"tokens": facts["batches"][state.global_step - 1]})
                return
            rest = time.perf_counter() - turns.started - facts["rollout_seconds"]
            turns.pause({**facts, "update_seconds": rest})
            facts.clear()

    make = trl_sft if spec["stage"] == "sft" else trl_grpo
    with tempfile.TemporaryDirectory() as folder:
        make(spec, cfg, folder, facts, model=model, processing_class=tokenizer, peft_config=lora_of(cfg),
             callbacks=[Pauses()]).train()


def trl_sft(spec, cfg, folder, facts: dict, **trainer):
    """Make an SFTTrainer on the token ids that minimath trains on, in the same order."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from minimath.data.chat import encode
    rows = [encode(trainer["processing_class"], e, prompt_template=cfg.prompt.prompt_template, max_len=cfg.max_len)
            for e in examples_of("trl", cfg.batch_size * cfg.steps)]
    lengths = [len(row.ids) for row in rows]
    facts["batches"] = [sum(lengths[i:i + cfg.batch_size]) for i in range(0, len(rows), cfg.batch_size)]
    args = SFTConfig(**trl_arguments(spec, cfg, cfg.batch_size, max(lengths)), output_dir=folder, packing=False,
                     max_length=None, completion_only_loss=True, train_sampling_strategy="sequential")
    data = Dataset.from_list([{"input_ids": row.ids, "completion_mask": list(map(int, row.loss_mask))}
                              for row in rows])

    class ModelLoss(SFTTrainer):
        """With the model's own loss over full logits, as TRL before 1.x and Trainer."""

        def compute_loss(self, *args, **kwargs):
            return super(SFTTrainer, self).compute_loss(*args, **kwargs)

    kind = ModelLoss if spec["full_logits"] else SFTTrainer
    return kind(args=args, train_dataset=data, **trainer)


def trl_grpo(spec, cfg, folder, facts: dict, **trainer):
    """Make a GRPOTrainer with the prompts, loss and rewards of run_minimath."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    from minimath.data.chat import prompt_ids
    from minimath.grading.answer import AnswerChecker
    examples, tokenizer = examples_of("trl", cfg.prompts_per_step * cfg.steps), trainer["processing_class"]
    template = cfg.prompt.prompt_template
    longest = max(len(prompt_ids(tokenizer, e.problem, prompt_template=template)) for e in examples)
    checker = AnswerChecker()
    checker.__enter__()  # its child ends with this process

    def reward(prompts, completions, completion_ids, answer, **kwargs):
        texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in completion_ids]
        facts["tokens"] = facts.get("tokens", 0) + sum(map(len, completion_ids))
        facts["completions"] = facts.get("completions", 0) + len(texts)
        return completion_rewards(list(map(checker.check, texts, answer)), completion_ids)

    limit = cfg.sampling.max_new_tokens
    args = GRPOConfig(
        **trl_arguments(spec, cfg, cfg.prompts_per_step * cfg.group_size, longest + limit), output_dir=folder,
        num_generations=cfg.group_size, max_completion_length=limit, temperature=cfg.sampling.temperature,
        top_p=cfg.sampling.top_p, top_k=cfg.sampling.top_k, beta=cfg.loss.kl_coef, loss_type="dapo",
        epsilon=cfg.loss.clip_low, epsilon_high=cfg.loss.clip_high, scale_rewards="group", shuffle_dataset=False,
        generation_batch_size=spec.get("rows_per_generation") or None)
    data = Dataset.from_list([{"prompt": [{"role": "user", "content": template.format(problem=e.problem)}],
                               "answer": e.answer} for e in examples])

    class TimesRollouts(GRPOTrainer):
        def _generate_and_score_completions(self, inputs):
            started = time.perf_counter()
            scored = super()._generate_and_score_completions(inputs)
            facts["rollout_seconds"] = facts.get("rollout_seconds", 0.0) + time.perf_counter() - started
            return scored

    return TimesRollouts(args=args, train_dataset=data, reward_funcs=reward, **trainer)


def start(runs: dict, key: str) -> None:
    """Run the worker that the spec on the command line names."""
    spec = json.loads(sys.argv[1])
    stdout = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print; the protocol has its own file
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if spec["keep_freed_memory"]:
        from minimath.core.run import keep_freed_memory
        keep_freed_memory()
    runs[spec[key]](spec, Turns(stdout, spec["device"]))


if __name__ == "__main__":
    start({"minimath": run_minimath, "trl": run_trl}, "trainer")
