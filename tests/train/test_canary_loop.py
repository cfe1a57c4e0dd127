"""The canary pairs inside the loop: judged when asked for, logged, and nothing else changes."""

from toy import adapter as adapter_of
from toy import metrics, same_tensors, write_problems

import minimath.train.rlaif as loop
from minimath.rollout import open as engines
from minimath.report import metrics as report
from minimath.config.schema import RLAIFConfig


def run(tiny_dir, tmp_path, name, **options):
    out = tmp_path / name
    loop.rlaif(RLAIFConfig(
        model=tiny_dir, device="cpu", dtype="fp32", prompt_template="{problem}",
        data=write_problems(tmp_path / "p.jsonl"),
        out=str(out), steps=3, prompts_per_step=2, group_size=3, max_new_tokens=12, judge="heuristic", gate="none",
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
    assert (watched / "judge.png").stat().st_size > 20_000 and not (plain / "judge.png").exists()


def test_a_canary_of_a_step_that_is_not_logged_is_kept_and_warned_of(tiny_dir, tmp_path, monkeypatch, capsys):
    def fooled(judge, canary, groups):
        return {"canary_worse_wins": 0.1, "canary_rollout_worse_wins": 1.0, "canary_rollout_pairs": 30}
    monkeypatch.setattr(loop, "canary_facts", fooled)
    monkeypatch.setattr(report, "plot_judge", lambda *_: 1 / 0)  # a picture that fails costs nothing
    out = run(tiny_dir, tmp_path, "sparse", judge_canary_every=2, log_every=3)
    assert [record["step"] for record in metrics(out)] == [2, 3]
    said = capsys.readouterr().out
    assert "step 2: the canary gap opens" in said and said.count("canary gap") == 1
    assert "judge.png could not be drawn" in said and "ZeroDivisionError" in said and adapter_of(out)
