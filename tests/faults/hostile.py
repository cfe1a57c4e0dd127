"""Hostile input: folders with pickles and code, recipes with commands, keys that must not be kept, names and links that
lead out of a folder, a second writer.

Whatever would run code here makes a file, the canary; a case is lost when that file is there, when what was behind a
link or a ".." changed, or when the refusal is not a UserError.
"""
import json
import pickle
import shutil
from pathlib import Path

import hostile_code
import hostile_keys
import hostile_paths
import torch
from harness import Tally
from hostile_place import FORMS, Place, bomb, resign
from toy import load

from minimath.config.schema import DataOptions, SFTConfig
from minimath.core.checkpoint import list_checkpoints, load_checkpoint
from minimath.data.examples import load_examples
from minimath.judges.cache import ReplyCache
from minimath.train.optimizer import make_optimizer


def run(full: bool, folder: Path) -> list[Tally]:
    place = Place(folder, full)
    cases = [bombs_are_live, pickled_models, pickled_adapters, pickled_checkpoints, pickled_data,
             *hostile_code.CASES, *hostile_keys.CASES, *hostile_paths.CASES]
    return [case(place) for case in cases] + ([hostile_paths.killed_writer(place)] if full else [])


# ---- pickles

def bombs_are_live(place: Place) -> Tally:
    """Else every other case would pass for nothing."""
    tally = Tally("hostile: the bombs are live (by torch.load without weights_only)")
    for form in FORMS:
        path = place.folder / "live.bin"
        path.write_bytes(bomb(place, form))
        if form == "pickle":
            pickle.loads(path.read_bytes())
        else:
            torch.load(path, weights_only=False)
        tally.add(place.canary.exists(), form)
        place.canary.rmdir()
    return tally


def pickled_models(place: Place) -> Tally:
    tally = Tally("hostile: pickles in a model folder")
    for form in FORMS:
        content = bomb(place, form)
        for name in ("pytorch_model.bin", "model.safetensors", "consolidated.pth", "model.ckpt"):
            folder = place.copy(place.model, "bad")
            (folder / "model.safetensors").unlink()
            (folder / name).write_bytes(content)
            place.refused(tally, f"{form} as {name}", lambda folder=folder: load(folder), says="safetensors")
            if name != "model.safetensors":  # beside the weights: not looked at
                shutil.copy(Path(place.model) / "model.safetensors", folder)
                place.harmless(tally, f"{form} as {name} beside weights", lambda folder=folder: load(folder))
        for index, shard in (("pytorch_model.bin.index.json", "pytorch_model-00001.bin"),
                             ("model.safetensors.index.json", "shard.bin"),
                             ("model.safetensors.index.json", "../elsewhere.bin")):
            folder = place.copy(place.model, "bad")
            (folder / "model.safetensors").unlink()
            names = ["model.embed_tokens.weight", "model.norm.weight"]
            (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, shard)}))
            (folder / shard).write_bytes(content)
            place.refused(tally, f"{form} as {shard} of {index}", lambda folder=folder: load(folder))
        for name in ("tokenizer.json", "tokenizer_config.json", "config.json", "generation_config.json", "vocab.pkl"):
            folder = place.copy(place.model, "bad")
            (folder / name).write_bytes(content)
            place.harmless(tally, f"{form} as {name}", lambda folder=folder: load(folder),)
    return tally


def pickled_adapters(place: Place) -> Tally:
    tally = Tally("hostile: pickles in an adapter folder")
    for form in FORMS:
        content = bomb(place, form)
        for name in ("adapter_model.bin", "adapter_model.safetensors"):
            for manifest in (True, False):
                folder = place.copy(place.run / "adapter", "bad")
                (folder / "adapter_model.safetensors").unlink()
                (folder / name).write_bytes(content)
                if not manifest:
                    (folder / "manifest.json").unlink()
                words = f"{form} as {name}" + ", with a manifest" * manifest
                place.refused(tally, words, lambda folder=folder: load(
                    place.model, adapter=str(folder)), says="adapter")
                place.refused(tally, words + ", trained", lambda folder=folder: load(
                    place.model, SFTConfig, train=True, adapter=str(folder)))
        folder = place.copy(place.run / "adapter", "bad")
        for name in ("adapter_model.bin", "adapter_model.pt", "training_args.bin", "optimizer.pt"):
            (folder / name).write_bytes(content)
        place.harmless(tally, f"{form} beside an adapter", lambda folder=folder: load(place.model, adapter=str(folder)))
        shutil.copy(folder / "adapter_model.bin", folder / "adapter_model.safetensors")
        resign(folder)
        place.refused(tally, f"{form} with a right hash", lambda folder=folder: load(place.model, adapter=str(folder)))
        model = place.copy(place.model, "bad")  # transformers loads an adapter that lies in a model folder
        shutil.copy(place.run / "adapter" / "adapter_config.json", model)
        (model / "adapter_model.bin").write_bytes(content)
        place.harmless(tally, f"{form} as an adapter in a model folder", lambda model=model: load(model))
    return tally


def pickled_checkpoints(place: Place) -> Tally:
    tally = Tally("hostile: pickles in a run folder")
    model, _ = load(place.model, SFTConfig, train=True, lora_r=2)
    optimizer = make_optimizer(model.parameters(), SFTConfig().optimizer)
    for form in FORMS:
        content = bomb(place, form)
        folder = place.copy(place.run, "bad")
        for where in (folder, *list_checkpoints(folder)):
            for name in ("optimizer.pt", "rng.pkl", "rng_state.pth", "training_args.bin", "scheduler.pt", "state.pkl",
                         "adapter_model.bin", "pytorch_model.bin", "trainer_state.json"):
                (where / name).write_bytes(content)
        place.harmless(tally, f"{form} beside checkpoints", lambda folder=folder: place.train(
            folder, steps=3, resume=True))
        for name in ("adapter_model.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json", "rng.json",
                     "optimizer.json", "manifest.json", "adapter_config.json"):
            for signed in (False, True) if name != "manifest.json" else (False,):
                folder = place.copy(place.run, "bad")
                for checkpoint in list_checkpoints(folder):
                    (checkpoint / name).write_bytes(content)
                    if signed:
                        resign(checkpoint)
                words = f"{form} as {name} of all checkpoints" + ", with a right hash" * signed
                place.harmless(tally, words, lambda folder=folder: load_checkpoint(
                    folder, model=model, optimizer=optimizer),
                               refuse=name != "adapter_config.json" or not signed)  # that one is not read here
    return tally


def pickled_data(place: Place) -> Tally:
    tally = Tally("hostile: pickles as data and as judge cache")
    for form in FORMS:
        content = bomb(place, form)
        for suffix in (".pkl", ".pt", ".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".npy"):
            path = place.folder / f"data{suffix}"
            path.write_bytes(content)
            options = DataOptions(source=str(path))
            place.refused(tally, f"{form} as {path.name}", lambda options=options: load_examples(options))
        cache = place.folder / "cache"
        cache.mkdir(exist_ok=True)
        (cache / "replies.sqlite").write_bytes(content)
        place.harmless(tally, f"{form} as replies.sqlite", lambda cache=cache: ReplyCache(cache).close())
    return tally
