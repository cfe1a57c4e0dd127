r"""Stage 1, accuracy: supervised fine-tuning of a LoRA adapter on worked solutions. Read top to bottom.

    python -m minimath.train.sft model=HuggingFaceTB/SmolLM2-135M-Instruct data=problems.jsonl epochs=3

The paper (arXiv 2507.08267, section 3.1) trains long: 10 to 20 epochs on the shortest right solution of hard
problems; one epoch hurts. Each optimiser step takes `batch_size` examples, cuts them into micro-batches of at most
`micro_batch_tokens` tokens, and divides every loss by the trained tokens of the whole step, so neither loss nor gradient
depends on the cutting. The LM head is never called: hidden states go to minimath.kernels.linear_token_loss, which
returns loss and gradient without [tokens, vocab] logits.
"""
import contextlib
import sys
import time

import torch

from minimath.core import dist
from minimath.data.batch import forward_args, micro_batches, step_indices
from minimath.data.chat import encode, eos_ids, preflight
from minimath.core.checkpoint import load_checkpoint, save_adapter, save_checkpoint, verify
from minimath.config.load import config_dict
from minimath.config.schema import EvalConfig, SFTConfig
from minimath.core.errors import Interrupted, UserError
from minimath.data.examples import describe_report, load_examples
from minimath.rollout.open import open_engine
from minimath.eval.evaluate import evaluate_model
from minimath.kernels import linear_token_loss
from minimath.core.log import RunLog, truncate_metrics
from minimath.train.losses import nll_loss
from minimath.models.memory import in_memory, new_memory
from minimath.models.load import describe, head, hidden_states, load_model
from minimath.train.optimizer import LossScale, check_finite, clip_and_step, count_step, lr_at, make_optimizer
from minimath.core.run import Stop, open_run, save_errors
from minimath.rollout.sampling import stream_seed
from minimath.models.sharding import in_step
from minimath.core.state import restore_rng, rng_state, seed_rng


def sft(cfg: SFTConfig) -> dict:
    """Train; leaves adapter/, checkpoints/, metrics.jsonl and config.yaml in the run folder. Returns a summary.

    Raises UserError for anything the user can put right, before any long work where it can be known then.
    """
    examples, report = load_examples(cfg.data.source, split=cfg.data.split, limit=cfg.data.limit, strict=cfg.data.strict, need=("solution",),
                                     data_format=cfg.data_format)
    held_out = load_held_out(cfg)
    with open_run(cfg, "sft") as (log, stop):
        log.say(describe_report(report) or f"{len(examples)} examples")
        seed_rng(cfg.run.seed)  # adapter initialisation
        model, tokenizer = load_model(cfg, train=True)
        log.say(describe(model, cfg))
        rows = [encode(tokenizer, e, system=cfg.prompt.system, prompt_template=cfg.prompt.prompt_template, max_len=cfg.max_len)
                for e in examples]
        log.say(preflight(tokenizer, rows, eos=eos_ids(tokenizer, model)))
        rows = [row for row in rows if any(row.mask)]
        return train(cfg, model, tokenizer, rows, held_out, log, stop)


def train(cfg: SFTConfig, model, tokenizer, rows, held_out, log: RunLog, stop: Stop) -> dict:
    """The loop. rows: Encoded examples. Interrupted or out of time, it saves a checkpoint and returns."""
    total = cfg.steps or max(1, round(cfg.epochs * len(rows) / cfg.batch_size))
    params = [p for p in model.parameters() if p.requires_grad]
    dist.broadcast_parameters(params)
    optimizer, scale = make_optimizer(params, cfg), LossScale(model)
    state = {"done": 0, "bad": 0, "skipped": 0, "best": -1.0, "scale": scale.value, "good": scale.good,
             "memory": new_memory(cfg), "owed": False, "config": config_dict(cfg)}
    if cfg.run.resume:
        state |= resume_state(cfg, model, optimizer, log) or {}
        scale.value, scale.good = state["scale"], state["good"]
    saved, started = state["done"], time.monotonic()

    with log.progress(total, "sft") as advance, steps_kept(cfg, model, optimizer, state, log) as step_done:
        advance(state["done"])
        evaluate_owed(cfg, model, tokenizer, optimizer, held_out, state, log, stop)
        while state["done"] < total and not stop.requested():
            step, new = state["done"], dict(state)
            lr = lr_at(step, total, lr=cfg.optimizer.lr, schedule=cfg.optimizer.lr_schedule, warmup=cfg.optimizer.warmup,
                       min_lr_ratio=cfg.min_lr_ratio)
            batch = [rows[i] for i in step_indices(step, len(rows), cfg.batch_size, cfg.run.seed)]
            # seeded by the step, so that dropout after a resume is what it would have been
            torch.manual_seed(stream_seed(cfg.run.seed, step) + dist.rank())
            step_started = time.monotonic()
            loss, tokens = in_memory(loss_and_gradient, cfg, model, tokenizer, batch, scale.value, params=params,
                                     memory=state["memory"], lengths=[len(row.ids) for row in dist.shard(batch)],
                                     say=log.say)
            loss = dist.all_reduce_sum({"loss": loss})["loss"]
            dist.all_reduce_gradients(params)
            grad_norm, stepped = clip_and_step(optimizer, params, cfg.optimizer.max_grad_norm, lr, scale=scale.value, loss=loss)
            count_step(new, scale, stepped, grad_norm, loss, log.say)
            step_done(new | {"done": step + 1, "scale": scale.value, "good": scale.good})

            if (step + 1) % cfg.log_every == 0 or step + 1 == total:
                speed = tokens / max(time.monotonic() - step_started, 1e-9)
                log.metrics(step + 1, loss=loss, lr=lr, grad_norm=grad_norm, stepped=stepped, skipped=state["skipped"],
                            tokens=tokens, tokens_per_s=speed, epoch=(step + 1) * cfg.batch_size / len(rows))
                advance(1, loss=loss, tok_s=speed)
            else:
                advance(1)
            if cfg.run.sample_every and (step + 1) % cfg.run.sample_every == 0 and (dist.is_main() or cfg.model.shard):
                print_sample(cfg, model, tokenizer, batch[0], step + 1, log)
            is_best = False
            if held_out and cfg.evaluation.eval_every and (step + 1) % cfg.evaluation.eval_every == 0:
                is_best = evaluate_step(cfg, model, tokenizer, held_out, state, log, stop)
            if is_best or (cfg.run.save_every and (step + 1) % cfg.run.save_every == 0):
                check_finite(params, optimizer)
                with save_errors(cfg, log, state):
                    save_checkpoint(log.run_dir, step + 1, model=model, optimizer=optimizer, state=state, keep=cfg.keep,
                                    best=is_best)
                    saved = step + 1

    return finish(cfg, model, optimizer, state, saved, total, started, log, stop)


def loss_and_gradient(cfg: SFTConfig, model, tokenizer, batch, scale: float) -> tuple[float, int]:
    """Add the gradient of the step's loss, times `scale`, to .grad; returns (loss, tokens of the step)."""
    trained = sum(sum(row.mask[1:]) for row in batch)  # of all processes; the first token has no prediction
    loss_fn = nll_loss(max(1, trained), label_smoothing=cfg.label_smoothing, z_loss=cfg.z_loss)
    lm_head, total = head(model), 0.0
    for _, micro in in_step(model, micro_batches(dist.shard(batch), packing=cfg.packing, micro_batch_tokens=cfg.optimizer.micro_batch_tokens,
                                                 pad_id=tokenizer.pad_token_id, device=model.device)):
        hidden = hidden_states(model, **forward_args(micro))  # (B, T, D)
        loss, _ = linear_token_loss(hidden.flatten(0, 1), lm_head.weight, micro["target"], loss_fn,
                                    all_stats=cfg.label_smoothing > 0, **lm_head.kernel_args())
        (loss * scale).backward()
        total += float(loss.detach())
    return total, sum(len(row.ids) for row in batch)


@contextlib.contextmanager
def steps_kept(cfg, model, optimizer, state: dict, log: RunLog):
    """Yield step_done(changes), which puts them into `state`. Of a step that is not done, what it drew and counted is
    given up, random numbers too: a user's gate may throw dice. Interrupted ends the loop inside as its own end would;
    whatever else ends it, the steps done are saved."""
    generators = rng_state()

    def step_done(changes: dict) -> None:
        nonlocal generators
        state.update(changes)
        generators = rng_state()

    try:
        yield step_done
    except Interrupted:
        restore_rng(*generators)
        log.say("the rollout was interrupted; its step is not counted")
    except Exception:
        restore_rng(*generators)
        step = state["done"]
        if step and verify(log.run_dir / "checkpoints" / f"step-{step:06d}"):  # missing, or damaged
            try:
                check_finite((p for p in model.parameters() if p.requires_grad), optimizer)
                save_checkpoint(log.run_dir, step, model=model, optimizer=optimizer, state=state, keep=cfg.keep)
                log.say(f"the {step} steps done are saved; put it right and go on with resume=true")
            except (UserError, RuntimeError) as error:  # that of the loop is what the user must hear
                log.say(f"the steps since the last checkpoint can't be saved: {error}")
        raise


def finish(cfg, model, optimizer, state: dict, saved: int, total: int, started: float, log: RunLog, stop: Stop) -> dict:
    """Save what the last checkpoint (after step `saved`) lacks, and the adapter; say how far it got; the summary."""
    check_finite((p for p in model.parameters() if p.requires_grad), optimizer)
    if state["done"] > saved:
        save_checkpoint(log.run_dir, state["done"], model=model, optimizer=optimizer, state=state, keep=cfg.keep)
    adapter = save_adapter(model, log.run_dir / "adapter")
    if state["done"] < total:
        log.say(f"{stop.reason()}: stopped after step {state['done']} of {total}; go on with out={log.run_dir} "
                "resume=true")
    log.say(f"adapter: {adapter} ({time.monotonic() - started:.0f} s)")
    return {"steps": state["done"], "run_dir": str(log.run_dir), "adapter": str(adapter), "signal": stop.signal}


def resume_state(cfg, model, optimizer, log: RunLog) -> dict | None:
    """Load the newest sound checkpoint; say what changed in the options; drop metrics of lost steps."""
    state = load_checkpoint(log.run_dir, model=model, optimizer=optimizer)
    done = state["done"] if state else 0
    if dist.all_reduce_max(done) > done:
        raise UserError(f"process {dist.rank()} found {done} steps in {log.run_dir}, another one found more: all "
                        "machines need the same run folder, on a drive that they share")
    if state is None:
        log.say("no checkpoint yet: starting from step 0")
        truncate_metrics(log.run_dir, 0)
        return None
    now, before = config_dict(cfg), state["config"]
    changed = {k: (before.get(k), now[k]) for k in now if before.get(k) != now[k] and k not in ("resume", "out")}
    if changed:
        log.say("options changed since the checkpoint: "
                + ", ".join(f"{k} {a} -> {b}" for k, (a, b) in changed.items()))
    truncate_metrics(log.run_dir, state["done"])
    log.say(f"resumed after step {state['done']}")
    return state | {"config": now, "memory": new_memory(cfg, state)}


def load_held_out(cfg) -> list:
    """The problems evaluated during training, or []. Raises UserError if evaluation is asked for without data."""
    if cfg.evaluation.eval_every and not cfg.evaluation.eval_data:
        raise UserError("eval_every needs held-out problems: set eval_data=, or eval_every=0")
    if not cfg.evaluation.eval_data:
        return []
    return load_examples(cfg.evaluation.eval_data, split="test", limit=cfg.evaluation.eval_limit, strict=cfg.data.strict, need=("answer",))[0]


def evaluate_step(cfg, model, tokenizer, held_out, state: dict, log: RunLog, stop: Stop) -> bool:
    """Greedy accuracy on the held-out problems; returns whether it is the best so far. Interrupted, it is owed: the run
    that goes on begins with it."""
    longest = getattr(cfg, "eval_max_new_tokens", None) or cfg.sampling.max_new_tokens
    eval_cfg = EvalConfig(system=cfg.prompt.system, prompt_template=cfg.prompt.prompt_template, max_new_tokens=longest)
    state["owed"] = True
    try:
        summary, _ = evaluate_model(model, tokenizer, held_out, eval_cfg, log, stop)
    except Interrupted:
        log.say("the evaluation was interrupted")
        return False
    state["owed"] = False
    log.metrics(state["done"], eval_accuracy=summary["accuracy"], eval_mean_tokens=summary["mean_tokens"])
    low, high = summary["interval"]
    log.say(f"step {state['done']}: accuracy {summary['accuracy']:.3f} ({low:.3f} to {high:.3f}), "
            f"{summary['mean_tokens']:.0f} tokens on {summary['problems']} held-out problems")
    # accuracy first; among equals the shorter
    score = summary["accuracy"] - 1e-6 * summary["mean_tokens"]
    is_best, state["best"] = score > state["best"], max(score, state["best"])
    return is_best


def evaluate_owed(cfg, model, tokenizer, optimizer, held_out, state: dict, log: RunLog, stop: Stop) -> None:
    """The evaluation in which the run was stopped, if it was; its checkpoint becomes the best one where it is."""
    if state["owed"] and held_out and evaluate_step(cfg, model, tokenizer, held_out, state, log, stop):
        with save_errors(cfg, log, state):
            save_checkpoint(log.run_dir, state["done"], model=model, optimizer=optimizer, state=state, keep=cfg.keep,
                            best=True)


def print_sample(cfg: SFTConfig, model, tokenizer, row, step: int, log: RunLog) -> None:
    """Show what the model now writes for a training problem."""
    prompt = row.ids[:row.mask.index(True)]
    greedy = EvalConfig(max_new_tokens=cfg.evaluation.eval_max_new_tokens)
    with open_engine(greedy, model, tokenizer, say=log.say) as sample:
        [[completion]] = sample([prompt])
    text = tokenizer.decode(completion.ids, skip_special_tokens=True)
    log.sample({"step": step, "prompt": tokenizer.decode(prompt), "completion": text})
    log.show(f"step {step}, sample", text)


if __name__ == "__main__":
    from minimath.cli import dispatch, run_command
    sys.exit(run_command(lambda: dispatch("sft", sys.argv[1:])))
