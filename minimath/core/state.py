"""What a run needs besides its weights to go on bitwise, as tensors and numbers that safetensors and json can hold."""
import hashlib
import random

import numpy as np
import torch

from minimath.core.errors import UserError


class Kept:
    """Has a state for the checkpoints: the attributes that `kept` names."""
    kept: tuple[str, ...]

    def state_dict(self) -> dict:
        return {name: getattr(self, name) for name in self.kept}

    def load_state_dict(self, state: dict) -> None:
        vars(self).update(state)


def on_cpu(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copy for safetensors, which takes no two that share memory, as the code tables of bitsandbytes do."""
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}


def optimizer_state(optimizer) -> tuple[dict[str, torch.Tensor], dict]:
    """Take tensors "<param index>.<name>" on the CPU, and the class with its numbers."""
    state = {f"{index}.{name}": value for index, param in enumerate(optimizer_params(optimizer))
             for name, value in optimizer.state.get(param, {}).items()}
    tensors = {name: value for name, value in state.items() if torch.is_tensor(value)}
    numbers = {name: value for name, value in state.items() if name not in tensors}
    return on_cpu(tensors), {"class": type(optimizer).__name__, "numbers": numbers}


def optimizer_params(optimizer) -> list[torch.nn.Parameter]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def restore_optimizer(optimizer, tensors: dict[str, torch.Tensor], meta: dict, *, where) -> None:
    """Invert optimizer_state; rate, betas and decay stay those of `optimizer`.

    Raises UserError, naming `where`, when the state belongs to another optimizer; nothing is changed then."""
    params = optimizer_params(optimizer)
    state = {}
    for key, value in {**meta["numbers"], **tensors}.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    if meta["class"] != type(optimizer).__name__ or any(index >= len(params) for index in state):
        raise UserError(f"{where} was saved by {meta['class']}, not by {type(optimizer).__name__} over {len(params)} "
                        "tensors; use the optimizer option it was made with, or a new out=")
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    if getattr(optimizer, "is_paged", False):  # bitsandbytes loads into plain tensors: back into paged ones
        for param in params:
            state = optimizer.state[param]
            for name in {"state1", "state2"} & state.keys():
                buffer = optimizer.get_state_buffer(param, dtype=state[name].dtype)
                state[name] = buffer.copy_(state[name])


def stream_seed(*parts: int) -> int:
    """Make a 63-bit seed of several integers, the same in every process."""
    digest = hashlib.sha256(",".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def seed_rng(seed: int) -> None:
    """Seed all generators: a user's verifier or reward may draw from any."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def rng_state() -> tuple[dict[str, torch.Tensor], dict]:
    """Take the states of all generators: tensors of torch, numbers of the others."""
    cards = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    tensors = {"cpu": torch.get_rng_state()} | {f"cuda:{i}": state for i, state in enumerate(cards)}
    name, keys, *rest = np.random.get_state()
    return tensors, {"python": random.getstate(), "numpy": [name, keys.tolist(), *rest]}


def restore_rng(tensors: dict[str, torch.Tensor], numbers: dict) -> None:
    torch.set_rng_state(tensors["cpu"])
    for name, state in tensors.items():
        if name.startswith("cuda:") and int(name[5:]) < torch.cuda.device_count():
            torch.cuda.set_rng_state(state, int(name[5:]))
    version, words, gauss = numbers["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, *rest = numbers["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
