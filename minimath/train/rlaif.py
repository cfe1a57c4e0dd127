r"""Stage 2, efficiency: on-policy RL with an AI judge. Read top to bottom.

    python -m minimath.train.rlaif model=... adapter=runs/my-sft data=problems.jsonl judge=self

Each step: draw P problems (curriculum.py) and sample G completions of each; a verifier says which are correct
(verifier.py); a judge compares the correct ones in pairs; reward = correct + judge wins + brevity (rewards.py,
brevity.py; `reward=paper` is the paper's own stage 2, arXiv 2507.08267 section 3.2), advantages relative to the group
(advantages.py; GRPO, arXiv 2402.03300), and those of each token by a teacher (teacher.py); one or more policy updates
through minimath.kernels.linear_token_loss (losses.py). Groups whose rewards are all equal carry no gradient: without a
teacher they are dropped and, up to max_refill times, replaced by new problems (DAPO, arXiv 2503.14476).

With one update per rollout the policy that sampled is the policy that trains: the ratio is 1 in value, the clips are
idle, and `policy/clipped` says so. The recorded sampling log-probs enter as a truncated importance weight.
"""
import math
import statistics
import sys

import torch

from minimath.config.load import config_of_words
from minimath.config.schema import RLAIFConfig
from minimath.config.trained import as_trained
from minimath.core.entry import run_command
from minimath.data.batch import forward_args
from minimath.data.examples import load_examples
from minimath.data.sample import Group
from minimath.kernels import linear_token_loss
from minimath.models.forward import adapter_off, head, hidden_states
from minimath.models.policy import Policy
from minimath.models.prefix import trained_states
from minimath.rollout.open import open_engine
from minimath.train.advantages import set_advantages
from minimath.train.batches import PolicyBatch, in_loss, logps
from minimath.train.curriculum import ProblemSampler
from minimath.train.losses import policy_loss
from minimath.train.monitor import CollapseMonitor, canary_watch
from minimath.train.optimizer import Optimizer
from minimath.train.refresh import JudgeRefresh
from minimath.train.rewards import Reward, make_reward, training_judge
from minimath.train.rollouts import encode_problems, rollout_metrics, sample_groups, show_group, token_metrics
from minimath.train.teacher import Teacher, open_teacher
from minimath.train.trainer import Trainer
from minimath.train.verifier import Verifier, verifier_columns


def rlaif(cfg: RLAIFConfig) -> dict:
    """Train; leave adapter, checkpoints and metrics in the run folder.

    Returns a summary: steps, run_dir, adapter, signal. Raises UserError for anything the user can put right; the judge
    is tried before any long work."""
    cfg = as_trained(cfg)
    examples, report = load_examples(cfg.data, need=verifier_columns(cfg.verifier))
    verifier = Verifier(cfg.verifier, examples, majority_share=cfg.majority_share)
    with Trainer(cfg, "rlaif", examples) as trainer:
        policy, say = trainer.policy, trainer.log.say
        judge = verifier.judge = training_judge(cfg, policy, say)
        reward, monitor = make_reward(cfg, judge), CollapseMonitor()
        canary = canary_watch(cfg, judge, trainer.log.run_dir)
        brevity, refresh = reward.control, JudgeRefresh(cfg, policy, judge, trainer.log)
        problems = encode_problems(cfg, policy, examples, report, say)
        sampler = ProblemSampler(cfg.curriculum, problems, cfg.group_size, cfg.run.seed)
        with (verifier, open_teacher(cfg, policy, say) as teacher, refresh, open_engine(
                cfg.engine, cfg.sampling, policy, seed=cfg.run.seed, run_dir=trainer.log.run_dir, say=say) as engine):
            trainer.track(sampler=sampler, monitor=monitor, engine=engine, judge=refresh, brevity=brevity)
            for step in trainer.steps(cfg.steps):
                engine.max_new_tokens = brevity.limit(step.progress, cfg.sampling.max_new_tokens)
                with step.timed("rollout"):
                    kept, seen = collect_groups(cfg, engine, sampler, verifier, reward)
                step.log(rollout_metrics(kept, seen, engine), verifier.metrics(), reward.metrics(), sampler.metrics(),
                         canary(step, kept), brevity.follow(seen, trainer.best.newest))
                if kept and step.due(cfg.run.sample_every):
                    show_group(kept[0], step.number, trainer.log)
                with step.timed("update"):
                    step.log(update(cfg, policy, trainer.optimizer, kept, seen, teacher))
                step.log(refresh.learn(step, seen))
                step.warn(monitor.check(step.metrics))
    return trainer.summary()


# ---- rollout, verifier, judge, rewards, advantages

def collect_groups(cfg: RLAIFConfig, engine, sampler: ProblemSampler, verifier: Verifier,
                   reward: Reward) -> tuple[list[Group], list[Group]]:
    """Sample and score until P groups carry a signal; return them, and all seen."""
    kept, seen, taken = [], [], []
    for _ in range(1 + cfg.max_refill):
        drawn = sampler.draw(cfg.prompts_per_step - len(kept), taken)
        groups = sample_groups(engine, verifier, drawn, cfg.group_size)
        sampler.record(drawn, groups)
        reward.score(groups)
        set_advantages(groups, cfg.loss.scale_advantage, lambda sample: in_loss(sample, cfg),
                       reward.control.advantage_weight)
        taken += [problem.index for problem in drawn]
        seen += groups
        kept += [group for group in groups if group.has_signal()
                 or cfg.teacher.name and any(in_loss(sample, cfg) for sample in group.samples)]
        if len(kept) == cfg.prompts_per_step:
            break
    return kept, seen


# ---- the update

def update(cfg: RLAIFConfig, policy: Policy, optimizer: Optimizer, kept: list[Group], seen: list[Group],
           teacher: Teacher | None = None) -> dict:
    """Take updates_per_rollout steps on the groups kept; return mean metrics."""
    if not kept:  # from NaN logits no group gets a signal: no update would tell
        finite = all(math.isfinite(logp) for group in seen for sample in group.samples for logp in sample.logp)
        return optimizer.skip_step(finite=finite)
    batch = PolicyBatch(policy, cfg, kept)
    if not cfg.on_policy():
        batch.old_logp = logps(cfg, policy, optimizer, batch)
    if cfg.loss.kl_coef:
        with adapter_off(policy.model):
            batch.ref_logp = logps(cfg, policy, optimizer, batch)
    taught = teacher.teach(batch, kept, optimizer) if teacher else {}
    metrics = []
    for _ in range(cfg.updates_per_rollout):
        if cfg.loss.name == "gspo" and not cfg.on_policy():  # the sequence ratio needs every token first
            batch.seq_log_ratio = [torch.full_like(now, float((now - old).mean()))
                                   for now, old in zip(logps(cfg, policy, optimizer, batch), batch.old_logp)]
        metrics.append(optimizer.step(batch, policy_loss_of_micro_batch(cfg, policy, batch, teacher)))
    means = {name: statistics.fmean(each[name] for each in metrics) for name in metrics[0]}
    return means | taught | {"optim/skipped": optimizer.skipped, "data/trained_tokens": batch.trained_tokens}


def policy_loss_of_micro_batch(cfg: RLAIFConfig, policy: Policy, batch: PolicyBatch, teacher: Teacher | None = None):
    """Make an optimizer step's closure: forward, fused policy loss and KL, metrics."""
    lm_head = head(policy.model)

    def loss_of_micro_batch(indices, micro):
        target, trained = micro["target"], micro["trained"]  # (N,), and the rows of it that count
        rows, full_logp = batch.at_rows(indices, micro)
        hidden = trained_states(hidden_states(policy.model, **forward_args(micro)), micro)  # (N, D)
        loss, stats = linear_token_loss(hidden, lm_head.weight, target, policy_loss(rows, cfg.loss), rows=trained,
                                        temperature=cfg.sampling.temperature, **lm_head.kernel_args())
        sound = torch.stack([values.sum() for values in rows if values is not None]).isfinite().all()
        loss = torch.where(sound, loss, math.nan)  # a clip could hide an infinite log-prob
        metrics = token_metrics(cfg.loss, rows, stats, full_logp, trained)
        if teacher and cfg.teacher.kl == "full":
            kl = teacher.kl(indices, hidden[trained], lm_head)
            loss = loss + cfg.teacher.weight * (kl * rows.weight[trained]).sum()
            metrics["teacher/kl"] = kl.detach().sum()
        return loss, metrics

    return loss_of_micro_batch


if __name__ == "__main__":
    sys.exit(run_command(lambda: rlaif(config_of_words(RLAIFConfig, sys.argv[1:]))))
