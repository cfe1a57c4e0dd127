"""An evaluation that was interrupted, killed or cut short goes on, and equals an unbroken one."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny import tiny_model
from toy import make_config, policy_of, wake_adapter, write_problems

from minimath.commands.run import how_to_go_on, part
from minimath.config.options import options_of
from minimath.config.schema import EvalConfig, SFTConfig
from minimath.core.checkpoint import save_adapter
from minimath.core.errors import Interrupted, UserError
from minimath.core.interrupt import interruptible
from minimath.core.log import RunLog
from minimath.core.run_folder import EVAL_CONFIG, FINGERPRINT, PART
from minimath.data.examples import Example
from minimath.data.sample import Sample
from minimath.eval.evaluate import evaluate, evaluate_policy
from minimath.eval.partial import NOT_DECISIVE, fingerprint, part_record, read_part
from minimath.eval.sample import SampleConfig


@pytest.fixture
def options(tiny_dir, tmp_path):
    return {"model": tiny_dir, "data": write_problems(tmp_path / "test.jsonl", n=7), "samples": 2, "temperature": 1.0,
            "max_new_tokens": 24, "max_num_seqs": 3}


@pytest.fixture
def run(options, tmp_path):
    """run(out, **options) -> (summary without the speed, records)."""

    def run(out, **changed):
        evaluate(make_config(EvalConfig, **{**options, "out": str(tmp_path / out), **changed}))
        return results(tmp_path / out)

    return run


def results(folder):
    summary = json.loads((folder / "eval.json").read_text())
    del summary["tokens_per_s"]
    with open(folder / "completions.jsonl", encoding="utf-8") as lines:  # str.splitlines would split a record's text
        return summary, [json.loads(line) for line in lines]


def done_at(path, problems, samples):
    """{(number, sample): (ids, finished)} of a part file."""
    return {job: (one.ids, one.finished) for job, one in read_part(path, problems, samples)[0].items()}


@pytest.fixture
def interrupt(monkeypatch):
    """interrupt(n): a real SIGINT comes when the nth completion from now on has been kept; 0: none comes."""
    add = RunLog.append

    def at(n):
        left = [n]

        def counted(self, *args):
            add(self, *args)
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGINT)

        monkeypatch.setattr(RunLog, "append", counted)

    return at


def left_at(folder, n, run, interrupt, **changed):
    """An evaluation in `folder` that was interrupted at its nth completion."""
    interrupt(n)
    with pytest.raises(Interrupted):
        run(folder, **changed)
    interrupt(0)


def test_interrupted_anywhere_and_resumed_equals_unbroken(run, interrupt, tmp_path, capsys):
    unbroken = run("unbroken")
    assert not (tmp_path / "unbroken" / PART).exists()
    for seed in range(4):
        rng, out, stops = random.Random(seed), f"run{seed}", 0
        while not (tmp_path / out / "eval.json").exists():
            interrupt(rng.randint(1, 7))
            try:
                run(out, resume=stops > 0)
            except Interrupted as stopped:
                assert stopped.args == (signal.SIGINT,)
                stops += 1
                done = len((tmp_path / out / PART).read_text().splitlines())
                said = capsys.readouterr().out.splitlines()[-1]
                assert f"SIGINT: stopped, {done} of 14 completions are done" in said
                assert f"out={tmp_path / out} resume=true" in said
        assert stops >= 1 and results(tmp_path / out) == unbroken
        assert not (tmp_path / out / PART).exists() and not list((tmp_path / out).glob(".tmp-*"))


def test_what_is_done_is_not_sampled_again(run, interrupt, tmp_path, capsys):
    left_at("run", 9, run, interrupt)
    before = done_at(tmp_path / "run" / PART, 7, 2)
    interrupt(14 - len(before))  # comes with the last completion: the signal is told while grading
    with pytest.raises(Interrupted):
        run("run", resume=True)
    after = done_at(tmp_path / "run" / PART, 7, 2)
    assert len(before) >= 9 and len(after) == 14 and after.items() >= before.items()
    interrupt(0)
    capsys.readouterr()
    assert run("run", resume=True) == run("unbroken")
    assert "going on after 14 of 14 completions" in capsys.readouterr().out


def test_a_signal_does_not_wait_for_a_completion_to_finish(tiny_dir, tmp_path):
    """Of 500 tokens a handful is computed after it."""
    policy, forwards = policy_of(tiny_dir), []

    def step(*_):
        forwards.append(1)
        if len(forwards) == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    policy.model.get_input_embeddings().register_forward_hook(step)
    cfg = make_config(EvalConfig, tiny_dir, max_new_tokens=500)
    with RunLog(tmp_path, "test") as log, interruptible((), log.say), pytest.raises(Interrupted) as stopped:
        evaluate_policy(policy, [Example("1 + 1 = ?", answer="2")], cfg, log)
    assert stopped.value.args == (signal.SIGTERM,) and 5 <= len(forwards) < 25


def test_an_evaluation_within_a_training_keeps_no_part_file(tiny_dir, tmp_path):
    cfg = make_config(EvalConfig, tiny_dir, max_new_tokens=4)
    with RunLog(tmp_path / "sft", "test") as log:
        evaluate_policy(policy_of(tiny_dir), [Example("1 + 1 = ?", answer="2")], cfg, log)
    assert [path.name for path in (tmp_path / "sft").iterdir()] == ["environment.json"]


# ---- what a kill leaves


@pytest.mark.parametrize("damage", [
    b'{"number": 0, "sam', b"\0" * 40 + b"\n", b'{"number": 7, "sample": 0, "ids": [5], "finished": true}\n',
    b'{"number": 0, "sample": 2, "ids": [5], "finished": true}\n',
    b'{"number": 0, "sample": 0, "ids": [], "finished": true}\n', b"3\n",
], ids=["torn", "zeros", "number", "sample", "empty", "no record"])
def test_a_torn_or_damaged_line_is_dropped_and_told(run, interrupt, tmp_path, capsys, damage):
    left_at("run", 5, run, interrupt)
    part = tmp_path / "run" / PART
    whole = part.read_bytes()
    part.write_bytes(whole + damage)
    capsys.readouterr()
    left_at("run", 2, run, interrupt, resume=True)
    said = capsys.readouterr().out
    assert "1 line cut off or damaged" in said
    assert f"going on after {whole.count(bytes([10]))} of 14" in said
    assert part.read_bytes().startswith(whole + b"{") and read_part(part, 7, 2)[1] == 0
    assert run("run", resume=True) == run("unbroken")


def test_kill_9_loses_at_most_what_was_running(run, options, tmp_path):
    longer = {"max_new_tokens": 80, "samples": 4, "max_num_seqs": 4}
    words = [f"{name}={value}" for name, value in {**options, **longer}.items()]
    words += ["prompt_template={problem}", "device=cpu", "dtype=fp32", f"out={tmp_path / 'run'}"]
    part = tmp_path / "run" / PART
    child = subprocess.Popen(
        [sys.executable, "-m", "minimath", "eval", *words],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
    )
    end = time.monotonic() + 120
    while not (part.exists() and part.stat().st_size) and child.poll() is None and time.monotonic() < end:
        time.sleep(0.005)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    done = read_part(part, 7, 4)[0]
    assert 0 < len(done) < 28
    assert run("run", resume=True, **longer) == run("unbroken", **longer)


def test_a_full_disk_is_one_line_and_keeps_what_is_there(tmp_path):
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    with RunLog(tmp_path, "test") as log:
        log.append(PART, part_record((0, 0), Sample([1, 2], [], True)))
        (tmp_path / "full").symlink_to("/dev/full")
        with pytest.raises(UserError, match="resume=true"):
            log.append("full", part_record((0, 1), Sample([3], [], False)))
    assert done_at(tmp_path / PART, 1, 2) == {(0, 0): ([1, 2], True)} and read_part(tmp_path / PART, 1, 2)[1] == 0


# ---- what may not change, and what may


@pytest.mark.parametrize("changed", [
    {"seed": 1}, {"temperature": 0.9}, {"top_k": 5}, {"samples": 3}, {"max_new_tokens": 30},
    {"prompt_template": "Q: {problem}"}, {"system": "Be brief."}, {"attn": "eager"}, {"dtype": "bf16"}, {"limit": 6},
])
def test_a_changed_option_is_named_and_refused(run, interrupt, tmp_path, changed):
    left_at("run", 3, run, interrupt)
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    with pytest.raises(UserError) as caught:
        run("run", resume=True, **changed)
    name = {"limit": "data"}.get(*changed, *changed)
    assert f": {name} was" in str(caught.value) and "out=" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


def test_changed_problems_are_refused_and_corrected_answers_are_not(run, interrupt, tmp_path, options):
    left_at("run", 3, run, interrupt)
    data = Path(options["data"])
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    data.write_text("\n".join(json.dumps(row | {"answer": "1"}) for row in rows))
    left_at("run", 3, run, interrupt, resume=True)
    data.write_text("\n".join(json.dumps(row | {"problem": row["problem"] + "?"}) for row in rows))
    with pytest.raises(UserError, match="data was '7 problems"):
        run("run", resume=True)


def test_another_adapter_or_model_under_the_same_path_is_refused(run, interrupt, tmp_path, tiny_dir):
    shutil.copytree(tiny_dir, tmp_path / "model")
    where = {"model": str(tmp_path / "model"), "adapter": str(tmp_path / "sft")}

    for seed in (1, 2):
        model = policy_of(tiny_dir, SFTConfig, train=True, lora_r=4).model
        wake_adapter(model, seed=seed)
        save_adapter(model, tmp_path / f"sft{seed}" / "adapter")
    shutil.copytree(tmp_path / "sft1", tmp_path / "sft")
    left_at("run", 3, run, interrupt, **where)
    left_at("run", 3, run, interrupt, **where, resume=True)
    shutil.copytree(tmp_path / "sft2", tmp_path / "sft", dirs_exist_ok=True)
    with pytest.raises(UserError, match=": adapter was"):
        run("run", **where, resume=True)
    shutil.copytree(tmp_path / "sft1", tmp_path / "sft", dirs_exist_ok=True)
    tiny_model(tmp_path / "model", seed=1)
    with pytest.raises(UserError, match=": model files was"):
        run("run", **where, resume=True)


def test_an_option_decides_unless_it_is_known_not_to(tiny_dir):
    names, examples = set(options_of(EvalConfig)), [Example("1 + 1 = ?", answer="2")]
    assert NOT_DECISIVE < names
    told = fingerprint(make_config(EvalConfig, tiny_dir), examples)
    assert set(told) == names - NOT_DECISIVE | {"model", "adapter", "dtype", "data"}
    sampling = make_config(SampleConfig, tiny_dir, keep=2, samples=1, temperature=0)
    assert fingerprint(sampling, examples) == told  # what is kept is chosen afterwards
    moved = make_config(EvalConfig, tiny_dir, vllm_url="http://127.0.0.1:8001/v1", vllm_gpu_share=0.8, compile=True)
    assert fingerprint(moved, examples) == told  # another port, another share of a card


def test_max_num_seqs_and_budgets_may_change(run, interrupt):
    left_at("run", 3, run, interrupt)
    summary, records = run("run", resume=True, max_num_seqs=5, budgets="8")
    assert "accuracy@8" in summary and records == run("unbroken")[1]


def test_without_its_fingerprint_it_is_refused(run, interrupt, tmp_path):
    left_at("run", 3, run, interrupt)
    (tmp_path / "run" / FINGERPRINT).write_text("{")
    with pytest.raises(UserError, match=FINGERPRINT):
        run("run", resume=True)


# ---- folders


def test_an_unfinished_evaluation_is_refused_with_the_word_that_goes_on(run, interrupt):
    left_at("run", 3, run, interrupt)
    with pytest.raises(UserError, match="unfinished evaluation; add resume=true"):
        run("run")


def test_resume_of_a_complete_evaluation_changes_nothing(run, tmp_path, capsys):
    first = run("run")
    (tmp_path / "run" / PART).write_text("x")  # killed after eval.json was written
    before = (tmp_path / "run" / "eval.json").read_bytes()
    assert run("run", resume=True) == first and "nothing is left to do" in capsys.readouterr().out
    assert (tmp_path / "run" / "eval.json").read_bytes() == before and not (tmp_path / "run" / PART).exists()
    with pytest.raises(UserError, match=": seed was 0 and is 1"):
        run("run", resume=True, seed=1)


def test_a_complete_evaluation_is_not_that_of_answers_that_were_mended_since(options, run):
    run("run")
    rows = [json.loads(line) for line in open(options["data"])]
    Path(options["data"]).write_text("".join(json.dumps(row | {"answer": "7"} if row["id"] == "p2" else row) + "\n"
                                             for row in rows))
    with pytest.raises(UserError, match="of 1 problems, first of number 3.*another out="):
        run("run", resume=True)


def test_resume_where_nothing_is_starts_with_the_first(run, capsys):
    assert run("run", resume=True) == run("unbroken")
    assert "no completion in" in capsys.readouterr().out


def test_a_user_error_leaves_a_folder_that_can_be_used(run):
    with pytest.raises(UserError, match="max_prompt_len"):
        run("run", max_prompt_len=2)
    run("run")


def test_the_evaluation_of_a_pipeline_goes_on(options, interrupt, tmp_path, capsys):
    cfg = make_config(EvalConfig, **options)
    (tmp_path / EVAL_CONFIG).touch()  # by which a whole run is known
    interrupt(4)
    with RunLog(tmp_path, "run") as log, pytest.raises(Interrupted), how_to_go_on(log, "run", float):
        part(evaluate, cfg, tmp_path / "eval-base")
    said = capsys.readouterr().out
    assert f"out={tmp_path} resume=true" in said and "eval-base resume=true" not in said
    interrupt(0)
    cfg.run.resume = True
    part(evaluate, cfg, tmp_path / "eval-base")
    part(evaluate, cfg, tmp_path / "eval-sft")
    assert "going on after" in capsys.readouterr().out
    assert results(tmp_path / "eval-base") == results(tmp_path / "eval-sft")


def test_a_signal_after_the_last_completion_of_an_evaluation_still_ends_the_run(tmp_path):
    def late(cfg):
        os.kill(os.getpid(), signal.SIGTERM)
        return {"accuracy": 1.0}

    with interruptible((), print), pytest.raises(Interrupted) as stopped:
        part(late, EvalConfig(), tmp_path / "eval")
    assert stopped.value.args == (signal.SIGTERM,)
