"""Stage 1: the loop's loss is plain cross-entropy, memory options change nothing, resume is bitwise equal."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from toy import adapter, load, make_config, metrics, same_tensors, without_times, write_problems

from minimath.config.schema import DataOptions, SFTConfig
from minimath.core.checkpoint import list_checkpoints
from minimath.data.batch import step_indices
from minimath.data.chat import encode
from minimath.data.examples import load_examples

STEPS = 12


def losses(run_dir):
    return metrics(run_dir, "loss", "optim/grad_norm")


def assert_close(a, b, rtol=1e-5):
    assert len(a) == len(b) > 0
    for one, two in zip(a, b, strict=True):
        for name in one:
            assert one[name] == pytest.approx(two[name], rel=rtol), name


# ---- what a step computes


def test_loss_goes_down(train):
    summary, run_dir = train(steps=25, lr=2e-2)
    first, last = losses(run_dir)[0]["loss"], losses(run_dir)[-1]["loss"]
    assert summary["steps"] == 25 and last < 0.6 * first
    assert (run_dir / "adapter" / "adapter_model.safetensors").is_file() and (
        run_dir / "config.yaml"
    ).is_file()


def test_the_first_loss_and_gradient_are_plain_cross_entropy(train, tiny_dir, data):
    """Full logits, one example at a time, mean over the trained tokens of the step."""
    _, run_dir = train(steps=1)
    cfg = make_config(SFTConfig, tiny_dir, lora_r=4)
    model, tokenizer = load(tiny_dir, SFTConfig, train=True, lora_r=4)
    examples, _ = load_examples(DataOptions(source=data))
    rows = [encode(tokenizer, e, prompt_template=cfg.prompt.prompt_template, max_len=2048) for e in examples]
    chosen = [rows[i] for i in step_indices(0, len(rows), 6, 0)]
    total = 0.0
    for row in chosen:
        logits = model(input_ids=torch.tensor([row.ids])).logits[0, :-1]
        target = torch.tensor(row.ids[1:]).masked_fill(~torch.tensor(row.loss_mask[1:]), -100)
        total = total + torch.nn.functional.cross_entropy(logits, target, reduction="sum")
    loss = total / sum(sum(row.loss_mask[1:]) for row in chosen)
    loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.requires_grad])
    assert_close(losses(run_dir), [{"loss": loss.item(), "optim/grad_norm": norm.item()}])


def test_micro_batches_and_packing_leave_loss_and_gradient_unchanged(train):
    runs = [
        train(f"{packing}-{micro}", packing=packing, micro_batch_tokens=micro)[1]
        for packing, micro in ((True, 4096), (True, 150), (False, 4096), (False, 150), (False, 1))
    ]
    for other in runs[1:]:
        assert_close(losses(other), losses(runs[0]))


def test_gradient_checkpointing_changes_nothing(train):
    plain, checkpointed = train("plain")[1], train("checkpointed", gradient_checkpointing=True)[1]
    assert_close(losses(plain), losses(checkpointed), rtol=1e-6)


def test_offload_changes_no_bit_and_may_begin_at_a_resume(train):
    options = {"gradient_checkpointing": True, "lora_dropout": 0.1, "lr_schedule": "constant", "warmup": 0}
    plain, resumed = train("plain", steps=4, **options)[1], train("resumed", steps=2, **options)[1]
    train("resumed", steps=4, resume=True, offload=True, **options)
    assert losses(resumed) == losses(plain) and len(losses(plain)) == 4


def test_epochs_give_the_number_of_steps(train):
    assert train(steps=0, epochs=1.5, batch_size=6)[0]["steps"] == 6  # 24 problems


@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": "adamw8bit"},
        {"dtype": "fp16"},
        {"dtype": "bf16"},
        {"dora": True, "rslora": True},
        {"lora_dropout": 0.2},
    ],
)
def test_other_optimisers_dtypes_and_adapters_train(train, options):
    _, run_dir = train(steps=6, **options)
    records = metrics(run_dir)
    assert all(r["optim/stepped"] for r in records[2:])  # an fp16 loss scale may overflow at first
    assert records[-1]["loss"] < records[0]["loss"]


def test_fp16_loss_scale_is_divided_out_of_the_gradient(train):
    exact, half = losses(train("fp32", steps=1)[1])[0], losses(train("fp16", steps=1, dtype="fp16")[1])[0]
    assert half["optim/grad_norm"] == pytest.approx(exact["optim/grad_norm"], rel=0.05)
    assert half["loss"] == pytest.approx(exact["loss"], rel=0.02)


def test_a_step_says_what_it_did(train):
    _, run_dir = train(steps=4, warmup=2, lr_schedule="constant", sample_every=4, eval_max_new_tokens=5)
    records = metrics(run_dir)
    assert [r["step"] for r in records] == [1, 2, 3, 4]
    assert [r["optim/lr"] for r in records] == pytest.approx([5e-3, 1e-2, 1e-2, 1e-2])
    assert [r["data/epoch"] for r in records] == [0.25, 0.5, 0.75, 1.0]
    assert all(r["data/tokens"] > 100 and r["time/tokens_per_s"] > 0 and r["optim/skipped"] == 0 for r in records)
    [sample] = [json.loads(line) for line in (run_dir / "samples.jsonl").read_text().splitlines()]
    assert sample["step"] == 4 and sample["prompt"] and sample["completion"]


def test_data_may_be_a_list_of_dicts(train, data):
    rows = [json.loads(line) for line in open(data, encoding="utf-8")]
    assert losses(train("list", data=rows)[1]) == losses(train("file")[1])


# ---- interrupted runs: what the trainer does about them is in test_trainer.py


def test_resume_of_a_finished_run_trains_no_further(train):
    _, run_dir = train(steps=2)
    before = adapter(run_dir)
    assert train(steps=2, resume=True)[0]["steps"] == 2
    assert same_tensors(before, adapter(run_dir)) and len(metrics(run_dir)) == 2


OPTIONS = {
    "steps": STEPS,
    "batch_size": 6,
    "lora_r": 4,
    "lr": 0.01,
    "save_every": 2,
    "optimizer": "adamw",
    "sample_every": 1,
    "eval_max_new_tokens": 200,
}  # a long sample: a signal arrives within a step or after it


def start(out, tiny_dir, data, **options):
    """`python -m minimath sft` as a user runs it, in a process of its own, with one thread."""
    options = {
        "model": tiny_dir,
        "data": data,
        "out": out,
        "device": "cpu",
        "dtype": "fp32",
        "prompt_template": "{problem}",
        **OPTIONS,
        **options,
    }
    command = [sys.executable, "-m", "minimath", "sft", *(f"{key}={value}" for key, value in options.items())]
    return subprocess.Popen(
        command,
        cwd=out.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def signal_at(process, run_dir: Path, step: int, number) -> str:
    """Send a signal as soon as metrics.jsonl holds `step` lines; returns the output."""
    path, deadline = run_dir / "metrics.jsonl", time.monotonic() + 900
    while not path.exists() or path.read_bytes().count(b"\n") < step:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.001)
    process.send_signal(number)
    return process.communicate(timeout=900)[0]


def test_resume_after_signals_is_bitwise_equal(tiny_dir, data, tmp_path, train, one_thread):
    """As a user meets it; every moment and other options: tests/faults/resume_sft.py."""
    options = {"packing": True, "lora_dropout": 0.2, "micro_batch_tokens": 200}
    _, unbroken = train("unbroken", **OPTIONS, **options)
    run_dir = tmp_path / "killed"
    process = start(run_dir, tiny_dir, data, **options)
    said = signal_at(process, run_dir, 3, signal.SIGTERM)  # a checkpoint of the step reached, and exit status 143
    assert process.returncode == 143 and "resume=true" in said, said
    done = len(metrics(run_dir))
    newest = list_checkpoints(run_dir)[0]
    assert done < STEPS and json.loads((newest / "state.json").read_text())["done"] == done
    process = start(run_dir, tiny_dir, data, resume=True, **options)
    said = signal_at(process, run_dir, 5, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL and len(metrics(run_dir)) < STEPS, said
    process = start(run_dir, tiny_dir, data, resume=True, **options)
    said = process.communicate(timeout=900)[0]
    assert process.returncode == 0 and "resumed after step" in said, said
    assert without_times(metrics(run_dir)) == without_times(metrics(unbroken))
    assert len(metrics(run_dir)) == STEPS
    assert same_tensors(adapter(run_dir), adapter(unbroken))
    samples = [(folder / "samples.jsonl").read_text() for folder in (run_dir, unbroken)]
    assert samples[0] == samples[1]


@pytest.mark.parametrize("option", ["data", "eval_data"])
def test_a_resume_says_that_a_file_has_other_rows_than_it_had(train, tmp_path, data, option, capsys):
    file = tmp_path / "own.jsonl"
    options = {"data": data, "eval_data": data, "eval_every": 1, "eval_max_new_tokens": 2, option: write_problems(file)}
    train(steps=1, **options)
    train(steps=2, resume=True, **options)
    assert "has other rows" not in capsys.readouterr().out
    write_problems(file, seed=1)
    train(steps=3, resume=True, **options)
    [said] = [line for line in capsys.readouterr().out.splitlines() if "has other rows" in line]
    assert said == f"options changed since the checkpoint: steps 2 -> 3, {option} has other rows than it had"
