"""A teacher of the policy's own tokens: on-policy distillation, beside the reward or alone.

Reverse KL, KL(policy || teacher), over what the policy itself samples (Agarwal et al., arXiv 2306.13649). By the
sampled token (teacher_kl=sampled):

    A_t += weight clip(log p_T(t) - log p_S(t), -CAP, CAP)

whose expectation is the KL's gradient at that token; p_S is the policy that sampled. Or over the vocabulary
(teacher_kl=full), for a teacher under the same head: weight KL_t is added to the loss, by the tiles of
minimath.kernels.linear_kl. A teacher may see another system prompt than the policy ("Be concise.": the policy learns to
be so without it, and needs no answers; OPSDC, arXiv 2603.05433).
"""
import contextlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from minimath.config.schema import EvalConfig, RLAIFConfig
from minimath.core import dist
from minimath.core.errors import UserError
from minimath.core.run_folder import find_adapter
from minimath.data.batch import forward_args
from minimath.data.sample import Group
from minimath.kernels import linear_kl
from minimath.models.forward import Head, adapter_named, hidden_states, inference
from minimath.models.policy import Policy, load_policy
from minimath.models.prefix import forward_batches, trained_states
from minimath.train.batches import PolicyBatch, logps, placed
from minimath.train.teacher_server import TeacherServer, other_tokens

TEACHER = "teacher"  # name of its adapter
CAP = 5.0  # nats that the log-ratio of a token counts at most


class Teacher(contextlib.AbstractContextManager):
    """Tells how likely the policy's tokens are.

    It is the policy's model inside `active`, with its adapter or another or none; a second model; or a server, which
    on exit is left."""

    def __init__(self, cfg: RLAIFConfig, policy: Policy, server: TeacherServer | None = None,
                 active: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext):
        self.cfg, self.options, self.server, self.active = cfg, cfg.teacher, server, active
        system = self.options.system or cfg.prompt.system
        self.policy = replace(policy, prompt=replace(policy.prompt, system=system))  # how problems are put to it
        self.batch: PolicyBatch | None = None  # of the step, behind the teacher's prompts

    def __exit__(self, *error):
        if self.server:
            self.server.close()

    def teach(self, batch: PolicyBatch, groups: list[Group], optimizer) -> dict:
        """Add to the advantages of a batch's tokens, or prepare for `kl`; return metrics.

        teacher/kl: mean log p_S - log p_T, nats a token, an estimate of the KL; teacher/cut: share of those cut to
        CAP."""
        self.batch = PolicyBatch(self.policy, self.cfg, [
            replace(group, prompt=self.policy.prompt_ids(group.example)) for group in groups])
        if self.options.kl == "full":
            return {}
        gaps = [told - sampled for told, sampled in zip(self.logps(optimizer), batch.full_logp, strict=True)]
        batch.advantage = [advantage + self.options.weight * gap.clamp(-CAP, CAP)
                           for advantage, gap in zip(batch.advantage, gaps, strict=True)]
        every = torch.cat([torch.empty(0), *gaps])
        cut = every.clamp(-CAP, CAP)  # a server tells -inf as -9999
        means = dist.all_reduce_sum({"kl": -float(cut.sum()), "cut": int((every != cut).sum())})
        return {f"teacher/{name}": value / max(1, batch.trained_tokens) for name, value in means.items()}

    def logps(self, optimizer) -> list[torch.Tensor]:
        """Compute log p_T of each row's tokens, at the sampling temperature."""
        if self.server:
            rows = [(row.ids[:len(row.ids) - s.tokens], s.ids) for row, s in zip(self.batch.rows, self.batch.samples)]
            return [torch.tensor(told) for told in self.server.logps(rows)]
        with self.active():
            return logps(self.cfg, self.policy, optimizer, self.batch)

    def kl(self, indices: list[int], hidden: torch.Tensor, head: Head) -> torch.Tensor:
        """Compute KL(policy || teacher) of the tokens of some rows, in their order.

        hidden (N, D): the policy's states of these tokens; -> (N,) fp32, nats, differentiable in hidden."""
        rows, groups = ([each[i] for i in indices] for each in (self.batch.rows, self.batch.groups))
        most, model, states = self.cfg.optimizer.micro_batch_tokens, self.policy.model, {}  # by place in indices
        with self.active(), inference(model):
            for places, micro in placed(forward_batches(self.policy, rows, groups, most), self.policy.device):
                taught = trained_states(hidden_states(model, **forward_args(micro)), micro)[micro["trained"]]
                lengths = [self.batch.samples[indices[place]].tokens for place in places]
                states |= zip(places, taught.split(lengths))
        taught = torch.cat([states[place] for place in range(len(indices))])
        return linear_kl(hidden, taught, head.weight, temperature=self.cfg.sampling.temperature, **head.kernel_args())


def teacher_kind(cfg: RLAIFConfig) -> str:
    """Tell base, policy, adapter, model or server, or "" for none.

    A folder is an adapter's, or a run's, unless a model lies in it; what is no folder is a model's name."""
    name = cfg.teacher.name
    if not name or name in ("base", "policy"):
        return name
    if cfg.teacher_is_server():
        return "server"
    return "adapter" if Path(name).is_dir() and not (Path(name) / "config.json").exists() else "model"


def teacher_quant(device: str) -> str:
    """Choose quant= of a second model: a card holds it beside the policy in NF4."""
    return "nf4" if device.startswith("cuda") else "none"


def open_teacher(cfg: RLAIFConfig, policy: Policy, say: Callable[[str], None]) -> contextlib.AbstractContextManager:
    """Open the teacher that teacher= names, or None. Raises UserError."""
    name, kind = cfg.teacher.name, teacher_kind(cfg)
    if not kind:
        return contextlib.nullcontext()
    if kind == "server":
        return Teacher(cfg, policy, TeacherServer(cfg.teacher, policy, say, cfg.sampling.max_new_tokens))
    if kind == "policy":
        return Teacher(cfg, policy)
    if kind == "adapter":
        policy.add_adapter(find_adapter(name), TEACHER)
    if kind != "model":
        active = TEACHER if kind == "adapter" else None
        return Teacher(cfg, policy, active=lambda: adapter_named(policy.model, active))
    if cfg.teacher.kl == "full":
        raise UserError(f"teacher_kl=full needs a teacher on the policy's own base, and teacher={name} is another "
                        "model: use teacher_kl=sampled")
    try:
        other = load_policy(EvalConfig(**cfg.shared(EvalConfig, "model", "prompt") | {
            "model": name, "quant": teacher_quant(policy.device.type)}), train=False)
    except UserError as error:
        raise UserError(f"teacher={name} is no folder of an adapter, and as a model: {error}") from None
    own, others = policy.tokenizer.get_vocab(), other.tokenizer.get_vocab()
    if own != others:
        token = next(token for token in [*own, *others] if own.get(token) != others.get(token))
        raise other_tokens(f"teacher={name}", token, others.get(token, "unknown"), own.get(token, "unknown"))
    return Teacher(cfg, other)
