"""PiSSA and OLoRA: adapters that begin at the principal part of the weights, over a base that stays as it is.

peft takes the initial product B0 A0 off the base weights. Then the model without its adapter is not the base, which
reference, self-judge, drift and export all stand on, and a saved adapter fits no base but that one. Here the product is
taken off by the adapter itself: W + s (B A - B0 A0), as one LoRA of twice the rank whose second half does not train.
peft saves the same form (path_initial_model_for_weight_conversion). PiSSA: arXiv 2404.02948; OLoRA: arXiv 2406.01775.
"""
import re

import torch
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight

PRINCIPAL = re.compile(r"pissa(_niter_(\d+))?|olora")
CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # initialisations of peft


@torch.no_grad()
def begin_at_principal(model, init: str, name: str = "default") -> None:
    """Set the factors of an adapter of rank 2 r by `init`; its product is 0."""
    for module in model.modules():
        if isinstance(module, LoraLayer) and name in module.lora_A:
            weight = dequantize_module_weight(module.get_base_layer()).float()
            a, b = module.lora_A[name].weight, module.lora_B[name].weight  # (2 r, D_in), (D_out, 2 r)
            rank, scale = a.shape[0] // 2, module.scaling[name]
            left, right = factors(weight.T if module.fan_in_fan_out else weight, init, rank, scale)
            a.zero_(), b.zero_()
            for start, sign in ((0, 1), (rank, -1)):
                a[start:start + len(right)], b[:, start:start + len(right)] = right, sign * left
            a.register_hook(lambda grad, rank=rank: _first(grad, 0, rank))
            b.register_hook(lambda grad, rank=rank: _first(grad, 1, rank))


def factors(weight: torch.Tensor, init: str, rank: int, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the factors (D_out, r) and (r, D_in) that peft begins with."""
    rank = min(rank, *weight.shape)
    if init == "olora":
        q, r = torch.linalg.qr(weight)
        return q[:, :rank], r[:rank]
    if steps := PRINCIPAL.fullmatch(init)[2]:
        u, s, v = torch.svd_lowrank(weight, rank, niter=int(steps))
        vh = v.T
    else:
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    root = (s[:rank] / scale).sqrt()
    return u[:, :rank] * root, root[:, None] * vh[:rank]


def _first(grad: torch.Tensor, dim: int, rank: int) -> torch.Tensor:
    """Keep the gradient of the first half."""
    grad = grad.clone()
    grad.narrow(dim, rank, rank).zero_()
    return grad
