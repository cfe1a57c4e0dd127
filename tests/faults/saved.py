"""What the topics about saving save: a tiny model's adapter and optimizer, set to values that a number decides, so that
a checkpoint can be told bitwise from every other without any training."""
import shutil
import warnings
from pathlib import Path

import torch
from tiny import write_tiny
from toy import adapter, load, metrics, same_tensors, without_times

from minimath.config.schema import SFTConfig
from minimath.core.checkpoint import adapter_tensors, list_checkpoints, load_checkpoint, save_checkpoint, verify
from minimath.core.state import optimizer_state
from minimath.train.optimizer import make_optimizer


def make_pair(folder: Path):
    """(model, optimizer): a tiny Llama with a LoRA adapter of rank 4, and AdamW over it."""
    model, _ = load(write_tiny(folder), SFTConfig, train=True, lora_r=4)
    return model, make_optimizer(model.parameters(), SFTConfig().optimizer)


def set_values(pair, number: int) -> dict[str, torch.Tensor]:
    """Fill adapter, optimizer and torch's generator with what `number` decides; a copy of it all."""
    model, optimizer = pair
    generator = torch.Generator().manual_seed(number)
    with torch.no_grad():
        for param in (p for p in model.parameters() if p.requires_grad):
            param.copy_(torch.randn(param.shape, generator=generator))
            moments = {name: torch.rand(param.shape, generator=generator) for name in ("exp_avg", "exp_avg_sq")}
            optimizer.state[param] = {"step": torch.tensor(float(number))} | moments
    torch.manual_seed(number)
    return values(pair)


def values(pair) -> dict[str, torch.Tensor]:
    own = {f"adapter.{name}": tensor.clone() for name, tensor in adapter_tensors(pair[0]).items()}
    return own | optimizer_state(pair[1])[0] | {"rng": torch.get_rng_state()}


def save(run: Path, step: int, pair, number: int | None = None) -> int:
    """Save the values of `number` (default: the step's) as the checkpoint of a step; two are kept."""
    number = step if number is None else number
    set_values(pair, number)
    save_checkpoint(run, step, model=pair[0], optimizer=pair[1], state={"number": number}, keep=2)
    return step


def load_number(run: Path, pair) -> tuple[int | None, list[str]]:
    """(number of the values that load, the warnings said on the way); None when there is no checkpoint, -1 when what
    loads is not bitwise what was saved. Raises as load_checkpoint does."""
    set_values(pair, 999)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        state = load_checkpoint(run, model=pair[0], optimizer=pair[1])
    loaded, number = values(pair), state and state["number"]
    sound = state is None or same_tensors(loaded, set_values(pair, number))
    return number if sound else -1, [str(w.message) for w in said]


def what_is_wrong(run: Path, pair, allowed: set[int]) -> str:
    """"" when the newest checkpoint is one of `allowed`, bitwise and without a warning, and no folder that passes for a
    checkpoint is damaged."""
    try:
        number, said = load_number(run, pair)
    except Exception as error:
        return f"loading raised {type(error).__name__}: {error}"
    if number not in allowed or said:
        return f"loaded {number} instead of {sorted(allowed)}" + "".join(f", saying: {words}" for words in said)
    damaged = {folder.name: problems for folder in list_checkpoints(run) if (problems := verify(folder))}
    return f"these pass for checkpoints: {damaged}" if damaged else ""


def next_save(run: Path, step: int, pair) -> str:
    """"" when a further save works, loads, and leaves two sound checkpoints and nothing else."""
    try:
        save(run, step, pair)
    except Exception as error:
        return f"the next save raised {type(error).__name__}: {error}"
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    if len(names) != 2 or not all(name.startswith("step-") for name in names):
        return f"the next save left {names}"
    return what_is_wrong(run, pair, {step})


def unlike(run: Path, whole: Path) -> str:
    """What of a finished run is not bitwise that of one that nothing stopped, "" for nothing."""
    if not same_tensors(adapter(run), adapter(whole)):
        return " another adapter than without the fault"
    return "" if without_times(metrics(run)) == without_times(metrics(whole)) else " other metrics than without it"


def fresh(template: Path, run: Path) -> Path:
    """`run` as a copy of a run folder, whatever was there."""
    shutil.rmtree(run, ignore_errors=True)
    return Path(shutil.copytree(template, run))
