"""Truncated and flipped files of checkpoints and of the final adapter: each is refused in words that name it, and the
checkpoint before is used; where none is whole, or an adapter is meant by name, nothing is loaded."""
import os
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path

from harness import Tally, heard
from saved import fresh, load_number, make_pair, save, unlike
from toy import make_config, write_problems

from minimath.config.schema import EvalConfig, SFTConfig
from minimath.core.checkpoint import list_checkpoints, save_adapter, verify
from minimath.core.errors import UserError
from minimath.core.run_folder import find_adapter
from minimath.eval.evaluate import evaluate
from minimath.train.sft import sft


def run(full: bool, folder: Path) -> list[Tally]:
    pair, here = make_pair(folder / "tiny"), folder / "run"
    for step in (1, 2):
        save(here, step, pair)
    save_adapter(pair[0], here / "adapter")
    newest = list_checkpoints(here)[0]
    number = 50 if full else 5
    tallies = [damaged_file(path, number, partial(not_the_one_before, here, pair, path))
               for path in sorted(newest.iterdir())]
    tallies += [damaged_file(path, number, partial(not_refused, path)) for path in sorted((here / "adapter").iterdir())]
    return [*tallies, all_damaged(full, folder, here), kept_after(folder, here, pair), runs_go_on(full, folder)]


def damages(size: int, number: int, seed: str):
    """Yield (words, change of the file's bytes): its truncations to 0, half and one byte less, its bytes all zero, as
    a power cut can leave them, and seeded truncations (one in five) and bit flips; `number` in all."""
    rng = random.Random(seed)
    for words, length in (("cut to 0", 0), ("cut to half", size // 2), ("cut by 1", size - 1)):
        yield words, lambda data, length=length: data[:length]
    yield "zeroed", lambda data: bytes(len(data))
    for i in range(number - 4):
        if i % 5 == 4:
            length = rng.randrange(size)
            yield f"cut to {length}", lambda data, length=length: data[:length]
        else:
            place, bit = rng.randrange(size), rng.randrange(8)
            yield f"bit {bit} of byte {place}", lambda data, place=place, bit=bit: flipped(data, place, bit)


def flipped(data: bytes, place: int, bit: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1:]


def damaged_file(path: Path, number: int, check: Callable[[], str]) -> Tally:
    """check() -> "" or what is wrong, at each damage of one file; the file is whole again afterwards."""
    what = "adapter/" if path.parent.name == "adapter" else ""
    tally, whole = Tally(f"corrupt: {what}{path.name}"), path.read_bytes()
    for words, change in damages(len(whole), number, path.name):
        path.write_bytes(change(whole))
        wrong = check()
        tally.add(not wrong, f"{words}: {wrong}")
    path.write_bytes(whole)
    return tally


def not_the_one_before(here: Path, pair, path: Path) -> str:
    """"" when step 1 loads, with a warning that names the damaged file of step 2."""
    try:
        number, said = load_number(here, pair)
    except Exception as error:
        return f"loading raised {type(error).__name__}: {error}"
    named = len(said) == 1 and f"{path.parent} is damaged ({path.name}: " in said[0]
    return "" if number == 1 and named else f"loaded {number}, saying {said}"


def not_refused(path: Path) -> str:
    """"" when the adapter is refused in words that name the file, by its folder's name and by that of the run."""
    for meant in (path.parent, path.parent.parent):
        try:
            return f"{find_adapter(meant)} was taken"
        except UserError as error:
            if f"the adapter in {path.parent} is damaged: {path.name}: " not in str(error):
                return str(error)
    return ""


def flip(path: Path, seed: int = 0) -> None:
    data, rng = path.read_bytes(), random.Random(seed)
    path.write_bytes(flipped(data, rng.randrange(len(data)), rng.randrange(8)))


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def all_damaged(full: bool, folder: Path, template: Path) -> Tally:
    """Every checkpoint has one flipped file: resume=true raises, and changes neither them nor the metrics. A flipped
    adapter: the evaluation and the training that were to begin with it raise."""
    tally = Tally("corrupt: nothing whole is left")
    names = sorted(path.name for path in list_checkpoints(template)[0].iterdir())
    make = partial(make_config, model=str(folder / "tiny"), data=write_problems(folder / "problems.jsonl"))
    for name in names if full else names[1:2]:
        here = fresh(template, folder / "damaged")
        (here / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
        for seed, checkpoint in enumerate(list_checkpoints(here)):
            flip(checkpoint / name, seed)
        flip(here / "adapter" / "adapter_model.safetensors")
        before = files(here)
        for loop, cfg, words in (
                (sft, make(SFTConfig, out=str(here), resume=True, lora_r=4), "none of the 2 checkpoints"),
                (sft, make(SFTConfig, out=str(folder / "next"), adapter=str(here)), "is damaged"),
                (evaluate, make(EvalConfig, out=str(folder / "eval"), adapter=str(here)), "is damaged")):
            said, error = heard(partial(loop, cfg), Exception)
            plain = isinstance(error, UserError) and words in str(error) and str(here) in str(error)
            wrong = "" if plain else f"{error!r}, it said {said}"
            changed = [file for file, data in before.items() if files(here).get(file) != data]
            tally.add(not wrong and not changed, f"{name}, {loop.__name__}: {wrong} {changed}")
    return tally


def kept_after(folder: Path, template: Path, pair) -> Tally:
    """Steps saved after the return from a damaged step 5 to step 1: it does not count among those kept."""
    tally = Tally("corrupt: two sound checkpoints are kept after it")
    here = fresh(template, folder / "kept")
    os.replace(here / "checkpoints" / "step-000002", here / "checkpoints" / "step-000005")
    flip(here / "checkpoints" / "step-000005" / "optimizer.safetensors")
    for step in (2, 3):
        save(here, step, pair)
        sound = [folder.name for folder in list_checkpoints(here) if not verify(folder)]
        tally.add(sound == [f"step-{step:06d}", f"step-{step - 1:06d}"], f"after step {step}: {sound}")
    return tally


def runs_go_on(full: bool, folder: Path) -> Tally:
    """A real run whose newest checkpoint is damaged goes on from the one before, to bitwise the same end as without."""
    tally = Tally("corrupt: a run goes on from the checkpoint before")
    make = partial(make_config, SFTConfig, str(folder / "tiny"), data=str(folder / "problems.jsonl"), batch_size=2,
                   lora_r=4, lora_dropout=0.1, lr=1e-2, lr_schedule="constant", save_every=2, resume=True)
    part, whole = folder / "part", folder / "whole"
    heard(partial(sft, make(out=str(part), steps=4)))
    heard(partial(sft, make(out=str(fresh(part, whole)), steps=6)))
    names = sorted(path.name for path in list_checkpoints(part)[0].iterdir())
    for seed, name in enumerate(names if full else names[-1:]):
        here = fresh(part, folder / "resumed")
        flip(list_checkpoints(here)[0] / name, seed)
        said, _ = heard(partial(sft, make(out=str(here), steps=6)))
        wrong = unlike(here, whole)
        tally.add(not wrong and "resumed after step 2" in said, f"{name}:{wrong}; it said {said}")
    return tally
