"""Plans of models that keep state."""
import pytest
import tiny
import torch
from toy import load, make_config
from transformers import AutoConfig

from minimath.config.schema import RLAIFConfig
from minimath.models.memory import cache_bytes_per_token, state_bytes
from minimath.plan.footprint import empty_model
from minimath.plan.needs import Planner


@pytest.mark.parametrize("family", tiny.STATEFUL)
def test_state_has_the_same_bytes_on_shapes_alone(tmp_path, family):
    folder, attn = tiny.tiny_model(tmp_path, family), {"attn": "eager"} if family == "mamba2" else {}
    cfg = make_config(RLAIFConfig, str(folder), out="", **attn)
    empty = empty_model(AutoConfig.from_pretrained(folder), cfg, torch.bfloat16)
    model, _ = load(folder, dtype="bf16", **attn)
    assert state_bytes(empty) == state_bytes(model) > 0
    assert cache_bytes_per_token(empty) == cache_bytes_per_token(model)


def test_what_does_not_grow_is_counted_once_a_sequence(tmp_path):
    folder = str(tiny.tiny_model(tmp_path, "falcon_h1"))  # whose kinds of layers follow from their number
    cfg = make_config(RLAIFConfig, folder, out="", max_prompt_len=64, max_new_tokens=64)
    planner = Planner(folder, "cuda")
    keys = 128 * cache_bytes_per_token(planner.model(cfg).empty) + 20 * 64 + 8 * 64
    taken = planner.rollout(cfg, cfg, 8, 8 << 30)["keys and values"]
    assert taken == pytest.approx(8 * (keys + state_bytes(planner.model(cfg).empty)), rel=0.01)
    assert not any(prompt or packed for *_, prompt, packed in planner.shapes(cfg))
