"""bench.rollout: arguments, counting, ratios and table on made-up rounds, a peer that dies, tiny runs."""

import importlib.util
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from bench import rollout, rollout_worker, train, turns
from minimath.core.errors import UserError

TINY = [
    "--tiny",
    "--prompts",
    "3",
    "--samples",
    "2",
    "--max-new-tokens",
    "6",
    "--rounds",
    "2",
    "--dtype",
    "fp32",
]


def round_of(seconds: float, tokens: int, peak: int | None = 0, **more) -> dict:
    return {
        "seconds": seconds,
        "tokens": tokens,
        "peak_extra_bytes": peak,
        "mean_length": tokens / 4,
        "finished": 0.5,
        **more,
    }


def test_arguments_default_to_the_published_shape():
    options = rollout.parse([])
    assert (options.prompts, options.samples, options.max_new_tokens, options.rounds) == (64, 8, 256, 2)
    assert options.engines == ["minimath", "generate", "generate-malloc", "continuous", "trl"]
    assert options.only is None


@pytest.mark.parametrize(
    "words",
    [
        ["--engines", "minimath", "vllm"],
        ["--engines", "minimath"],
        ["--engines", "generate", "trl"],
        ["--max-num-seqs", "-1"],
        ["--rounds", "none"],
        ["--samples", "1"],
    ],
)
def test_bad_arguments_are_refused_before_any_work(words, capsys):
    with pytest.raises(SystemExit) as stopped:
        rollout.parse(words)
    assert stopped.value.code == 2 and "error" in capsys.readouterr().err


def test_each_max_num_seqs_is_an_engine_and_minimath_comes_first():
    options = rollout.parse(["--max-num-seqs", "64", "128", "64", "--engines", "trl", "minimath", "generate"])
    engines = rollout.engines_of(options)
    assert list(engines) == ["minimath-64", "minimath-128", "trl", "generate"]
    assert rollout.spec_of(engines["minimath-128"], options, "m")["max_num_seqs"] == 128
    assert rollout.spec_of(engines["trl"], options, "m")["max_num_seqs"] == 64


def test_zero_leaves_max_num_seqs_to_minimath_but_not_to_continuous_batching():
    options = rollout.parse(["--max-num-seqs", "0", "16", "--engines", "minimath", "continuous"])
    engines = rollout.engines_of(options)
    found = {name: rollout.spec_of(engine, options, "m")["max_num_seqs"] for name, engine in engines.items()}
    assert found == {"minimath-auto": 0, "minimath-16": 16, "continuous": 16}


def test_malloc_is_tuned_for_minimath_and_peers_that_say_so():
    options = rollout.parse(["--engines", "minimath", *rollout.PEERS])
    tuned = {
        name
        for name, engine in rollout.engines_of(options).items()
        if rollout.spec_of(engine, options, "m")["keep_freed_memory"]
    }
    assert tuned == {"minimath-64", "generate-malloc", "trl-malloc"}


def test_whole_steps_take_the_shape_and_max_num_seqs_of_the_rollouts():
    options = rollout.parse(
        [
            "--prompts",
            "5",
            "--samples",
            "3",
            "--max-num-seqs",
            "7",
            "--generate-batch",
            "9",
            "--engines",
            "minimath",
            "generate",
            "trl",
            "trl-split",
        ]
    )
    asked = rollout.train_options(options)
    assert asked.trainers == ["minimath", "trl", "trl-split"]
    specs = [train.spec_of(name, "rlaif", asked, "m", 2) for name in asked.trainers]
    assert all((s["prompts"], s["group_size"], s["max_num_seqs"]) == (5, 3, 7) for s in specs)
    assert [s["rows_per_generation"] for s in specs] == [None, None, 9]


@pytest.mark.parametrize(
    ("row", "kept"),
    [([5, 6, 2, 0, 0], [5, 6, 2]), ([5, 9, 2, 2], [5, 9]), ([2, 2], [2]), ([5, 6], [5, 6]), ([5], [5])],
)
def test_tokens_count_up_to_and_including_the_end(row, kept):
    assert rollout_worker.cut_at_end(row, [2, 9]) == kept


def test_lengths_and_share_finished():
    facts = rollout_worker.length_facts([[5, 2], [5] * 4, [2], [5] * 5], [2])
    assert (facts["tokens"], facts["completions"], facts["mean_length"], facts["finished"]) == (12, 4, 3.0, 0.5)
    assert facts["length_deciles"][0] == 1 and facts["length_deciles"][-1] == 5


def test_seq_fill_of_padded_calls_is_sampled_over_decoded_rows():
    assert rollout_worker.padded_fill([[[1] * 4, [1]], [[1] * 2]]) == {"seq_fill": 7 / 10, "max_num_seqs": 2}


class Line:
    """Stands in for Turns: keeps what the worker says."""

    def __init__(self):
        self.said = []

    def pause(self, facts):
        self.said.append(facts)


def test_every_round_gets_new_prompts_after_a_short_warm_up():
    seen, line = [], Line()

    def roll(prompts, limit, number):
        seen.append((prompts, limit, number))
        return [[5, 2]] * (2 * len(prompts)), {}

    spec = {"prompts": 3, "samples": 2, "max_new_tokens": 20}
    rollout_worker.take_turns(spec, line, list("abcdef"), [2], roll)
    assert seen == [(["a", "b"], 8, 0), (["a", "b", "c"], 20, 1), (["d", "e", "f"], 20, 2)]
    assert [facts.get("tokens") for facts in line.said] == [None, 8, 12, 12]


def test_missing_completions_are_an_error_not_a_faster_engine():
    with pytest.raises(RuntimeError, match="3 completions for 2 prompts x 2"):
        rollout_worker.take_turns(
            {"prompts": 2, "samples": 2, "max_new_tokens": 4},
            Line(),
            ["a", "b"],
            [2],
            lambda *_: ([[5]] * 3, {}),
        )


def test_speed_is_the_median_of_ratios_of_tokens_per_second_paired_by_round():
    steps = {
        "minimath-64": [round_of(1, 100, 50, seq_fill=0.9), round_of(2, 100, 50, seq_fill=0.96)],
        "generate": [round_of(3, 100, 100), round_of(4, 50, 100)],  # 33.3 and 12.5 against 100 and 50
    }
    ours, peer = rollout.summarise(steps)
    assert peer["minimath against it"]["token speed"] == pytest.approx(3.5)
    assert peer["minimath against it"]["token speed range"] == pytest.approx([3, 4])
    assert peer["minimath against it"]["peak memory"] == 0.5 and "minimath against it" not in ours
    assert ours["tokens/s"] == 75 and ours["seq_fill"] == pytest.approx(0.93) and peer["seq_fill"] is None


def test_table_names_the_engines_that_failed():
    rows = rollout.summarise({"minimath-64": [round_of(1, 100, 10**8)], "generate": [round_of(2, 100, None)]})
    console = Console(width=140, file=io.StringIO())
    console.print(rollout.table_of("title", rows, {"continuous": "no pages"}))
    lines = console.file.getvalue().splitlines()
    assert any("continuous" in line and "failed" in line for line in lines)
    assert any("generate" in line and "2.00x" in line and "?" in line for line in lines)


def worker_of(code: str, log) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
    )


WELL = 'print("{}", flush=True)\nwhile input(): print(\'{"seconds": 1.0}\', flush=True)'
WORKERS = {
    "ours": WELL,
    "at start": "raise ValueError('no such model')",
    "later": 'print("{}", flush=True)\ninput()\nraise RuntimeError("pages ran out")',
}


def test_a_peer_that_dies_is_reported_and_the_others_go_on(monkeypatch, capsys):
    monkeypatch.setattr(turns, "PAUSE_S", 0)
    failed = {}
    steps = turns.take_turns(
        ["ours", "at start", "later", "last"],
        lambda name, log: worker_of(WORKERS.get(name, WELL), log),
        2,
        "test",
        1,
        failed,
    )
    assert {name: len(taken) for name, taken in steps.items()} == {"ours": 2, "last": 2}
    assert failed["at start"].endswith("with status 1: ValueError: no such model")
    assert failed["later"].endswith("with status 1: RuntimeError: pages ran out")
    assert "pages ran out" in capsys.readouterr().out


def test_without_minimath_there_is_nothing_to_compare(monkeypatch):
    monkeypatch.setattr(turns, "PAUSE_S", 0)
    codes = {"ours": WORKERS["later"], "peer": WELL}
    with pytest.raises(UserError, match="ours ended with status 1: RuntimeError: pages ran out"):
        turns.take_turns(["ours", "peer"], lambda name, log: worker_of(codes[name], log), 1, "test", 0, {})


def test_missing_trl_is_one_line_with_the_install_command(monkeypatch, capsys):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "trl" else found(name, *rest)
    )
    assert rollout.main(TINY) == 2
    err = capsys.readouterr().err
    assert "bench.rollout" in err and "pip install -e '.[bench]'" in err and err.count("\n") == 1


@pytest.fixture
def run_tiny(capsys):
    """run_tiny(FILE, WORDS) -> what is printed and written; the engines are processes of their own."""

    def run(out: Path, *words: str) -> dict:
        status, (said, error) = rollout.main([*TINY, "--out", str(out), *words]), capsys.readouterr()
        assert status == 0, error
        return {"printed": said, **json.loads(out.read_text())}

    return run


def check(result: dict, engines: list[str]) -> None:
    assert [row["engine"] for row in result["summary"]] == engines and not result["failed"]
    for name, rounds in result["rounds"].items():
        assert len(rounds) == 2 and all(r["completions"] == 6 and 6 <= r["tokens"] <= 36 for r in rounds), (
            name
        )
        assert all(r["seconds"] > 0 and r["length_deciles"][-1] <= 6 for r in rounds)
    assert all(row["minimath against it"]["token speed"] > 0 for row in result["summary"][1:])
    assert result["settings"]["max_num_seqs"] and result["versions"]["transformers"] and result["date"]


def test_tiny_run_writes_rates_ratios_and_settings(tmp_path, run_tiny):
    result = run_tiny(
        tmp_path / "new" / "r.json",
        "--only",
        "rollout",
        "--engines",
        "minimath",
        "generate",
        "--generate-batch",
        "4",
    )
    check(result["rollout fp32"], ["minimath-64", "generate"])
    assert 0 < result["rollout fp32"]["summary"][1]["seq_fill"] <= 1 and "tokens/s" in result["printed"]


@pytest.mark.slow
def test_tiny_run_of_all_engines_and_whole_steps(tmp_path, run_tiny):
    pytest.importorskip("trl")
    result = run_tiny(
        tmp_path / "r.json",
        "--max-num-seqs",
        "4",
        "5",
        "--engines",
        "minimath",
        *rollout.PEERS,
        "--generate-batch",
        "2",
    )
    check(result["rollout fp32"], ["minimath-4", "minimath-5", *rollout.PEERS])
    step = result["step fp32"]
    assert not step["failed"] and [row["trainer"] for row in step["summary"]] == [
        "minimath",
        "trl",
        "trl-split",
        "trl-malloc",
    ]
    for taken in step["steps"].values():
        assert all(s["completions"] == 6 and 0 < s["rollout_seconds"] < s["seconds"] for s in taken)
