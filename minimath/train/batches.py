"""What a step trains on, cut into micro-batches: solutions in stage 1, groups of samples in stage 2."""
from collections.abc import Iterator

import torch

from minimath.config.schema import RLAIFConfig
from minimath.core import dist
from minimath.data.batch import at_targets, micro_batches
from minimath.data.chat import Encoded
from minimath.data.sample import Group, Sample
from minimath.models.policy import Policy
from minimath.models.prefix import forward_batches, own_rows
from minimath.models.variants import in_step
from minimath.train.losses import PolicyRows, token_weights


class SolutionBatch:
    """Holds the worked solutions of one step; a process computes its share of rows."""

    def __init__(self, policy: Policy, rows: list[Encoded], *, packing: bool):
        self.policy, self.packing = policy, packing
        self.mine = dist.shard(rows)
        self.lengths = [len(row.ids) for row in self.mine]
        self.tokens = sum(len(row.ids) for row in rows)
        # of all processes; the first token has no prediction
        self.trained_tokens = max(1, sum(sum(row.loss_mask[1:]) for row in rows))

    def micro_batches(self, most: int) -> Iterator[tuple[list[int], dict]]:
        batches = micro_batches(self.mine, packing=self.packing, micro_batch_tokens=most,
                                pad_id=self.policy.tokenizer.pad_token_id, device=self.policy.device)
        return in_step(self.policy.model, batches)


class PolicyBatch:
    """Holds the samples of a rollout to train on; a process computes its groups.

    A sample of advantage 0 counts in the divisors, the KL and the entropy. Per-token values are lists of (n_i,)
    tensors, one per row of this process."""

    def __init__(self, policy: Policy, cfg: RLAIFConfig, groups: list[Group]):
        self.policy = policy
        pairs = [(number, group.prompt, sample) for number, group in enumerate(groups) for sample in group.samples
                 if in_loss(sample, cfg)]
        lengths = [sample.tokens for _, _, sample in pairs]
        weights = token_weights(cfg.loss.name, lengths, cfg.sampling.max_new_tokens)
        self.trained_tokens = sum(lengths)  # of all processes
        own = own_rows([number for number, _, _ in pairs])
        self.group_of = [pairs[i][0] for i in own]
        self.samples: list[Sample] = [pairs[i][2] for i in own]
        self.rows = [row_of(pairs[i][1], pairs[i][2]) for i in own]
        self.lengths = [len(row.ids) for row in self.rows]
        self.advantage = [torch.full((s.tokens,), s.advantage) for s in self.samples]
        self.weight = [torch.full((lengths[i],), weights[i]) for i in own]
        self.sampled_logp = [torch.tensor(s.logp) for s in self.samples]
        self.full_logp = [torch.tensor(s.full_logp or s.logp) for s in self.samples]
        self.old_logp = self.ref_logp = self.seq_log_ratio = None  # or lists of tensors, as the loss needs them

    def micro_batches(self, most: int) -> Iterator[tuple[list[int], dict]]:
        return in_step(self.policy.model, forward_batches(self.policy, self.rows, self.group_of, most))

    def at_rows(self, indices: list[int], target: torch.Tensor) -> tuple[PolicyRows, torch.Tensor]:
        """Lay out what the loss knows of each kernel row, and full_logp."""
        def lay_out(values):
            return None if values is None else at_targets([values[i] for i in indices], target)
        rows = PolicyRows(*map(lay_out, (self.advantage, self.weight, self.sampled_logp, self.old_logp, self.ref_logp,
                                         self.seq_log_ratio)))
        return rows, lay_out(self.full_logp)


def in_loss(sample: Sample, cfg: RLAIFConfig) -> bool:
    """Tell whether a sample enters advantages and loss: a masked one does not."""
    return sample.finished or cfg.reward.overlong != "mask"


def row_of(prompt: list[int], sample: Sample) -> Encoded:
    return Encoded(prompt + sample.ids, [False] * len(prompt) + [True] * sample.tokens, False)
