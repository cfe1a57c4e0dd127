"""shard=true: the frozen base split over the processes (FSDP2), for models that no single card holds.

Each process keeps 1 / world of every decoder layer's weights; a forward, and a backward, gathers one layer at a time.
Embeddings, the LM head and the adapter stay whole: a step is the same as without. A forward is work of all processes
together: each must do as many as the others, with blank ones where it has less to do."""
from collections.abc import Iterator

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from minimath.core import dist
from minimath.core.errors import UserError
from minimath.data.chat import IGNORE


def shard(model, base, device: torch.device) -> None:
    """Split the decoder layers of `base`, on the CPU; the rest to `device`. Raises UserError."""
    if dist.world() < 2:
        raise UserError("shard=true splits a model over several processes, and this is one: start them with accelerate "
                        "launch or torchrun, or leave shard away")
    kinds = set(getattr(base, "_no_split_modules", None) or ())
    layers = [module for module in base.modules() if type(module).__name__ in kinds]
    if not layers:
        raise UserError(f"{type(base).__name__} does not say which of its layers can be split: leave shard away")
    trained = {p for p in model.parameters() if p.requires_grad}
    mesh = init_device_mesh(device.type, (dist.world(),))
    for layer in layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=trained)
    model.to(device)


def is_sharded(model) -> bool:
    return dist.world() > 1 and any(isinstance(module, FSDPModule) for module in model.modules())


def in_step(model, batches: Iterator[tuple[list[int], dict]]) -> Iterator[tuple[list[int], dict]]:
    """Yield (indices, batch) of batches; of a sharded model as many in every process.

    Blank ones stand behind them: one token, of which nothing is trained; their loss and gradient are 0."""
    if not is_sharded(model):
        yield from batches
        return
    batches = list(batches)
    one = torch.zeros((1, 1), dtype=torch.long, device=model.device)
    blank = {"input_ids": one, "position_ids": one, "attention_mask": torch.ones_like(one),
             "target": torch.full((1,), IGNORE, device=model.device)}
    for number in range(int(dist.all_reduce_max(len(batches)))):
        yield batches[number] if number < len(batches) else ([], blank)
