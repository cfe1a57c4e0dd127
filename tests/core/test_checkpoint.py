"""Checkpoints: bitwise round trips, no half-written state, damage noticed, no pickle read."""
import errno
import json
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from minimath.config.schema import OptimizerOptions
from minimath.core import checkpoint
from minimath.core.checkpoint import (
    best_checkpoint,
    list_checkpoints,
    load_checkpoint,
    save_adapter,
    save_checkpoint,
    verify,
)
from minimath.core.errors import UserError
from minimath.core.files import manifest_digest, sha256
from minimath.core.run_folder import find_adapter
from minimath.core.state import optimizer_state
from minimath.train.optimizer import clip_and_step, make_optimizer

SIZE = pytest.mark.filterwarnings("ignore:Paged optimizers")


@pytest.fixture
def make(tiny_dir):
    """make(seed, optimizer=..., **lora) -> (peft model, optimizer); all linear layers, dropout on."""
    def build(seed=0, optimizer="adamw", **lora):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_pretrained(tiny_dir)
        options = {"r": 128, "target_modules": "all-linear", "lora_dropout": 0.1} | lora
        model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **options)).train()
        return model, make_optimizer(model.parameters(), OptimizerOptions(optimizer))
    return build


def train(model, optimizer, steps):
    """A few steps with dropout on random tokens: depends on optimizer state and torch's generator."""
    params = [p for p in model.parameters() if p.requires_grad]
    for _ in range(steps):
        ids = torch.randint(0, 300, (2, 16))
        model(input_ids=ids, labels=ids).loss.backward()
        clip_and_step(optimizer, params, 1.0, 1e-2)


def weights(model):
    return {name: tensor.clone() for name, tensor in checkpoint.adapter_tensors(model).items()}


def assert_bitwise(left, right):
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]), name


def save(run, step, pair, **options):
    options = {"state": {"cursor": step}, "keep": 3} | options
    return save_checkpoint(run, step, model=pair[0], optimizer=pair[1], **options)


@SIZE
@pytest.mark.parametrize("name", ["adamw", "adamw8bit", "paged_adamw8bit", "paged_adamw32bit"])
def test_training_goes_on_bitwise_after_a_resume(tmp_path, make, name):
    pair = make(0, name)
    train(*pair, 3)
    save(tmp_path, 3, pair, state={"cursor": [1, 2], "epoch": 0.5})
    train(*pair, 3)
    again = make(1, name)  # other adapter weights, other generator state
    assert load_checkpoint(tmp_path, model=again[0], optimizer=again[1]) == {
        "cursor": [1, 2], "epoch": 0.5, "step": 3}
    train(*again, 3)
    assert_bitwise(weights(pair[0]), weights(again[0]))
    left, right = (optimizer_state(optimizer) for optimizer in (pair[1], again[1]))
    assert_bitwise(left[0], right[0])
    assert left[1] == right[1]
    if "8bit" in name:  # rank 128 gives tensors of at least 4,096 elements and below: both kinds of state
        dtypes = {t.dtype for key, t in left[0].items() if key.endswith("state1")}
        assert dtypes == {torch.uint8, torch.float32}


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings")
@pytest.mark.parametrize("lora", [{"use_dora": True}, {"use_rslora": True},
                                  {"modules_to_save": ["lm_head"]}])
def test_adapter_variants_come_back_bitwise(tmp_path, make, lora):
    pair = make(0, r=4, **lora)
    train(*pair, 2)
    save(tmp_path, 2, pair)
    again = make(1, r=4, **lora)
    load_checkpoint(tmp_path, model=again[0], optimizer=again[1])
    assert_bitwise(weights(pair[0]), weights(again[0]))


def test_all_random_generators_go_on_where_they_were(tmp_path, make):
    pair = make()
    for seed_all in (random.seed, np.random.seed, torch.manual_seed):
        seed_all(7)
    random.gauss(0, 1), np.random.standard_normal()  # both keep half of a pair of normals
    save(tmp_path, 1, pair)

    def draw():
        return random.gauss(0, 1), random.random(), np.random.standard_normal(), torch.rand(3).tolist()
    expected = draw()
    for seed_all in (random.seed, np.random.seed, torch.manual_seed):
        seed_all(8)
    load_checkpoint(tmp_path, model=pair[0], optimizer=pair[1])
    assert draw() == expected


def test_rotation_keeps_the_newest_and_never_drops_the_best(tmp_path, make):
    pair = make(r=4)
    for step in (1, 2, 3, 4, 10, 1000000):
        save(tmp_path, step, pair, keep=2, best=step in (1, 3))
    names = [folder.name for folder in list_checkpoints(tmp_path)]
    assert names == ["step-1000000", "step-000010", "step-000003"]
    assert best_checkpoint(tmp_path).name == "step-000003"


def test_saving_a_step_again_replaces_it(tmp_path, make):
    pair = make(r=4)
    save(tmp_path, 5, pair, state={"n": 1})
    save(tmp_path, 5, pair, state={"n": 2})
    assert load_checkpoint(tmp_path, model=pair[0], optimizer=pair[1])["n"] == 2
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000005"]


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the code under test may catch it."""


@pytest.mark.parametrize("function,call", [("replace", 1), ("fsync", 1), ("fsync", 5)])
@pytest.mark.parametrize("step", [2, 1])
def test_a_kill_while_writing_leaves_the_old_checkpoint(tmp_path, make, monkeypatch, function, call, step):
    """step 2 is a new checkpoint, step 1 replaces the one there."""
    pair = make(r=4)
    save(tmp_path, 1, pair, state={"old": True})
    before, calls, real = weights(pair[0]), [], getattr(os, function)

    def die(*args):
        calls.append(args)
        if len(calls) == call:
            raise Killed
        return real(*args)
    train(*pair, 1)
    with monkeypatch.context() as patch:
        patch.setattr(os, function, die)
        with pytest.raises(Killed):
            save(tmp_path, step, pair, state={"old": False})
    assert load_checkpoint(tmp_path, model=pair[0], optimizer=pair[1])["old"]
    assert_bitwise(before, weights(pair[0]))
    save(tmp_path, 2, pair)  # and the leftovers are in nobody's way
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-000001", "step-000002"]


def test_a_kill_between_the_two_renames_loses_nothing(tmp_path, make, monkeypatch):
    pair = make(r=4)
    save(tmp_path, 1, pair, state={"old": True})
    real, calls = os.replace, []

    def die_on_second(*args):
        calls.append(args)
        if len(calls) == 2:
            raise Killed
        return real(*args)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", die_on_second)
        with pytest.raises(Killed):
            save(tmp_path, 1, pair)
    assert list_checkpoints(tmp_path) == []
    assert load_checkpoint(tmp_path, model=pair[0], optimizer=pair[1])["old"]


def test_a_kill_while_old_checkpoints_are_deleted_leaves_no_half_of_one(tmp_path, make, monkeypatch):
    pair = make(r=4)
    save(tmp_path, 1, pair)

    def delete_one_file_and_die(folder, **options):
        next(iter(Path(folder).iterdir())).unlink()
        raise Killed
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", delete_one_file_and_die)
        with pytest.raises(Killed):
            save(tmp_path, 2, pair, keep=1)
    assert [(folder.name, verify(folder)) for folder in list_checkpoints(tmp_path)] == [("step-000002", [])]
    save(tmp_path, 3, pair, keep=1)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000003"]


def damage(path: Path, how: str):
    if how == "truncate":
        os.truncate(path, path.stat().st_size // 2)
    elif how == "flip":
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    else:
        path.unlink()


@pytest.mark.parametrize("how", ["truncate", "flip", "remove"])
@pytest.mark.parametrize("name", ["adapter_model.safetensors", "optimizer.safetensors", "state.json",
                                  "manifest.json"])
def test_a_damaged_checkpoint_is_noticed_and_the_one_before_is_used(tmp_path, make, name, how):
    pair = make(r=4)
    save(tmp_path, 1, pair)
    before = weights(pair[0])
    train(*pair, 1)
    newest = save(tmp_path, 2, pair)
    assert verify(newest) == []
    damage(newest / name, how)
    if (name, how) == ("manifest.json", "flip"):  # its last byte is a brace
        assert "JSON" in verify(newest)[0]
    assert verify(newest)
    with pytest.warns(UserWarning, match="step-000002 is damaged"):
        assert load_checkpoint(tmp_path, model=pair[0], optimizer=pair[1])["step"] == 1
    assert_bitwise(before, weights(pair[0]))


def test_no_checkpoint_is_none_and_only_damaged_ones_are_an_error(tmp_path, make):
    pair = make(r=4)
    assert load_checkpoint(tmp_path, model=pair[0], optimizer=pair[1]) is None
    damage(save(tmp_path, 1, pair) / "state.json", "remove")
    with pytest.warns(UserWarning), pytest.raises(UserError, match="none of the 1 checkpoints"):
        load_checkpoint(tmp_path, model=pair[0], optimizer=pair[1])


def test_a_manifest_can_not_point_outside_its_folder(tmp_path, make):
    folder = save(tmp_path, 1, make(r=4))
    manifest = json.loads((folder / "manifest.json").read_text())
    (tmp_path / "x").write_text("")
    manifest["files"]["../../x"] = {"bytes": 0, "sha256": sha256(tmp_path / "x")}
    manifest["sha256"] = manifest_digest({name: manifest[name] for name in ("step", "best", "files")})
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert verify(folder) == ["../../x: missing"]


@SIZE
@pytest.mark.parametrize("other,says", [
    ({"r": 8}, "another adapter"), ({"r": 4, "use_dora": True}, "another adapter"),
    ({"r": 4, "optimizer": "adamw8bit"}, "saved by AdamW")])
def test_a_checkpoint_of_other_options_is_refused_before_anything_changes(tmp_path, make, other, says):
    save(tmp_path, 1, make(r=4))
    pair = make(1, **other)
    before = weights(pair[0])
    with pytest.raises(UserError, match=says):
        load_checkpoint(tmp_path, model=pair[0], optimizer=pair[1])
    assert_bitwise(before, weights(pair[0]))
    assert optimizer_state(pair[1])[0] == {}


def test_a_full_disk_names_path_and_bytes_and_keeps_the_old_checkpoint(tmp_path, make):
    pair = make()
    save(tmp_path, 1, pair)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, hard))  # a real failing write, EFBIG
    try:
        with pytest.raises(UserError, match=r"step-000002 .*it needs [\d,]{6,} bytes.*free some space"):
            save(tmp_path, 2, pair)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000001"]
    assert verify(list_checkpoints(tmp_path)[0]) == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES])
def test_every_failing_write_is_a_user_error(tmp_path, make, monkeypatch, number):
    pair = make(r=4)
    save(tmp_path, 1, pair)

    def fail(descriptor):
        raise OSError(number, os.strerror(number))
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(UserError, match=f"step-000001.*{os.strerror(number)}"):
            save(tmp_path, 1, pair)
    assert verify(list_checkpoints(tmp_path)[0]) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        save_adapter(pair[0], tmp_path / "file" / "adapter")


def test_find_adapter_takes_run_checkpoint_and_plain_folders(tmp_path, make):
    model, optimizer = make(r=4)
    first, second = (save(tmp_path, step, (model, optimizer)) for step in (1, 2))
    assert find_adapter(tmp_path) == second and find_adapter(first) == first
    damage(second / "adapter_model.safetensors", "flip")
    with pytest.warns(UserWarning, match="damaged"):
        assert find_adapter(tmp_path) == first
    with pytest.raises(UserError, match="damaged"):
        find_adapter(second)
    assert save_adapter(model, tmp_path / "adapter") == find_adapter(tmp_path) == tmp_path / "adapter"
    model.save_pretrained(tmp_path / "plain")  # peft's own, without a manifest
    assert_bitwise(load_file(find_adapter(tmp_path / "plain") / "adapter_model.safetensors"), weights(model))


def test_of_a_run_of_the_whole_recipe_the_adapter_of_the_last_complete_stage_is_taken_and_said(tmp_path, make, capsys):
    model, optimizer = make(r=4)
    (tmp_path / "eval-base").mkdir()
    with pytest.raises(UserError, match="holds no adapter.*complete stages rlaif and sft"):
        find_adapter(tmp_path)
    save(tmp_path / "sft", 1, (model, optimizer))  # interrupted in stage 1
    capsys.readouterr()
    with pytest.raises(UserError, match=f"no stage of it is complete.*resume=true.*adapter={tmp_path / 'sft'}"):
        find_adapter(tmp_path)
    for stage in ("sft", "rlaif"):
        before, said = (tmp_path / "sft" / "adapter", "; rlaif is not complete") if stage == "rlaif" else (None, "")
        save_adapter(model, tmp_path / stage / "adapter")
        if before:  # interrupted in stage 2: a stopped stage has an adapter too
            assert find_adapter(tmp_path) == before
            assert capsys.readouterr().err == f"adapter={tmp_path}: taking {before}{said}\n"
        (tmp_path / stage / "summary.json").write_text("{}")
        for _ in range(2):  # a command that asks twice says it once
            assert find_adapter(tmp_path) == tmp_path / stage / "adapter"
        assert capsys.readouterr().err == f"adapter={tmp_path}: taking {tmp_path / stage / 'adapter'}\n"
    damage(tmp_path / "rlaif" / "adapter" / "adapter_model.safetensors", "flip")
    with pytest.raises(UserError, match="damaged"):  # not silently that of stage 1
        find_adapter(tmp_path)


def test_a_saved_adapter_loads_in_peft_bitwise(tmp_path, make, tiny_dir):
    model, optimizer = make(r=4)
    train(model, optimizer, 2)
    save_adapter(model, tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tiny_dir)
    again = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert_bitwise(weights(model), weights(again))
    ids = torch.arange(12)[None]
    assert torch.equal(model.eval()(input_ids=ids).logits, again.eval()(input_ids=ids).logits)


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


def test_a_pickled_adapter_is_refused_and_never_executed(tmp_path, make):
    model, _ = make(r=4)
    save_adapter(model, tmp_path / "bad")
    for name in ("adapter_model.safetensors", "manifest.json"):
        (tmp_path / "bad" / name).unlink()
    (tmp_path / "bad" / "adapter_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "executed")))
    with pytest.raises(UserError, match="pickle"):
        find_adapter(tmp_path / "bad")
    shutil.copy(tmp_path / "bad" / "adapter_model.bin", tmp_path / "bad" / "adapter_model.safetensors")
    with pytest.raises(UserError, match="can't be read"):
        find_adapter(tmp_path / "bad")
    assert not (tmp_path / "executed").exists()
    pickle.loads(pickle.dumps(Bomb(tmp_path / "executed")))
    assert (tmp_path / "executed").exists()  # the bomb was live


def test_an_unreadable_or_missing_adapter_says_what_was_looked_for(tmp_path, make):
    (tmp_path / "adapter_old").mkdir()
    with pytest.raises(UserError, match="did you mean 'adapter_old'"):
        find_adapter(tmp_path / "adapter_odl")
    with pytest.raises(UserError, match="adapter_model.safetensors.*checkpoints/step"):
        find_adapter(tmp_path / "adapter_old")
    (tmp_path / "adapter_old" / "adapter_config.json").write_text("{")
    with pytest.raises(UserError, match="can't be read"):
        find_adapter(tmp_path / "adapter_old")


KILL_SCRIPT = """
import sys, torch, peft
from transformers import AutoModelForCausalLM
from minimath.core.checkpoint import save_checkpoint
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
model = peft.get_peft_model(model, peft.LoraConfig(r=64, target_modules="all-linear", task_type="CAUSAL_LM"))
optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
for step in range(1, 10000):
    save_checkpoint(sys.argv[2], step, model=model, optimizer=optimizer, state={}, keep=2)
    print(step, flush=True)
"""


@pytest.mark.slow
def test_a_real_kill_at_any_moment_leaves_every_reported_checkpoint_whole(tmp_path, tiny_dir):
    for trial in range(5):
        run = tmp_path / str(trial)
        process = subprocess.Popen([sys.executable, "-c", KILL_SCRIPT, tiny_dir, str(run)], text=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        process.stdout.readline()
        time.sleep(0.3 + 0.137 * trial)
        process.send_signal(signal.SIGKILL)
        reported = [int(line) for line in process.communicate()[0].split()]
        folders = list_checkpoints(run)
        assert all(verify(folder) == [] for folder in folders)
        assert int(folders[0].name[5:]) >= max(reported, default=1)
