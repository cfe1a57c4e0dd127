"""What a step trains on, cut into micro-batches: solutions in stage 1, groups of samples in stage 2."""
from collections.abc import Iterator

import torch

from minimath.config.schema import RLAIFConfig
from minimath.core import dist
from minimath.data.batch import forward_args, micro_batches
from minimath.data.chat import IGNORE, Encoded
from minimath.data.sample import Group, Sample
from minimath.kernels import linear_logp
from minimath.models.block_attention import on_device
from minimath.models.forward import head, hidden_states, inference
from minimath.models.policy import Policy
from minimath.models.prefix import forward_batches, own_rows, rows_apart, trained_states
from minimath.models.variants import in_step
from minimath.train.losses import PolicyRows, token_weights


class Batch:
    """The rows of one step that this process computes.

    groups: the number of each row's group, whose rows stand next to each other and share their prompt."""

    def __init__(self, policy: Policy, rows: list[Encoded], groups: list[int] | None, packing: bool = False):
        self.policy, self.rows, self.groups, self.packing = policy, rows, groups, packing
        self.lengths = [len(row.ids) for row in rows]

    def micro_batches(self, most: int) -> Iterator[tuple[list[int], dict]]:
        if self.groups:
            batches = forward_batches(self.policy, self.rows, self.groups, most)
        else:
            batches = micro_batches(self.rows, packing=self.packing, micro_batch_tokens=most,
                                    pad_id=self.policy.tokenizer.pad_token_id)
        return placed(in_step(self.policy.model, batches), self.policy.device)


class SolutionBatch(Batch):
    """Holds the worked solutions of one step."""

    def __init__(self, policy: Policy, rows: list[Encoded], *, packing: bool, groups: list[int] | None = None):
        super().__init__(policy, dist.shard(rows), groups and dist.shard(groups),
                         packing and not rows_apart(policy.model))
        self.tokens = sum(len(row.ids) for row in rows)  # of all processes, as is:
        self.trained_tokens = max(1, sum(target != IGNORE for row in rows for target in row.targets()))


class PolicyBatch(Batch):
    """Holds the samples of a rollout to train on.

    A sample of advantage 0 counts in the divisors, the KL and the entropy. Per-token values are lists of (n_i,)
    tensors on the CPU, one per row of this process."""

    def __init__(self, policy: Policy, cfg: RLAIFConfig, groups: list[Group]):
        pairs = [(number, group.prompt, sample) for number, group in enumerate(groups) for sample in group.samples
                 if in_loss(sample, cfg)]
        lengths = [sample.tokens for _, _, sample in pairs]
        self.trained_tokens = sum(lengths)  # of all processes
        weights = token_weights(cfg.loss.name, lengths, cfg.sampling.max_new_tokens)
        own = own_rows([number for number, _, _ in pairs])
        numbers, prompts, self.samples = ([pairs[i][part] for i in own] for part in range(3))
        super().__init__(policy, [Encoded(prompt + s.ids, [False] * len(prompt) + [True] * s.tokens, False)
                                  for prompt, s in zip(prompts, self.samples)], numbers)
        self.advantage = [torch.full((s.tokens,), s.advantage) for s in self.samples]
        self.weight = [torch.full((lengths[i],), weights[i]) for i in own]
        self.sampled_logp = [torch.tensor(s.logp) for s in self.samples]
        self.full_logp = [torch.tensor(s.full_logp or s.logp) for s in self.samples]
        self.old_logp = self.ref_logp = self.seq_log_ratio = None  # or lists of tensors, as the loss needs them

    def at_rows(self, indices: list[int], micro: dict) -> tuple[PolicyRows, torch.Tensor]:
        """Lay out what the loss knows of each kernel row, and full_logp."""
        fields = (self.advantage, self.weight, self.sampled_logp, self.old_logp, self.ref_logp, self.seq_log_ratio,
                  self.full_logp)
        known = [torch.cat([torch.empty(0), *(values[i] for i in indices)]) for values in fields if values is not None]
        target = micro["target"]  # (N,)
        table = torch.zeros(len(known), len(target), device=target.device)
        table.index_copy_(1, micro["trained"], on_device(torch.stack(known).float(), target.device))
        laid_out = iter(table)
        *rows, full_logp = (None if values is None else next(laid_out) for values in fields)
        return PolicyRows(*rows), full_logp

    def by_row(self, indices: list[int], values: list[torch.Tensor]) -> list[torch.Tensor]:
        """Read the values of trained tokens back, in one copy; `indices`: their rows, in this order."""
        lengths = [self.samples[i].tokens for i in indices]
        parts = torch.cat(values).cpu().split(lengths) if values else []
        return [part for _, part in sorted(zip(indices, parts, strict=True), key=lambda each: each[0])]


def logps(cfg: RLAIFConfig, policy: Policy, optimizer, batch: PolicyBatch) -> list[torch.Tensor]:
    """Compute log-probs of each row's tokens without gradient: old, reference or teacher."""
    lm_head = head(policy.model)

    def forward(micro_batch_tokens: int) -> list[torch.Tensor]:
        order, parts = [], []
        with inference(policy.model):
            for indices, micro in batch.micro_batches(micro_batch_tokens):
                hidden = trained_states(hidden_states(policy.model, **forward_args(micro)), micro)
                logp = linear_logp(hidden, lm_head.weight, micro["target"], rows=micro["trained"],
                                   temperature=cfg.sampling.temperature, **lm_head.kernel_args())
                order += indices
                parts.append(logp[micro["trained"]])
        return batch.by_row(order, parts)

    return optimizer.retry_on_oom(forward, batch.lengths)


def placed(batches: Iterator[tuple[list[int], dict]], device: torch.device) -> Iterator[tuple[list[int], dict]]:
    """Yield batches with their tensors, int64, on the device, each in one copy.

    They have `trained` (M,), too: the rows of `target` that count, known here, so that no one has to ask a card."""
    for indices, batch in batches:
        tensors = {name: value for name, value in batch.items() if torch.is_tensor(value)}
        tensors["trained"] = (batch["target"] != IGNORE).nonzero().flatten()
        if device.type != "cpu":
            parts = on_device(torch.cat([each.flatten() for each in tensors.values()]), device)
            parts = parts.split([each.numel() for each in tensors.values()])
            tensors = {name: part.view_as(tensors[name]) for name, part in zip(tensors, parts, strict=True)}
        yield indices, batch | tensors


def in_loss(sample: Sample, cfg: RLAIFConfig) -> bool:
    """Tell whether a sample enters advantages and loss: a masked one does not."""
    return sample.finished or cfg.reward.overlong != "mask"
