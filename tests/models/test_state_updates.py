"""Updates of models that keep state: no row sees another's, nor padding."""

import pytest
import tiny
import torch
from test_prefix import GROUPS, gradients, rows_of
from toy import policy_of, wake_adapter

from minimath.data.batch import micro_batches
from minimath.models import prefix
from minimath.models.forward import takes_mask, takes_rows
from minimath.models.prefix import forward_batches
from minimath.train.batches import SolutionBatch


@pytest.mark.parametrize("family", [name for name in tiny.STATEFUL if name != "mamba2"])
def test_loss_and_gradient_are_those_of_each_row_alone(tmp_path, family, capsys):
    """In both stages, although packing is on and a group has one prompt; it was another model's loss."""
    policy = policy_of(tiny.tiny_model(tmp_path, family), train=True)
    wake_adapter(model := policy.model)
    model.eval()
    prefix.say_once.cache_clear()
    rows, pad = rows_of(), policy.tokenizer.pad_token_id
    alone = micro_batches(rows, packing=False, micro_batch_tokens=1, pad_id=pad)
    want_logp, want = gradients(model, rows, alone)
    for batches in (SolutionBatch(policy, rows, packing=True).micro_batches(200),
                    SolutionBatch(policy, rows, packing=True, groups=GROUPS).micro_batches(200),
                    forward_batches(policy, rows, GROUPS, 200)):
        batches = list(batches)
        assert len(batches) < len(rows) and any(len(indices) > 1 for indices, _ in batches)
        logp, got = gradients(model, rows, batches)
        torch.testing.assert_close(logp, want_logp, rtol=1e-4, atol=1e-4)
        assert (got - want).norm() <= 1e-3 * want.norm()
    assert capsys.readouterr().err.count("updates neither pack rows nor share prompts") == 1
    assert not takes_mask(model) and not takes_rows(model)
