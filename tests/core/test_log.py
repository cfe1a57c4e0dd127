"""The run log: whole json lines, plain and terminal output, trackers, no secrets on disk."""
import io
import json
import sys
import types

import numpy as np
import pytest
import torch

from minimath.core import log
from minimath.core.errors import UserError
from minimath.core.log import RunLog, fmt, fmt_duration, truncate_metrics
from minimath.core.text import mask


class Terminal(io.StringIO):
    def isatty(self):
        return True


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def clock(monkeypatch):
    """time.monotonic under the test's control: clock[0] is now, in seconds."""
    now = [100.0]
    monkeypatch.setattr(log.time, "monotonic", lambda: now[0])
    return now


def test_metrics_are_whole_json_lines_with_null_for_what_is_not_a_number(tmp_path):
    with RunLog(tmp_path, "test", stream=io.StringIO()) as run:
        run.metrics(1, loss=torch.tensor(0.5), norm=float("nan"), top=float("inf"), n=np.int64(3), text="a\n")
        assert lines(tmp_path / "metrics.jsonl") == [  # readable while the run goes on
            {"step": 1, "loss": 0.5, "norm": None, "top": None, "n": 3, "text": "a\n"}]
        run.metrics(2, nested={"x": [np.float32(0.25), -np.inf]})
        run.sample({"step": 2, "text": "caf\u00e9", "rewards": (1.0, float("nan"))})
    assert lines(tmp_path / "metrics.jsonl")[1] == {"step": 2, "nested": {"x": [0.25, None]}}
    assert lines(tmp_path / "samples.jsonl") == [{"step": 2, "text": "caf\u00e9", "rewards": [1.0, None]}]


def test_a_resumed_run_leaves_the_same_metrics_as_an_unbroken_one(tmp_path):
    def train(run, steps):
        for step in steps:
            run.metrics(step, loss=1 / step)
            run.sample({"step": step, "text": str(step)})
    with RunLog(tmp_path / "whole", "test", stream=io.StringIO()) as run:
        train(run, range(1, 7))
    with RunLog(tmp_path / "broken", "test", stream=io.StringIO()) as run:
        train(run, range(1, 6))
        (tmp_path / "broken" / "metrics.jsonl").open("a").write('{"step": 6, "lo')  # killed while writing
        truncate_metrics(tmp_path / "broken", 3)  # checkpoint of step 3; also with the log already open
        train(run, range(4, 7))
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert (tmp_path / "broken" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    truncate_metrics(tmp_path / "empty", 3)  # nothing there: nothing to do


def test_without_a_terminal_progress_is_a_line_every_ten_seconds_with_time_left(tmp_path, clock, monkeypatch):
    monkeypatch.setattr(log, "memory_taken", lambda: 3 << 29)
    out = io.StringIO()
    with RunLog(tmp_path, "test", stream=out).progress(60, "sft") as advance:
        for _ in range(60):
            clock[0] += 1
            advance(**({"n": 0.123456} if clock[0] % 4 == 0 else {}))  # a number stays until there is a newer one
    shown = out.getvalue().splitlines()[1:]
    assert len(shown) == 6
    assert shown[0] == "sft 10/60, 10 s, 50 s left, 1.5 GiB, n=0.123"
    assert shown[-1] == "sft 60/60, 1 min 00 s, 1.5 GiB, n=0.123"
    assert "\x1b" not in out.getvalue()


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_that_finished_nothing_shows_no_time_left_and_after_a_resume_the_estimate_is_of_this_process(
        tmp_path, clock, terminal):
    """40 of 60 are done by an earlier process; this one needs 30 s for each of the first two."""
    out = Terminal() if terminal else io.StringIO()
    with RunLog(tmp_path, "test", stream=out).progress(60, "sft", done=40) as advance:
        clock[0] += 36
        advance(0, tok_s=5.0)
        assert "40/60" in out.getvalue() or terminal  # rich draws it in its own time
        first = len(out.getvalue())
        assert "left" not in out.getvalue() and (terminal or "sft 40/60, 36 s," in out.getvalue())
        clock[0] += 24
        advance(2)
        if not terminal:
            assert "sft 42/60, 1 min 00 s, 9 min 00 s left" in out.getvalue()[first:]
    if terminal:
        assert "42/60" in out.getvalue()[first:] and "9 min 00 s left" in out.getvalue()[first:]


def test_on_a_terminal_progress_is_drawn_and_texts_are_not_markup(tmp_path):
    out = Terminal()
    run = RunLog(tmp_path, "test", stream=out)
    with run.progress(2, "sft [x]") as advance:
        advance(loss=0.5)
        run.say("[/b] is text, \x1b[31m is not obeyed, a ratio a:b:c")
        advance(loss=0.25)
    run.table("t [bold]", ["name", "n"], [["[/i]", 1.0]])
    text = out.getvalue()
    assert "sft [x]" in text and "2/2" in text and "loss=0.25" in text
    assert "[/b] is text, ?[31m is not obeyed, a ratio a:b:c" in text and "[/i]" in text and "t [bold]" in text


def test_a_progress_bar_stands_within_another(tmp_path):
    out = Terminal()
    run = RunLog(tmp_path, "test", stream=out)
    with run.progress(2, "outer") as advance:
        advance(loss=0.5)
        with run.progress(1, "inner") as inner:
            inner()
        advance()  # without numbers: the last ones stay
    last = out.getvalue().rsplit("outer", 1)[1]
    assert "inner" in out.getvalue() and "2/2" in last and "loss=0.5" in last and "GiB" in last


COMPLETION = "3 + 4 = 7\n[bold]So[/bold] \x1b[31mthe answer is \\boxed{7}"


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_a_sample_is_an_indented_block(tmp_path, stream):
    out = stream()
    RunLog(tmp_path, "test", stream=out).show("step 3, best of 4 (reward 1.20)", COMPLETION)
    assert out.getvalue().splitlines()[1:] == [
        "step 3, best of 4 (reward 1.20):", "    3 + 4 = 7", "    [bold]So[/bold] ?[31mthe answer is \\boxed{7}"]


def test_the_middle_of_a_long_sample_is_left_out(tmp_path):
    out = io.StringIO()
    RunLog(tmp_path, "test", stream=out).show("s", "first" + 9000 * "x" + "last")
    text = out.getvalue()
    assert "first" in text and "last" in text and "... 7009 characters ..." in text and len(text) < 2300


def test_memory_is_the_peak_of_a_card_in_use_and_the_resident_set_without_one(monkeypatch):
    held = torch.ones(1 << 25)
    resident = log.memory_taken()
    assert resident > held.nbytes if sys.platform == "linux" else resident >= 0
    for name, value in {"is_available": True, "is_initialized": True, "max_memory_allocated": 7 << 30}.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    assert log.memory_taken() == 7 << 30


def test_a_plain_table_is_aligned(tmp_path):
    out = io.StringIO()
    RunLog(tmp_path, "test", stream=out).table("results", ["run", "accuracy"], [["base", 0.05], ["sft", None],
                                                                              ["rl", 123.456]])
    assert out.getvalue().splitlines()[1:] == [
        "results", "run   accuracy", "----  --------", "base  0.05", "sft   -", "rl    123.5"]
    out.truncate(0)
    RunLog(tmp_path, "test", stream=out).table("results", ["n"], [[5], [10]])
    assert out.getvalue().splitlines()[-2:] == [" 5", "10"]


def test_an_ascii_terminal_does_not_stop_the_run(tmp_path):
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    RunLog(tmp_path, "test", stream=stream).say("5 \u00d7 3")
    assert b"5 ? 3" in raw.getvalue()


def test_environment_names_versions_and_device_and_holds_no_secret(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["minimath", "rlaif", "max_new_tokens=64", "api_key=abcdef",
                                      "judge_url=http://me:pass@host/v1?key=abcdef"])
    monkeypatch.setenv("OPENAI_API_KEY", "abcdef")
    RunLog(tmp_path, "a title", stream=io.StringIO())
    text = (tmp_path / "environment.json").read_text()
    found = json.loads(text)
    assert found["title"] == "a title" and torch.__version__.startswith(found["versions"]["torch"])
    assert found["command"][:3] == ["minimath", "rlaif", "max_new_tokens=64"] and found["cpus"] > 0
    assert "abcdef" not in text and "pass" not in text


@pytest.mark.parametrize("word,shown", [
    ("lr=1e-4", "lr=1e-4"), ("micro_batch_tokens=64", "micro_batch_tokens=64"), ("HF_TOKEN=x1", "HF_TOKEN=***"),
    ("rlaif.password=p", "rlaif.password=***"), ("data=hf_abcdefghijkl", "data=***"),
    ("x=sk-proj-abcdefgh1234", "x=***"), ("judge_url=https://u:p@h/v1", "judge_url=https://***@h/v1"),
    ("judge_url=https://h/v1?a=1&token=t&b=2", "judge_url=https://h/v1?a=1&token=***&b=2"),
])
def test_secrets_on_the_command_line_are_masked(word, shown):
    assert mask(word) == shown


@pytest.mark.parametrize("name", ["wandb", "tensorboard", "trackio"])
def test_a_missing_tracker_gives_the_pip_line(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard" if name == "tensorboard" else name, None)
    with pytest.raises(UserError, match=f"pip install {name}"):
        RunLog(tmp_path, "test", name, stream=io.StringIO())


def test_trackers_get_the_numbers_and_a_failing_one_is_switched_off(tmp_path, monkeypatch):
    seen = []

    class Run:
        def log(self, numbers, step):
            seen.append((step, numbers))
            if step == 2:
                raise ConnectionError("offline")

        def finish(self):
            seen.append("finished")
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **options: Run()))
    monkeypatch.setitem(sys.modules, "trackio", types.SimpleNamespace(init=lambda **options: Run()))
    run = RunLog(tmp_path, "test", "wandb, trackio", stream=io.StringIO())
    run.metrics(1, loss=0.5, text="x", bad=float("nan"))
    assert seen == [(1, {"loss": 0.5})] * 2
    with pytest.warns(UserWarning, match="(wandb|trackio) failed and is switched off") as caught:
        run.metrics(2, loss=0.4)
    assert len(caught) == 2
    run.metrics(3, loss=0.3)
    run.close()
    assert seen[2:] == [(2, {"loss": 0.4})] * 2
    assert [row["step"] for row in lines(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def test_a_tracker_knows_a_run_again_and_takes_no_other_of_that_name_for_it(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **options: asked.append(
        options) or types.SimpleNamespace(log=print, finish=print)))
    for whole in "aba":
        RunLog(tmp_path / whole / "sft", "test", "wandb", stream=io.StringIO()).close()
    assert asked[0] == asked[2] and asked[0]["id"].startswith("sft-")
    assert asked[0]["id"] != asked[1]["id"] and asked[0]["name"] != asked[1]["name"]


def test_a_tracker_that_does_not_start_is_a_user_error(tmp_path, monkeypatch):
    def init(**options):
        raise RuntimeError("api_key not configured (no-tty)")
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    with pytest.raises(UserError, match=r"trackers=wandb does not start \(.*api_key not configured"):
        RunLog(tmp_path, "test", "wandb", stream=io.StringIO())


def test_a_tracker_that_is_not_named_is_not_imported(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(log.importlib, "import_module", lambda name: asked.append(name) or types.SimpleNamespace(
        init=lambda **options: types.SimpleNamespace(log=print, finish=print)))
    RunLog(tmp_path, "test", stream=io.StringIO()).close()
    assert asked == []
    RunLog(tmp_path, "test", "trackio", stream=io.StringIO()).close()
    assert asked == ["trackio"]


def test_tensorboard_gets_each_number_as_a_scalar(tmp_path, monkeypatch):
    seen = []

    class Writer:
        def __init__(self, folder):
            seen.append(folder)

        def add_scalar(self, key, value, step):
            seen.append((key, value, step))

        def close(self):
            seen.append("closed")
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=Writer))
    with RunLog(tmp_path, "test", "tensorboard", stream=io.StringIO()) as run:
        run.metrics(4, loss=0.5, n=2)
    assert seen == [str(tmp_path / "tensorboard"), ("loss", 0.5, 4), ("n", 2, 4), "closed"]


def test_a_run_folder_that_can_not_be_made_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="choose another out="):
        RunLog(tmp_path / "file" / "run", "test", stream=io.StringIO())


def test_numbers_and_durations_are_short():
    values = (0.000123456, 12.3456, 1234.56, 3, True, float("nan"), None, torch.tensor(0.5), "x")
    assert [fmt(value) for value in values] == [
        "0.000123", "12.3", "1234.6", "3", "True", "-", "-", "0.5", "x"]
    assert [fmt_duration(s) for s in (0.4, 59.4, 59.6, 200, 3599, 3900)] == [
        "0 s", "59 s", "1 min 00 s", "3 min 20 s", "59 min 59 s", "1 h 05 min"]
