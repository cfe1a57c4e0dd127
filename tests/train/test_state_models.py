"""Both stages on models that keep state beside keys and values."""
import pytest
import tiny
from toy import adapter, ending_model, even, make_config, metrics

from minimath.config.schema import RLAIFConfig, SFTConfig
from minimath.train.rlaif import rlaif
from minimath.train.sft import sft


@pytest.mark.parametrize("family", ["lfm2", "qwen3_5_text", "falcon_h1"])
def test_sampled_tokens_have_the_probability_that_the_update_finds(tmp_path, family, few):
    model = ending_model(tiny.tiny_model(tmp_path / "base", family), tmp_path / "model")
    options = {"data": few, "lora_r": 4, "warmup": 0.0, "save_every": 0, "lr": 1e-2, "steps": 2}
    sft(make_config(SFTConfig, model, out=str(tmp_path / "sft"), batch_size=4, eval_every=0, **options))
    rlaif(make_config(RLAIFConfig, model, out=str(tmp_path / "rl"), adapter=str(tmp_path / "sft"), prompts_per_step=2,
                      group_size=4, max_new_tokens=16, judge="self", verifier=even, max_num_seqs=3, kl_coef=0.1,
                      gradient_checkpointing=True, **options))
    steps = metrics(tmp_path / "rl", "policy/off_policy", "rollout/seq_fill", "policy/kl")
    assert len(steps) == 2 and all(step["policy/off_policy"] == 0 for step in steps) and steps[1]["policy/kl"] > 0
    assert steps[0]["rollout/seq_fill"] > 0  # as the own engine alone counts
    assert sum(float(each.abs().sum()) for name, each in adapter(tmp_path / "rl").items() if "lora_B" in name) > 0
