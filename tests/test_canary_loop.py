"""The canary pairs inside the loop: judged when asked for, logged, and nothing else changes."""

from toy import adapter as adapter_of
from toy import metrics, same_tensors, write_problems

import minimath.rlaif as loop
from minimath import engines
from minimath.config import RLAIFConfig


def run(tiny_dir, tmp_path, name, **options):
    out = tmp_path / name
    loop.rlaif(RLAIFConfig(
        model=tiny_dir, device="cpu", dtype="fp32", prompt_template="{problem}",
        data=write_problems(tmp_path / "p.jsonl"),
        out=str(out), steps=3, prompts_per_step=2, group_size=3, max_new_tokens=12, judge="rules", gate="none",
        overlong="none", save_every=0, lr=1e-3, **options))
    return out


def test_canary_figures_are_logged_every_so_often_and_change_nothing(tiny_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(engines, "eos_ids", lambda tokenizer, model=None: list(range(20, 60)))
    watched = run(tiny_dir, tmp_path, "watched", judge_canary_every=2)
    plain = run(tiny_dir, tmp_path, "plain")
    told = ["canary_worse_wins" in record for record in metrics(watched)]
    assert told == [False, True, False]
    record = metrics(watched)[1]
    assert record["canary_pairs"] == 24 and record["canary_worse_wins"] == 0  # the rules judge is not fooled
    assert record["canary_agreement"] == 1
    assert not any("canary_pairs" in record for record in metrics(plain))
    assert same_tensors(adapter_of(watched), adapter_of(plain))
