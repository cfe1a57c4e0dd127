"""Several processes: the same steps as one, one writer, one end. Each start costs seconds of imports, so there are few.

The processes are started by torchrun, with gloo, as a user would on a machine without cards.
"""
import json
import math
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import toy
from toy import ending_model, metrics, write_problems

SMALL = ["device=cpu", "dtype=fp32", "prompt_template={problem}", "lora_r=4", "lr_schedule=constant",
         "warmup=0", "micro_batch_tokens=200"]
HOOK = "def fn(samples, example):\n    return [sum(map(ord, s.text)) % 7 / 7 for s in samples]\n"
RL = ["reward=python:hook.fn", "verifier=none", "overlong=none", "kl_coef=0.05", "updates_per_rollout=2",
      "prompts_per_step=3", "group_size=4", "max_new_tokens=10", "max_refill=1"]
LOCAL = {"rollout/max_num_seqs", "rollout/seq_fill", "rollout/weights", "rollout/graph_replays",
         "rollout/plain_steps"}  # of each process's own share


def launch(processes: int, *words: str, cwd, script: str = "", timeout: float = 300):
    """torchrun --nproc_per_node PROCESSES of `minimath WORDS`, or of a script -> CompletedProcess."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(cwd)}
    what = [script] if script else ["-m", "minimath", *words]
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node",
                           str(processes), *what], cwd=cwd, capture_output=True, text=True, timeout=timeout, env=env)


@pytest.fixture
def folder(tmp_path):
    write_problems(tmp_path / "train.jsonl", n=24)
    write_problems(tmp_path / "test.jsonl", n=5, seed=1)
    (tmp_path / "hook.py").write_text(HOOK)
    return tmp_path


def assert_same_records(ours: list[dict], theirs: list[dict], rtol: float = 1e-6) -> None:
    """rtol of a sum that cancels is of its terms, which are near 1 here."""
    assert [r["step"] for r in ours] == [r["step"] for r in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() - LOCAL == b.keys() - LOCAL
        for name in a.keys() - LOCAL:
            if not name.startswith("time/") and "seconds" not in name:
                assert a[name] == b[name] or math.isclose(a[name], b[name], rel_tol=rtol, abs_tol=rtol), (name, a, b)


def test_a_run_of_two_processes_is_that_of_one(folder, tiny_dir, here):
    """Both stages, evaluations in training and after it."""
    recipe = {"model": tiny_dir, "sft": {"steps": 4, "lr": 0.01, "batch_size": 7, "eval_every": 2, "save_every": 2,
                                         "eval_data": "test.jsonl", "eval_max_new_tokens": 8},
              "rlaif": {"steps": 2, "lr": 0.001}, "eval": {"data": "test.jsonl", "max_new_tokens": 8, "samples": 2,
                                              "temperature": 1.0}}
    (folder / "recipe.yaml").write_text(json.dumps(recipe))  # json is yaml
    words = ["run", "recipe.yaml", *SMALL, "sft.data=train.jsonl", "rlaif.data=train.jsonl",
             *(f"rlaif.{word}" for word in RL)]
    status, out, err = here(*words, "out=one")
    assert status == 0, out + err
    two = launch(2, *words, "out=two", cwd=folder)
    assert two.returncode == 0, two.stdout + two.stderr
    assert "2 processes share every step" in two.stdout
    for stage in ("sft", "rlaif"):
        assert_same_records(metrics(folder / "two" / stage), metrics(folder / "one" / stage))
    assert any(r["loss"] for r in metrics(folder / "two" / "rlaif"))  # groups had a signal
    for name in ("eval-base", "eval-sft", "eval-rlaif"):
        ours, theirs = ([json.loads(line) for line in (folder / run / name / "completions.jsonl").open()]
                        for run in ("two", "one"))
        assert ours == theirs and len(ours) == 10
    ours, theirs = (json.loads((folder / run / "summary.json").read_text())["rows"] for run in ("two", "one"))
    assert ours.keys() == theirs.keys()
    assert two.stdout.count("everything is in two") == 1  # one of them prints
    assert sorted(p.name for p in (folder / "two").rglob("*")) == sorted(p.name for p in (folder / "one").rglob("*"))


def test_a_sharded_base_takes_the_same_steps(folder, tiny_dir, here):
    """FSDP2 under both stages and their rollouts, with one row more for one process than for the other."""
    words = [*SMALL, f"model={tiny_dir}", "data=train.jsonl", "save_every=0"]
    sft = ["sft", *words, "steps=2", "batch_size=3", "micro_batch_tokens=80", "eval_every=2", "eval_data=test.jsonl",
           "eval_max_new_tokens=8", "sample_every=2", "gradient_checkpointing=true"]
    rl = ["rlaif", *words, *RL, "steps=2", "lr=0.001", "adapter=sft-one"]
    for command, name in ((sft, "sft"), (rl, "rl")):
        status, out, err = here(*command, f"out={name}-one")
        assert status == 0, out + err
        two = launch(2, *command, "shard=true", f"out={name}-two", cwd=folder)
        assert two.returncode == 0, two.stdout + two.stderr
        assert_same_records(metrics(folder / f"{name}-two"), metrics(folder / f"{name}-one"))
    assert any(r["loss"] for r in metrics(folder / "rl-two"))


def test_each_process_keeps_its_part_of_a_sharded_layer(tiny_dir, tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(textwrap.dedent(f"""
        import sys
        sys.path.insert(0, {str(Path(toy.__file__).parent)!r})
        import torch
        from toy import load
        from minimath.config.schema import SFTConfig
        from minimath.core import dist
        from minimath.models.forward import hidden_states
        from minimath.models.variants import in_step
        dist.state()
        whole, _ = load({tiny_dir!r}, SFTConfig, train=True)
        split, _ = load({tiny_dir!r}, SFTConfig, train=True, shard=True)
        ids = torch.arange(5, 25)[None]
        for _ in range(2):
            torch.testing.assert_close(hidden_states(split, ids), hidden_states(whole, ids))  # which is fused
            for name, param in split.named_parameters():
                local = param.to_local() if hasattr(param, "to_local") else param
                base = "layers" in name and "lora" not in name and param.dim() == 2
                assert local.numel() * (2 if base else 1) == param.numel() or param.dim() == 1, name
        batches = [([number], {{}}) for number in range(1 + 2 * dist.rank())]
        given = list(in_step(split, batches))
        assert len(given) == 3 and [indices for indices, _ in given if indices] == [i for i, _ in batches]
        assert list(in_step(whole, batches)) == batches
        print("sound", flush=True)
        dist.leave()
    """))
    done = launch(2, cwd=tmp_path, script=str(script))
    assert done.returncode == 0 and done.stdout.count("sound") == 2, done.stdout + done.stderr


@pytest.mark.parametrize("words, said", [
    (["shard=true"], "this is one"),
    (["shard=true", "quant=nf4"], "or quant=nf4"),
])
def test_what_cannot_be_sharded_is_refused(folder, tiny_dir, here, words, said):
    status, _, err = here("sft", *SMALL, f"model={tiny_dir}", "data=train.jsonl", "steps=1", *words)
    assert status == 2 and said in err


def test_a_model_cannot_judge_itself_when_it_is_sharded(folder, tiny_dir, here):
    words = [*SMALL, f"model={tiny_dir}", "data=train.jsonl", "steps=1"]
    status, _, err = here("rlaif", *words, "shard=true", "judge=self")
    assert status == 2 and "judge=openai or judge=heuristic" in err


def test_two_processes_go_on_where_a_stop_file_ended_them(folder, tiny_dir, here):
    """The reward function makes the stop file in the second step."""
    (folder / "hook.py").write_text(HOOK.replace("    return", """
    from pathlib import Path
    if Path("two/checkpoints/step-000001").exists():
        Path("two/stop").touch()
    return"""))
    words = ["rlaif", *SMALL, *RL, f"model={tiny_dir}", "data=train.jsonl", "steps=4"]
    status, out, err = here(*words, "out=whole")
    assert status == 0, out + err
    stopped = launch(2, *words, "save_every=1", "out=two", cwd=folder)
    assert "stop file: stopped after step 2 of 4" in stopped.stdout, stopped.stdout + stopped.stderr
    assert not (folder / "two" / "stop").exists()
    (folder / "hook.py").write_text(HOOK)
    rest = launch(2, *words, "out=two", "resume=true", cwd=folder)
    assert rest.returncode == 0 and "resumed after step 2" in rest.stdout, rest.stdout + rest.stderr
    assert_same_records(metrics(folder / "two"), metrics(folder / "whole"))


def test_a_process_that_fails_ends_the_others(folder, tiny_dir):
    """The verifier raises in the second process alone, in the second step: nothing hangs, the first step is kept."""
    (folder / "check.py").write_text(textwrap.dedent("""
        import os

        def fn(text, example):
            if os.environ["RANK"] == "1" and os.path.exists("run/checkpoints/step-000001"):
                raise OSError("no sandbox")
            return len(text) % 2 == 0
    """))
    words = ["rlaif", *SMALL, *RL, f"model={ending_model(tiny_dir, folder / 'model')}", "data=train.jsonl", "steps=3",
             "save_every=1", "max_refill=0", "max_new_tokens=30", "out=run", "verifier=python:check.fn"]
    done = launch(2, *words, cwd=folder, timeout=150)
    assert done.returncode != 0 and "no sandbox" in done.stderr
    assert (folder / "run" / "checkpoints" / "step-000001" / "manifest.json").exists()


def test_shares_come_together_again_and_sums_are_of_all(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(textwrap.dedent("""
        import atexit, sys, torch
        from minimath.core import dist
        me, items = dist.rank(), list(range(7))
        assert dist.world() == 3 and dist.is_main() == (me == 0)
        assert dist.shard(items) == items[me::3]
        assert dist.gather(dist.shard(items)) == items
        assert dist.gather([f"only {me}"] if me == 2 else []) == ["only 2"]
        assert dist.broadcast({"of": me}) == {"of": 0}
        assert dist.all_reduce_sum({"a": 1.0, "b": float(me)}) == {"a": 3.0, "b": 3.0}
        assert dist.of_all(float(me)) == [0.0, 1.0, 2.0]
        a, b = torch.nn.Parameter(torch.full((2, 2), float(me))), torch.nn.Parameter(torch.zeros(3).bfloat16())
        dist.broadcast_parameters([a])
        assert a.sum() == 0
        a.grad = None if me == 1 else torch.full((2, 2), 1.5)  # a process without a row
        b.grad = torch.ones(3).bfloat16()
        dist.all_reduce_gradients([a, b])
        assert a.grad.tolist() == [[3.0, 3.0]] * 2 and b.grad.tolist() == [3.0] * 3 and b.grad.dtype == torch.bfloat16
        a.grad = torch.full((2, 2), float("nan") if me == 2 else 1.0)
        dist.all_reduce_gradients([a, b])
        assert a.grad.isnan().all()  # so all skip the step
        atexit.register(print, "sound")
        dist.leave()
    """))
    done = launch(3, cwd=tmp_path, script=str(script))
    assert done.returncode == 0 and done.stdout.count("sound") == 3, done.stdout + done.stderr


def test_one_process_needs_no_group(monkeypatch):
    import torch

    from minimath.core import dist
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    dist.state.cache_clear()
    param = torch.nn.Parameter(torch.zeros(2))
    dist.all_reduce_gradients([param])
    assert param.grad is None and dist.gather([1]) == dist.shard([1]) == [1] and dist.broadcast(2) == 2
    assert dist.world() == 1 and dist.is_main() and dist.all_reduce_sum({"a": 1.0}) == {"a": 1.0}


@pytest.mark.parametrize("command", ["demo", "solve", "plan", "judge check", "export"])
def test_commands_for_one_process_say_so(here, monkeypatch, command):
    monkeypatch.setenv("WORLD_SIZE", "2")
    status, _, err = here(command)
    assert status == 2 and f"minimath {command} is made for one process" in err and "rlaif" in err
