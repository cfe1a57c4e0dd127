r"""Stage 2, efficiency: on-policy RL with an AI judge. Read top to bottom.

    python -m minimath.train.rlaif model=... adapter=runs/my-sft data=problems.jsonl judge=self

Each step: draw P problems (curriculum.py) and sample G completions of each; gate them right or wrong (gates.py); let a
judge compare the right ones in pairs; reward = gate + judge wins + brevity among the right (reward.py; `reward=rules`
is the paper's own stage 2, arXiv 2507.08267 section 3.2, without a judge); advantages relative to the group (GRPO,
arXiv 2402.03300); one or more policy updates through minimath.kernels.linear_token_loss. Groups whose rewards are all
equal carry no gradient: they are dropped and, up to max_refill times, replaced by new problems (DAPO, arXiv
2503.14476). monitors.py says when a run collapses.

With one update per rollout the policy that sampled is the policy that trains: the ratio is 1 in value, the clips
are idle, and `clipped` in the metrics says so. The recorded sampling log-probs enter as a truncated or masked
importance weight.
"""
import dataclasses
import math
import statistics
import sys
import time
from dataclasses import dataclass

import torch

from minimath.core import dist
from minimath.grading.answer import AnswerChecker
from minimath.data.batch import at_targets, forward_args
from minimath.data.chat import IGNORE, Encoded, prompt_ids
from minimath.core.checkpoint import save_checkpoint
from minimath.config.load import config_dict
from minimath.config.schema import RLAIFConfig
from minimath.core.errors import UserError
from minimath.train.curriculum import copy_of, curriculum_facts, draw, new_curriculum, record
from minimath.data.examples import Example, describe_report, load_examples
from minimath.rollout.open import open_engine
from minimath.train.verifier import check_gate, make_gate, needed_columns
from minimath.judges.judge import Candidate, Judge, judge_groups, make_judge
from minimath.judges.canary import canary_facts, canary_pairs
from minimath.kernels import linear_logp, linear_token_loss
from minimath.core.log import RunLog
from minimath.train.losses import PolicyRows, clip_hint, importance_weight, policy_loss, token_weights
from minimath.models.memory import in_memory, learning_slots, new_memory
from minimath.models.load import adapter_off, describe, head, hidden_states, inference, load_model
from minimath.train.monitor import collapse_warnings, log_group, new_monitor, reward_parts, rollout_facts, shown
from minimath.train.optimizer import LossScale, check_finite, clip_and_step, count_step, lr_at, make_optimizer
from minimath.models.prefix import forward_batches, own_rows, trained_states
from minimath.report.metrics import write_judge_plot
from minimath.train.rewards import GroupFacts, check_reward, format_score, group_advantages, group_rewards, uses_judge
from minimath.rollout.engine import Completion
from minimath.core.run import Stop, open_run, save_errors
from minimath.rollout.sampling import stream_seed
from minimath.train.sft import evaluate_owed, evaluate_step, finish, load_held_out, resume_state, steps_kept
from minimath.models.sharding import in_step
from minimath.grading.steps import check_steps
from minimath.core.state import seed_rng


@dataclass
class Group:
    """The G completions of one problem and what became of them; lists are per completion."""
    example: Example
    prompt: list[int]
    completions: list[Completion]
    texts: list[str]
    right: list[bool]
    valid: list[bool]  # False: left out of advantages and loss (overlong=mask)
    rewards: list[float]
    advantage: list[float]
    parts: dict[str, list] = dataclasses.field(default_factory=dict)  # of the rewards, by name


def rlaif(cfg: RLAIFConfig) -> dict:
    """Train; leaves adapter/, checkpoints/, metrics.jsonl, samples.jsonl in the run folder. Returns a summary.

    Raises UserError for anything the user can put right; the judge is tried before any long work.
    """
    check_reward(cfg)
    if cfg.model.shard and cfg.judge.name == "self" and uses_judge(cfg):
        raise UserError("judge=self asks in one process, and with shard=true a forward is work of all processes: use "
                        "judge=openai or judge=heuristic")
    examples, report = load_examples(cfg.data.source, split=cfg.data.split, limit=cfg.data.limit, strict=cfg.data.strict,
                                     need=needed_columns(cfg.verifier), data_format=cfg.data_format)
    check_gate(cfg, examples)
    held_out = load_held_out(cfg)
    with open_run(cfg, "rlaif") as (log, stop):
        log.say(describe_report(report) or f"{len(examples)} problems")
        seed_rng(cfg.run.seed)  # adapter initialisation, and whatever a user's gate or reward draws
        model, tokenizer = load_model(cfg, train=True)
        log.say(describe(model, cfg))
        judge = make_judge(cfg, model, tokenizer)
        if uses_judge(cfg) and dist.is_main():
            judge.ping()
        prompts = [prompt_ids(tokenizer, e.problem, system=cfg.prompt.system, prompt_template=cfg.prompt.prompt_template)
                   for e in examples]
        problems = [(e, p) for e, p in zip(examples, prompts, strict=True) if len(p) <= cfg.prompt.max_prompt_len]
        if len(problems) < max(1, cfg.prompts_per_step):
            raise UserError(f"{len(problems)} of {len(examples)} prompts fit max_prompt_len={cfg.prompt.max_prompt_len}, but "
                            f"a step needs {cfg.prompts_per_step}; raise max_prompt_len or lower prompts_per_step")
        log.say(f"{len(problems)} problems ({len(examples) - len(problems)} too long), reward={cfg.reward.name}"
                + (f" with judge {judge.name}" if uses_judge(cfg) else "") + f", gate={cfg.verifier}, loss {cfg.loss.name}")
        if hint := clip_hint(cfg):
            log.say(hint)
        return train(cfg, model, tokenizer, problems, judge, held_out, log, stop)


def train(cfg: RLAIFConfig, model, tokenizer, problems, judge: Judge, held_out, log: RunLog, stop: Stop) -> dict:
    """The loop. problems: (Example, prompt ids). Interrupted, it gives up the step's rollout and saves."""
    params = [p for p in model.parameters() if p.requires_grad]
    dist.broadcast_parameters(params)
    optimizer, scale = make_optimizer(params, cfg), LossScale(model)
    # `cursor` counts problems drawn; refills make it run ahead of the step
    state = {"done": 0, "cursor": 0, "bad": 0, "skipped": 0, "best": -1.0, "scale": scale.value, "good": scale.good,
             "memory": new_memory(cfg), "owed": False, "config": config_dict(cfg), "monitor": new_monitor(),
             "curriculum": new_curriculum()}
    if cfg.run.resume:
        state |= resume_state(cfg, model, optimizer, log) or {}
        scale.value, scale.good = state["scale"], state["good"]
    saved, started = state["done"], time.monotonic()

    canary = canary_pairs(cfg.run.seed) if cfg.judge.canary_every and uses_judge(cfg) else []
    sampling = cfg.replace(slots=state["memory"]["slots"])
    with (steps_kept(cfg, model, optimizer, state, log) as step_done, log.progress(cfg.steps, "rlaif") as advance,
          AnswerChecker() as checker,
          open_engine(sampling, model, tokenizer, say=log.say, run_dir=log.run_dir) as engine):
        gate, sample = make_gate(cfg, checker), learning_slots(engine, sampling, state["memory"])
        advance(state["done"])
        evaluate_owed(cfg, model, tokenizer, optimizer, held_out, state, log, stop)
        while state["done"] < cfg.steps and not stop.requested():
            step, clock, new = state["done"], time.monotonic(), dict(state)
            groups, facts = collect_groups(cfg, sample, tokenizer, problems, judge, gate, new, stop)
            facts |= {"rollout_seconds": time.monotonic() - clock}
            clock = time.monotonic()
            if groups:
                torch.manual_seed(stream_seed(cfg.run.seed, step) + dist.rank())
                facts |= update(cfg, model, tokenizer, groups, optimizer, params, scale, new, log.say)
            elif not math.isfinite(facts["surprisal"]):  # from NaN logits no group gets a signal: no update would tell
                count_step(new, scale, False, math.nan, math.nan, log.say)
                facts["stepped"] = 0.0
            facts |= {"skipped": new["skipped"], "update_seconds": time.monotonic() - clock}
            step_done(new | {"done": step + 1, "scale": scale.value, "good": scale.good})

            watched = bool(canary) and (step + 1) % cfg.judge.canary_every == 0 and dist.is_main()
            if watched:
                facts |= canary_facts(judge, canary, [(g.example.problem, candidates_of(g)) for g in groups])
            for warning in collapse_warnings(state["monitor"], facts):
                log.say(f"step {step + 1}: {warning}")
            if (step + 1) % cfg.log_every == 0 or step + 1 == cfg.steps or watched:
                log.metrics(step + 1, **facts)
            if cfg.run.sample_every and (step + 1) % cfg.run.sample_every == 0 and groups:
                log_group(groups[0], step + 1, log)
            advance(1, **shown(facts))
            is_best = False
            if held_out and cfg.evaluation.eval_every and (step + 1) % cfg.evaluation.eval_every == 0:
                is_best = evaluate_step(cfg, model, tokenizer, held_out, state, log, stop)
            if is_best or (cfg.run.save_every and (step + 1) % cfg.run.save_every == 0):
                check_finite(params, optimizer)
                with save_errors(cfg, log, state):
                    save_checkpoint(log.run_dir, step + 1, model=model, optimizer=optimizer, state=state, keep=cfg.keep,
                                    best=is_best)
                    saved = step + 1

    summary = finish(cfg, model, optimizer, state, saved, cfg.steps, started, log, stop)
    if canary and dist.is_main():
        write_judge_plot(log.run_dir, log.say)
    return summary


# ---- rollout, answers, judge, rewards, advantages

def collect_groups(cfg: RLAIFConfig, sample, tokenizer, problems, judge, gate, state,
                   stop) -> tuple[list[Group], dict]:
    """Sample and score groups until P of them carry a signal or max_refill rounds are used up; (groups, metrics)."""
    kept, seen, judged, cursor, engine, taken = [], [], [], state["cursor"], {}, []
    curriculum = copy_of(state["curriculum"])
    for _ in range(1 + cfg.max_refill):
        wanted = cfg.prompts_per_step - len(kept)
        chosen = draw(cfg, curriculum, cursor, wanted, len(problems), taken)
        groups = sample_groups(cfg, sample, tokenizer, [problems[i] for i in chosen], gate, cursor, stop, engine)
        for index, group in zip(chosen, groups, strict=True):
            record(curriculum, index, sum(group.right), len(group.right), cursor)
            cursor += 1
        taken += chosen
        judged.append(score_together(cfg, groups, judge))
        seen += groups
        kept += [group for group in groups if any(group.advantage)]
        if len(kept) == cfg.prompts_per_step:
            break
    # only now: the problems of an interrupted rollout are drawn again after a resume
    state |= {"cursor": cursor, "curriculum": curriculum}
    engine = {name: engine[name] for name in ("slots", "slot_fill", "weights") if name in engine}
    return kept, rollout_facts(seen, kept, judged) | engine | curriculum_facts(cfg, curriculum, cursor, len(problems))


def sample_groups(cfg: RLAIFConfig, sample, tokenizer, drawn, gate, cursor: int, stop: Stop,
                  facts: dict) -> list[Group]:
    """G completions of each drawn problem, with their texts and whether their answers are right. Several processes
    sample and check a share each, and hold all groups afterwards."""
    # the stream of a completion depends on the draw's place in the run and on its own number, not on the batch
    keys, drawn = dist.shard(list(range(cursor, cursor + len(drawn)))), dist.shard(drawn)
    sampled = sample([prompt for _, prompt in drawn], samples=cfg.group_size, keys=keys, on_step=stop.check,
                     facts=facts)
    groups = []
    for (example, prompt), completions in zip(drawn, sampled, strict=True):
        texts = [tokenizer.decode(c.ids, skip_special_tokens=True) for c in completions]
        right = gate(texts, example)
        valid = [c.ended or cfg.reward.overlong != "mask" for c in completions]
        # a completion that was cut has not answered, whatever number stands in it
        right = [ok and c.ended for ok, c in zip(right, completions, strict=True)]
        groups.append(Group(example, prompt, completions, texts, right, valid, [], []))
    return dist.gather(groups)


def score_together(cfg: RLAIFConfig, groups: list[Group], judge: Judge) -> dict:
    """score_groups by process 0, since a judge's call costs and a user's reward may throw dice; all get its result."""
    stats = score_groups(cfg, groups, judge) if dist.is_main() else None
    stats, scored = dist.broadcast((stats, [(group.rewards, group.advantage, group.parts) for group in groups]))
    for group, scores in zip(groups, scored, strict=True):
        group.rewards, group.advantage, group.parts = scores
    return stats


def score_groups(cfg: RLAIFConfig, groups: list[Group], judge: Judge) -> dict:
    """Fill in rewards and advantages; returns the judge's statistics ({} when none was asked)."""
    stats, wins = {}, [[None] * cfg.group_size for _ in groups]
    if uses_judge(cfg):
        wins, stats = judge_groups(judge, [(g.example.problem, candidates_of(g)) for g in groups])
    for group, win in zip(groups, wins, strict=True):
        done = group.completions
        facts = GroupFacts(group.example, group.texts, group.right, [len(c.ids) for c in done], [c.ended for c in done],
                           [format_score(text) for text in group.texts], win, cfg.sampling.max_new_tokens)
        group.rewards, group.parts = group_rewards(cfg, facts), reward_parts(cfg, facts)
        group.advantage = group_advantages([group.rewards], scale=cfg.loss.scale_advantage, valid=[group.valid])[0].tolist()
        if not all(map(math.isfinite, group.rewards)):  # it must reach the loss, and be counted there
            group.advantage = [math.nan] * len(group.rewards)
    return stats


def candidates_of(group: Group) -> list[Candidate]:
    return [Candidate(text, right, check_steps(text), len(c.ids))
            for text, right, c in zip(group.texts, group.right, group.completions, strict=True)]


# ---- the update

def update(cfg: RLAIFConfig, model, tokenizer, groups: list[Group], optimizer, params, scale: LossScale, state,
           say) -> dict:
    """updates_per_rollout passes over the completions of `groups`, in `minibatches` optimiser steps each. Means that
    are not finite, of a step that was skipped, are None."""
    rows, samples = training_rows(groups)
    own = own_rows(rows)
    fitting = {"memory": state["memory"], "params": params, "lengths": [len(rows[i].ids) for i in own], "say": say}
    lr = lr_at(state["done"], cfg.steps, lr=cfg.optimizer.lr, schedule=cfg.optimizer.lr_schedule, warmup=cfg.optimizer.warmup,
               min_lr_ratio=cfg.min_lr_ratio)
    on_policy = cfg.updates_per_rollout == cfg.minibatches == 1
    old = None if on_policy else in_memory(logps, cfg, model, tokenizer, rows, own, **fitting)
    with adapter_off(model):
        ref = in_memory(logps, cfg, model, tokenizer, rows, own, **fitting) if cfg.loss.kl_coef else None
    totals = []
    for index in range(cfg.updates_per_rollout * cfg.minibatches):
        part = list(range(len(rows)))[index % cfg.minibatches::cfg.minibatches]
        if not part:
            continue
        facts = in_memory(policy_gradient, cfg, model, tokenizer, rows=rows, samples=samples, part=part,
                          mine=[i for i in part if i in own], old=old, ref=ref, scale=scale.value, **fitting)
        facts = dist.all_reduce_sum(facts)
        dist.all_reduce_gradients(params)
        grad_norm, stepped = clip_and_step(optimizer, params, cfg.optimizer.max_grad_norm, lr, scale=scale.value,
                                           loss=facts["loss"])
        count_step(state, scale, stepped, grad_norm, facts["loss"], say)
        totals.append(facts | {"grad_norm": grad_norm, "stepped": float(stepped)})
    means = {key: statistics.fmean(t[key] for t in totals) for key in totals[0]}
    means = {key: mean if math.isfinite(mean) else None for key, mean in means.items()}
    return means | {"lr": lr, "trained_tokens": sum(sum(row.mask) for row in rows)}


def training_rows(groups: list[Group]) -> tuple[list[Encoded], list[tuple[Completion, float]]]:
    """Prompt + completion rows of the kept groups, without masked completions, and (completion, advantage) of each.

    A row of advantage 0 stays: it has no policy gradient, but it counts in the divisors, the KL and the entropy.
    """
    rows, samples = [], []
    for group in groups:
        for completion, advantage, valid in zip(group.completions, group.advantage, group.valid, strict=True):
            if valid:
                ids = group.prompt + completion.ids
                rows.append(Encoded(ids, [False] * len(group.prompt) + [True] * len(completion.ids), False))
                samples.append((completion, advantage))
    return rows, samples


def policy_gradient(cfg: RLAIFConfig, model, tokenizer, *, rows, samples, old, ref, scale: float, part=None,
                    mine=None) -> dict:
    """Add the gradient of the policy loss over rows[i], i in part (None: all), times `scale`, to .grad -> metrics. Of
    several processes each adds that of its own rows, `mine` (None: part; old and ref hold no others): gradient and
    metrics are the sums."""
    part = range(len(rows)) if part is None else part
    mine = part if mine is None else mine
    lengths = [sum(rows[i].mask) for i in part]
    weights = dict(zip(part, token_weights(cfg.loss.name, lengths, cfg.sampling.max_new_tokens), strict=True))
    tokens = sum(lengths)
    rows, samples, lengths = [rows[i] for i in mine], [samples[i] for i in mine], [sum(rows[i].mask) for i in mine]
    old, ref = (values and [values[i] for i in mine] for values in (old, ref))
    seq = None
    if cfg.loss.name == "gspo" and old is not None:  # the sequence ratio needs every token first: one forward sweep
        now = logps(cfg, model, tokenizer, rows, range(len(rows)))
        seq = [torch.full_like(now[i], float((now[i] - b).mean())) for i, b in enumerate(old)]
    lm_head = head(model)
    totals = {"loss": 0.0, "entropy": 0.0, "clipped": 0.0, "off_policy": 0.0, "reweighted": 0.0, "kl_ref": 0.0}
    per_token = {"advantage": [torch.full((n,), a) for n, (_, a) in zip(lengths, samples, strict=True)],
                 "weight": [torch.full((n,), weights[i]) for n, i in zip(lengths, mine, strict=True)],
                 "sampled_logp": [torch.tensor(c.logp) for c, _ in samples],
                 "old_logp": old, "ref_logp": ref, "seq_log_ratio": seq}
    for indices, batch in in_step(model, forward_batches(cfg, model, rows, tokenizer.pad_token_id)):
        target = batch["target"]
        data = PolicyRows(**{name: None if values is None else at_targets([values[i] for i in indices], target)
                             for name, values in per_token.items()})
        loss_fn = policy_loss(data, loss_type=cfg.loss.name, clip_low=cfg.loss.clip_low, clip_high=cfg.loss.clip_high,
                              clip_dual=cfg.clip_dual, beta=cfg.loss.kl_coef, kl=cfg.kl, entropy_coef=cfg.loss.entropy_coef,
                              importance=cfg.importance, importance_cap=cfg.loss.importance_cap)
        hidden = trained_states(hidden_states(model, **forward_args(batch)), batch)  # (N, D)
        loss, stats = linear_token_loss(hidden, lm_head.weight, target, loss_fn, temperature=cfg.sampling.temperature,
                                        **lm_head.kernel_args())
        (loss * scale).backward()
        sound = torch.stack([values.sum() for values in data if values is not None]).isfinite().all()
        totals["loss"] += float(torch.where(sound, loss.detach(), math.nan))  # a clip could hide an infinite log-prob
        full_logp = at_targets([torch.tensor(samples[i][0].full_logp or samples[i][0].logp) for i in indices], target)
        for name, value in token_facts(cfg, data, stats, full_logp, target != IGNORE).items():
            totals[name] += value / tokens
    return totals


def token_facts(cfg: RLAIFConfig, data: PolicyRows, stats, full_logp: torch.Tensor, trained: torch.Tensor) -> dict:
    """Sums over the trained tokens of a micro-batch (stats (N,), full_logp (N,), trained (N,) bool). off_policy: tokens
    whose probability in this forward is beyond [0.9, 1.1] of that in the rollout, both before any truncation of the
    sampler. reweighted: tokens whose importance weight was cut to the cap, or to 0 by importance=mask."""
    logp, sampled = stats.logp[trained], data.sampled_logp[trained]
    old = logp if data.old_logp is None else data.old_logp[trained]
    ratio = torch.exp(logp - old if data.seq_log_ratio is None else data.seq_log_ratio[trained])
    drift = torch.exp(logp - full_logp[trained])
    weight = importance_weight(old - sampled, cfg.importance, cfg.loss.importance_cap)
    facts = {"entropy": stats.entropy[trained].sum(),
             "clipped": ((ratio < 1 - cfg.loss.clip_low) | (ratio > 1 + cfg.loss.clip_high)).sum(),
             "off_policy": ((drift < 0.9) | (drift > 1.1)).sum()}
    if cfg.loss.importance_cap:
        facts["reweighted"] = (weight != torch.exp(old - sampled)).sum()
    if data.ref_logp is not None:
        d = data.ref_logp[trained] - logp
        facts["kl_ref"] = (torch.exp(d) - d - 1).sum()
    return {name: float(value) for name, value in facts.items()}


def logps(cfg: RLAIFConfig, model, tokenizer, rows: list[Encoded], own) -> dict[int, torch.Tensor]:
    """{i: log-probs of the trained tokens of rows[i]} for i in own, without gradient: old policy, and reference under
    adapter_off."""
    lm_head, own, out = head(model), list(own), {}
    rows = [rows[i] for i in own]
    with inference(model):
        for indices, batch in in_step(model, forward_batches(cfg, model, rows, tokenizer.pad_token_id)):
            hidden = trained_states(hidden_states(model, **forward_args(batch)), batch)
            logp = linear_logp(hidden, lm_head.weight, batch["target"], temperature=cfg.sampling.temperature,
                               **lm_head.kernel_args())
            parts = logp[batch["target"] != IGNORE].split([sum(rows[i].mask) for i in indices])
            out |= zip([own[i] for i in indices], parts, strict=True)
    return out


if __name__ == "__main__":
    from minimath.cli import dispatch, run_command
    sys.exit(run_command(lambda: dispatch("rlaif", sys.argv[1:])))
