"""Completions behind one shared prompt: the same hidden states, loss and gradient as rows computed apart."""

import pytest
import tiny
import torch
from toy import policy_of, wake_adapter

from minimath.data.batch import forward_args, micro_batches
from minimath.data.chat import IGNORE, Encoded
from minimath.kernels import linear_token_loss
from minimath.models import prefix
from minimath.models.forward import head, hidden_states
from minimath.models.prefix import LEAST_SAVED, forward_batches, own_rows, share_saved, shared_packs, trained_states

PROMPTS = [list(range(20, 31)), list(range(40, 45))]
GROUPS = [0, 0, 0, 0, 1, 1]  # of the rows of rows_of()


def rows_of(lengths=((3, 1, 7, 4), (5, 2))) -> list[Encoded]:
    rows, first = [], 50
    for prompt, completions in zip(PROMPTS, lengths):
        for length in completions:
            completion = [first + (3 * i) % 200 for i in range(length)]
            first += 7
            mask = [False] * len(prompt) + [True] * length
            rows.append(Encoded(prompt + completion, mask, False))
    return rows


def gradients(model, rows, batches):
    """(log-probs of each row, gradient of the adapter) of a loss that weighs every token differently."""
    model.zero_grad()
    lm_head, logp = head(model), [None] * len(rows)
    for indices, batch in batches:
        weight = torch.cat([torch.linspace(1, 2, sum(rows[i].loss_mask)).double() * (i + 1) for i in indices])
        spread = torch.zeros(len(batch["target"])).double()
        spread[batch["target"] != IGNORE] = weight
        hidden = trained_states(hidden_states(model, **forward_args(batch)), batch)
        loss, stats = linear_token_loss(hidden, lm_head.weight, batch["target"],
                                        lambda s, at, spread=spread: -s.logp * spread[at], **lm_head.kernel_args())
        loss.backward()
        parts = stats.logp[batch["target"] != IGNORE].split([sum(rows[i].loss_mask) for i in indices])
        for i, part in zip(indices, parts):
            logp[i] = part
    return logp, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "gemma2", "cohere"])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_loss_and_gradient_equal_those_of_rows_computed_apart(tmp_path, family, attn):
    if (family, attn) == ("gemma2", "sdpa"):
        pytest.skip("its capped attention scores need eager attention")
    folder = tiny.tiny_model(tmp_path / family, family)
    policy = policy_of(folder, train=True, attn=attn)
    wake_adapter(model := policy.model)
    model.double().eval()
    rows = rows_of()
    shared = list(forward_batches(policy, rows, GROUPS, 200))
    assert len(shared) == 2 and all("source" in batch for _, batch in shared)
    apart = micro_batches(rows, packing=False, micro_batch_tokens=200, pad_id=0)
    want_logp, want = gradients(model, rows, apart)
    logp, got = gradients(model, rows, shared)
    torch.testing.assert_close(logp, want_logp, rtol=1e-6, atol=1e-6)
    assert (got - want).norm() <= 1e-6 * want.norm()


@pytest.mark.parametrize("family", ["mistral", "gemma2"])
def test_a_sliding_window_counts_positions_not_places(tmp_path, family):
    """A window of 6 reaches from a late completion into its prompt, across the completions between."""
    folder = tiny.tiny_model(tmp_path / family, family)
    policy = policy_of(folder, train=True, attn="eager")
    wake_adapter(model := policy.model)
    model.double().eval()
    config = model.get_base_model().config
    config.sliding_window = 6
    for module in model.modules():
        if getattr(module, "sliding_window", None):
            module.sliding_window = 6
    rows = rows_of()
    shared = forward_batches(policy, rows, GROUPS, 200)
    apart = micro_batches(rows, packing=False, micro_batch_tokens=1, pad_id=0)  # unpadded, each alone
    want_logp, want = gradients(model, rows, apart)
    logp, got = gradients(model, rows, shared)
    torch.testing.assert_close(logp, want_logp, rtol=1e-6, atol=1e-6)
    assert (got - want).norm() <= 1e-6 * want.norm()


def test_packs_hold_one_prompt_and_keep_the_token_budget():
    rows = rows_of()
    assert shared_packs(rows, GROUPS, 1000) == [[0, 1, 2, 3], [4, 5]]
    assert shared_packs(rows, GROUPS, 16) == [[0, 1], [2], [3], [4, 5]]  # 11 + 3 + 1; 11 + 7 alone is too long already
    assert shared_packs(rows, GROUPS, 1) == [[0], [1], [2], [3], [4], [5]]
    total = sum(len(row.ids) for row in rows)
    assert share_saved(rows, shared_packs(rows, GROUPS, 1000)) == pytest.approx((3 * 11 + 5) / total)


def test_every_process_has_whole_groups_and_every_row_one_process(monkeypatch):
    groups = [0, 0, 1, 1, 1, 2, 4, 4]
    assert own_rows(groups) == list(range(8))
    monkeypatch.setattr("minimath.core.dist.world", lambda: 2)
    told = []
    for rank in range(2):
        monkeypatch.setattr("minimath.core.dist.rank", lambda rank=rank: rank)
        told.append(own_rows(groups))
    assert told == [[0, 1, 5, 6, 7], [2, 3, 4]]


def test_long_completions_and_flash_attention_without_rows_are_not_shared(tiny_dir, monkeypatch):
    policy, groups = policy_of(tiny_dir), [0, 0, 1, 1]
    long = rows_of(((300, 300), (300, 300)))
    assert share_saved(long, shared_packs(long, groups, 4096)) < LEAST_SAVED
    assert all("source" not in batch for _, batch in forward_batches(policy, long, groups, 4096))
    policy.options.attn = "flash_attention_2"
    for by_rows in (True, False):
        monkeypatch.setattr(prefix, "takes_rows", lambda model, by_rows=by_rows: by_rows)
        assert all(("source" in batch) == by_rows for _, batch in forward_batches(policy, rows_of(), GROUPS, 4096))
