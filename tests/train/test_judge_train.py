"""Training of a judge, and RLAIF with it: it runs end to end, resumes bitwise and leaves the policy alone."""
import json

import pytest
import torch
from safetensors.torch import load_file
from toy import even, make_config

from minimath.core.errors import UserError
from minimath.judges.card import read_card
from minimath.train.judge import JudgeConfig, judge_train


@pytest.fixture
def judge(ending_dir, few, tmp_path):
    """judge(name, **options) -> (summary, run folder) of a judge of the tiny Llama."""
    def run(name="judge", **options):
        options = {"data": few, "steps": 2, "batch_size": 4, "lora_r": 4, "lr": 1e-2, "samples": 4, "held_out": 0.3,
                   "max_new_tokens": 12, "save_every": 0, "warmup": 0.0} | options
        return judge_train(make_config(JudgeConfig, ending_dir, out=str(tmp_path / name), **options)), tmp_path / name
    return run


@pytest.mark.parametrize("form", ["single", "pair"])
def test_a_judge_is_trained_measured_and_judges_an_rl_run(judge, rl, form, tmp_path):
    summary, run = judge(form=form)
    card = read_card(run / "adapter")
    assert summary["steps"] == 2 and card.form == form and card.problems and card.figures["pairs"]
    out = rl(judge="self", judge_adapter=str(run), judge_refresh=1, judge_canary_every=1)
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    print(metrics)
    assert all("judge/comparisons" in m and "canary/worse_wins" in m for m in metrics)
    assert "judge/refresh_loss" in metrics[-1]
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (run / "adapter", out / "judge"))
    assert before.keys() == after.keys() and any(not torch.equal(before[k], after[k]) for k in before)
