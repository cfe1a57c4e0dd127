r"""Stage 1, accuracy: supervised fine-tuning of a LoRA adapter on worked solutions. Read top to bottom.

    python -m minimath.train.sft model=HuggingFaceTB/SmolLM2-135M-Instruct data=problems.jsonl epochs=3

The paper (arXiv 2507.08267, section 3.1) trains long: 10 to 20 epochs on the shortest correct solution of hard
problems; one epoch hurts. Each optimizer step takes `batch_size` examples, cuts them into micro-batches of at most
`micro_batch_tokens` tokens, and divides every loss by the trained tokens of the whole step, so neither loss nor
gradient depends on the cutting. The LM head is never called: hidden states go to minimath.kernels.linear_token_loss,
which returns loss and gradient without [tokens, vocab] logits.
"""
import sys

from minimath.config.load import config_of_words
from minimath.config.schema import SamplingOptions, SFTConfig
from minimath.config.trained import as_trained
from minimath.core.entry import run_command
from minimath.data.batch import forward_args, step_indices
from minimath.data.chat import Encoded, encode, preflight
from minimath.data.examples import describe_report, load_examples
from minimath.kernels import linear_token_loss
from minimath.models.forward import head, hidden_states
from minimath.models.policy import Policy
from minimath.models.prefix import trained_states
from minimath.rollout.open import open_engine
from minimath.train.batches import SolutionBatch
from minimath.train.losses import nll_loss
from minimath.train.optimizer import Optimizer
from minimath.train.trainer import Step, Trainer


def sft(cfg: SFTConfig) -> dict:
    """Fine-tune; leaves adapter/, checkpoints/ and metrics.jsonl in the run folder.

    Returns a summary: steps, run_dir, adapter, signal. Raises UserError for anything the user can put right, before
    any long work where it can be known then."""
    cfg = as_trained(cfg)
    examples, report = load_examples(cfg.data, need=("solution",))
    with Trainer(cfg, "sft", examples) as trainer:
        trainer.log.say(describe_report(report) or f"{len(examples)} examples")
        policy = trainer.policy
        rows = encode_examples(cfg, policy, examples, trainer.log.say)
        total = cfg.steps or max(1, round(cfg.epochs * len(rows) / cfg.batch_size))
        for step in trainer.steps(total):
            batch = [rows[i] for i in step_indices(step.number - 1, len(rows), cfg.batch_size, cfg.run.seed)]
            if step.due(cfg.run.sample_every):
                show_sample(cfg, policy, batch[0], step, trainer.log)
            with step.timed("step"):
                step.log(update(policy, trainer.optimizer, batch, packing=cfg.packing))
            step.log({"data/epoch": step.number * cfg.batch_size / len(rows),
                      "time/tokens_per_s": step.metrics["data/tokens"] / max(step.metrics["time/step"], 1e-9)})
    return trainer.summary()


def encode_examples(cfg: SFTConfig, policy: Policy, examples, say) -> list[Encoded]:
    """Tokenize the examples; leave out those of which nothing is trained."""
    rows = [encode(policy.tokenizer, example, **cfg.prompt.asked(), max_len=cfg.max_len) for example in examples]
    policy.known([i for row in rows for i in row.ids])
    say(preflight(policy.tokenizer, rows, eos=policy.eos))
    return [row for row in rows if any(row.loss_mask)]


def update(policy: Policy, optimizer: Optimizer, rows: list[Encoded], *, packing: bool = True, groups=None) -> dict:
    """Take one step on the mean negative log-likelihood; return the metrics.

    groups: as of SolutionBatch, for rows behind common prompts."""
    batch, lm_head = SolutionBatch(policy, rows, packing=packing, groups=groups), head(policy.model)
    loss_fn = nll_loss(batch.trained_tokens)

    def loss_of_micro_batch(indices, micro):
        hidden = trained_states(hidden_states(policy.model, **forward_args(micro)), micro)  # (N, D)
        loss, _ = linear_token_loss(hidden, lm_head.weight, micro["target"], loss_fn,
                                    rows=micro["trained"], all_stats=False, **lm_head.kernel_args())
        return loss, {}

    return optimizer.step(batch, loss_of_micro_batch) | {"data/tokens": batch.tokens}


def show_sample(cfg: SFTConfig, policy: Policy, row: Encoded, step: Step, log) -> None:
    """Show what the model writes for a training problem before this step."""
    prompt = row.ids[:row.loss_mask.index(True)]
    greedy = SamplingOptions(temperature=0.0, max_new_tokens=cfg.evaluation.eval_max_new_tokens)
    with open_engine(cfg.engine, greedy, policy, run_dir=log.run_dir, say=log.say) as engine:
        [[sample]] = engine.generate([prompt])
    log.sample({"step": step.number, "prompt": policy.tokenizer.decode(prompt), "completion": sample.text})
    log.show(f"step {step.number}, sample", sample.text)


if __name__ == "__main__":
    sys.exit(run_command(lambda: sft(config_of_words(SFTConfig, sys.argv[1:]))))
