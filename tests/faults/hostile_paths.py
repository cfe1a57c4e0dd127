"""Names, ids and links that lead out of a folder, and a second writer in it."""
import json
import os
import shutil
import signal
import time
from pathlib import Path
from unittest import mock

from harness import Tally, run_child, start
from hostile_place import Place, command, everything
from toy import make_config

from minimath.config.schema import DataOptions, RLAIFConfig, SFTConfig
from minimath.core.checkpoint import list_checkpoints
from minimath.core.files import manifest_digest, sha256
from minimath.core.run_folder import find_adapter, lock_run
from minimath.data.examples import load_examples
from minimath.train.rlaif import rlaif
from minimath.train.sft import sft


def names_that_lead_out(place: Place) -> Tally:
    tally = Tally("hostile: names of data sets, adapters and models that lead out")
    (place.folder / "secret.txt").write_text("root:x:0:0\n")
    inside = place.folder / "inside"
    inside.mkdir(exist_ok=True)
    here = os.getcwd()
    os.chdir(inside)
    asked = []

    def ask(name, *words, **options):
        asked.append((name, *words))
        raise FileNotFoundError(name)

    names = ["../secret.txt", "../../../../etc/passwd", "/etc/passwd", "owner/..", "owner/../..", "o/...",
             "owner/name:..", "owner/name:../../x", "./../secret.txt", "..", "~root", "~nobody/x", "file:///etc/passwd",
             "zip://a.txt::../x.zip", "../x.zip", "x.tar.gz", "https://127.0.0.1:9/x.jsonl", "s3://bucket/x",
             "hf://datasets/o/n", "a\0b",
             "a\0b.jsonl", "owner\\..\\name", "C:\\x.jsonl", "\\\\host\\share", "owner/%2e%2e", "-rf",
             "--help", "/dev/stdin",
             "/dev/zero.jsonl", "x" * 5000, "x" * 300 + ".jsonl", "owner/na me", "/proc/self/environ"]
    try:
        with mock.patch("datasets.load_dataset", ask):
            for name in names:
                place.refused(tally, f"data {name!r:.40}", lambda name=name: load_examples(DataOptions(source=name)))
                place.refused(tally, f"adapter {name!r:.40}", lambda name=name: find_adapter(name))
                for option in ("data", "adapter", "model", "eval_data") if place.full else ():
                    options = {"data": place.data, "lora_r": 2, "steps": 1, "out": "out", "max_len": 64,
                               "eval_every": 1, "eval_data": place.data, option: name}
                    model = options.pop("model", place.model)
                    place.refused(tally, f"{option}={name!r:.40}", lambda model=model, options=options: sft(
                        make_config(SFTConfig, model, **options)))
                    shutil.rmtree("out", ignore_errors=True)
        bad = [name for name in asked if any(".." in part.split(os.sep) or set(part) <= set("./:") or "\\" in part
                                             for part in map(str, name[:2]) if part != "None")]
        tally.add(not bad, f"datasets was asked for {bad}")
        left = [path.name for path in inside.iterdir()]
        tally.add(not left, f"left behind: {left}")
    finally:
        os.chdir(here)
    folder = place.copy(place.run / "adapter", "bad")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["../secret.txt"] = {"bytes": 11, "sha256": sha256(place.folder / "secret.txt")}
    manifest.pop("sha256", None)
    manifest["sha256"] = manifest_digest(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    place.refused(tally, "a manifest that names ../secret.txt", lambda: find_adapter(folder))
    return tally


def ids_that_lead_out(place: Place) -> Tally:
    """Ids and problems are data: no file is named after them."""
    tally = Tally("hostile: ids and texts that lead out")
    rows = [{"id": name, "problem": f"{name} What is 1 + {i}?", "solution": f"1 + {i} = {1 + i}. \\boxed{{{1 + i}}}",
             "answer": str(1 + i)} for i, name in enumerate(
                 ("../../evil", "/tmp/minimath-evil", "a/b/c", "..", "~", "$(touch evil)", "con", "x" * 300,
                  "\x1b[2J", ".lock"))]
    data = place.folder / "ids.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out, outside = place.folder / "ids" / "deep" / "run", place.folder / "ids"
    before = everything(place.folder)
    for words in (["sft", "steps=1", "max_len=64", f"out={out / 'sft'}", "sample_every=1", "eval_max_new_tokens=8"],
                  ["rlaif", "steps=1", "judge=heuristic", "prompts_per_step=2", "group_size=2", "sample_every=1",
                   "verifier=none", "max_new_tokens=8", "max_refill=0", f"out={out / 'rlaif'}"],
                  ["eval", f"out={out / 'eval'}", "max_new_tokens=8"]):
        lora = [] if words[0] == "eval" else ["lora_r=2"]
        status, said = command(*words, f"model={place.model}", f"data={data}", "device=cpu", *lora)
        tally.add(status == 0 and "\x1b" not in said, f"{words[0]}: {status}, {said[-300:]}")
    after = everything(place.folder)
    strange = [path for path in after if path not in before and not Path(path).is_relative_to(out)
               and Path(path) not in (outside, outside / "deep")]
    tally.add(not strange, f"made outside of the run folder: {strange}")
    tally.add(all(after[path] == content for path, content in before.items()), "something outside has changed")
    tally.add(not Path("/tmp/minimath-evil").exists(), "/tmp/minimath-evil is there")
    named = [path for path in out.rglob("*") if "evil" in path.name or path.name in ("con", "~")]
    tally.add(not named, f"named after an id: {named}")
    return tally


def links_in_a_run_folder(place: Place) -> Tally:
    """A link of the run folder that leads out of it is refused before anything is written; what is behind it stays."""
    tally = Tally("hostile: links that lead out of a run folder")
    for name in (".lock", "config.yaml", "environment.json", "metrics.jsonl", "samples.jsonl", "checkpoints", "adapter",
                 ".tmp-adapter", ".tmp-metrics.jsonl", "tensorboard"):
        for old in (True, False):
            outside = place.folder / "outside"
            shutil.rmtree(outside, ignore_errors=True)
            shutil.copytree(place.run, outside / "other")
            (outside / ".lock").write_text("precious")
            run_dir = place.copy(place.run, "linked") if old else place.folder / "linked"
            if not old:
                shutil.rmtree(run_dir, ignore_errors=True)
                run_dir.mkdir()
            link = run_dir / name
            shutil.rmtree(link) if link.is_dir() else link.unlink(missing_ok=True)
            target = outside / ".lock" if name == ".lock" else outside / "other" / name
            link.symlink_to(target if target.exists() else outside / "other" / "metrics.jsonl")
            before = everything(outside)
            with mock.patch("minimath.train.trainer.KEPT", 1):
                place.refused(tally, f"{name}, resume={old}", lambda run_dir=run_dir, old=old: place.train(
                    run_dir, steps=4, resume=old), says="link")
            tally.add(everything(outside) == before, f"{name}, resume={old}: what is behind the link changed")
    inside = place.copy(place.run, "linked")  # links within the folder are the user's own business
    (inside / "latest").symlink_to("checkpoints/step-000002")
    place.harmless(tally, "a link within", lambda: place.train(inside, steps=3, resume=True))
    tally.add((inside / "checkpoints" / "step-000003").is_dir(), "a link within the folder stopped the run")
    return tally


def links_among_checkpoints(place: Place) -> Tally:
    """Rotation deletes what is in the run folder; of a link the link."""
    tally = Tally("hostile: links among the checkpoints")
    names = ["step-000001", "step-000003", ".tmp-step-000003"]
    if place.full:
        names += ["step-000000", "step-000002", ".tmp-gone-step-000001", ".old-step-000001", ".old-step-000009",
                  "step-000002/optimizer.safetensors", "step-\u00b2", "step-9" + "0" * 200]
    for name in names:
        outside = place.folder / "outside"
        shutil.rmtree(outside, ignore_errors=True)
        shutil.copytree(place.run / "checkpoints" / "step-000002", outside / "folder")
        run_dir = place.copy(place.run, "linked")
        link = run_dir / "checkpoints" / name
        shutil.rmtree(link) if link.is_dir() else link.unlink(missing_ok=True)
        link.symlink_to(outside / "folder" / link.name if "/" in name else outside / "folder")
        before = everything(outside)
        with mock.patch("minimath.train.trainer.KEPT", 1):
            place.harmless(tally, name, lambda run_dir=run_dir: place.train(run_dir, steps=4, resume=True))
        tally.add(everything(outside) == before, f"{name}: what is behind the link changed")
        tally.add((run_dir / "checkpoints" / "step-000004").is_dir(), f"{name}: the run did not go on")
    here = place.folder / "mine"
    (here / ".tmp-mine").mkdir(parents=True)
    (here / ".tmp-mine" / "thesis.txt").write_text("precious")
    place.harmless(tally, "out= in a folder with hidden folders", lambda: place.train(here, steps=1))
    tally.add((here / ".tmp-mine" / "thesis.txt").exists(), "a hidden folder of the user's was deleted")
    return tally


# ---- two writers

def second_writer(place: Place) -> Tally:
    tally = Tally("hostile: a second writer")
    run_dir = place.copy(place.run, "two")
    before = None
    with lock_run(run_dir):
        before = everything(run_dir)
        for stage, cls in ((sft, SFTConfig), (rlaif, RLAIFConfig)):
            options = {"data": place.data, "out": str(run_dir), "resume": True, "lora_r": 2}
            cfg = make_config(cls, place.model, **options)
            place.refused(tally, f"{cls.__name__} while another writes", lambda stage=stage, cfg=cfg: stage(cfg),
                          says=f"in use by process {os.getpid()}")
        tally.add(everything(run_dir) == before, "the refused writer has changed the folder")
    place.harmless(tally, "after it has left", lambda: place.train(run_dir, steps=3, resume=True))
    tally.add((run_dir / "checkpoints" / "step-000003").is_dir(), "the folder was not taken over")
    return tally


def killed_writer(place: Place) -> Tally:
    """Real processes: refused while the first lives, taken over when it was killed, its children left alone or not."""
    tally = Tally("hostile: a second writer, after kill -9 of the first")
    for stage, words in (("sft", ["max_len=64", "batch_size=2"]),
                         ("rlaif", ["judge=heuristic", "prompts_per_step=2", "group_size=2", "max_new_tokens=8",
                                    "max_refill=0"])):
        out = place.folder / f"killed-{stage}"
        common = [stage, f"model={place.model}", f"data={place.data}", "lora_r=2", "device=cpu", "save_every=1",
                  f"out={out}", *words]
        first = start(*common, "steps=1000000")
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline and not list((out / "checkpoints").glob("step-*")):
            time.sleep(0.1)
        status, said = run_child(*common, "steps=2", "resume=true", timeout_s=300)
        tally.add(status == 2 and f"in use by process {first.pid}" in said, f"{stage}: {status}, {said[-300:]}")
        first.send_signal(signal.SIGKILL)
        first.communicate()
        steps = max(int(path.name[5:]) for path in list_checkpoints(out)) + 2
        status, said = run_child(*common, f"steps={steps}", "resume=true", timeout_s=300)
        tally.add(status == 0, f"{stage}, taken over: {status}, {said[-300:]}")
    return tally


CASES = (names_that_lead_out, ids_that_lead_out, links_in_a_run_folder, links_among_checkpoints, second_writer)
