"""What options make of a model: 4-bit weights, compiled layers, shards, adapters of the principal part.

shard=true (FSDP2), for models that no single card holds: each process keeps 1 / world of every decoder layer's frozen
weights, and a forward or backward gathers one layer at a time. Embeddings, head and adapter stay whole: a step is the
same as without. A forward is work of all processes: each must do as many, with blank ones where it has less to do.

PiSSA (arXiv 2404.02948) and OLoRA (2406.01775): peft takes the initial product B0 A0 off the base, which reference,
self-judge, drift and export stand on. Here the adapter itself takes it off: W + s (B A - B0 A0), one LoRA of twice the
rank whose second half does not train, a form that peft saves too (path_initial_model_for_weight_conversion). So it is
in the run that makes it, resumed too. For a run that begins with it by adapter=, it is a plain LoRA of that rank, as it
is for peft: both halves train, and with A and B near A0 and B0 a step moves W about twice as far."""
import functools
import re
from collections.abc import Iterator

import torch
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from transformers import BitsAndBytesConfig

from minimath.core import dist
from minimath.core.errors import UserError
from minimath.data.chat import IGNORE

PRINCIPAL = re.compile(r"pissa(_niter_(\d+))?|olora")
PLAIN = {"default": True, "true": True, "false": False, "gaussian": "gaussian", "orthogonal": "orthogonal"}
CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # initialisations of peft


def nf4_config(dtype: torch.dtype) -> BitsAndBytesConfig:
    """Configure NF4 weights with quantised scales; UserError without bitsandbytes."""
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        raise UserError("quant=nf4 needs bitsandbytes: pip install bitsandbytes, or use quant=none") from None
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype,
                              bnb_4bit_use_double_quant=True)


def compile_layers(base, backend: str = "inductor") -> None:
    """Compile the decoder layers of `base` for passes with gradients.

    Others run the layers as they are: compiled code would not see what decoding puts in place of their linear layers.
    Raises UserError, in a pass too: compilation begins there."""
    import torch._dynamo  # a second, for this option alone
    import torch._functorch.config
    if not (layers := getattr(base.base_model, "layers", None)):
        raise UserError(f"compile=true: {type(base).__name__} has no list of decoder layers; use compile=false")
    if any(getattr(module, "lora_variant", None) for module in base.modules()):  # 14 pieces a layer
        raise UserError("compile=true: torch.compile breaks off in adapters with dora=true; use one of the two")
    torch._dynamo.config.specialize_float = True  # a norm's epsilon never changes; as a variable it is compiled twice
    torch._dynamo.config.recompile_limit = 64  # of all layers: kinds, with and without mask, one row or several
    if hasattr(torch._functorch.config, "force_non_lazy_backward_lowering"):  # so that it fails in forward, if it does
        torch._functorch.config.force_non_lazy_backward_lowering = True

    def switch(plain, compiled):
        def forward(*args, **kwargs):
            if not torch.is_grad_enabled():
                return plain(*args, **kwargs)
            try:
                return compiled(*args, **kwargs)
            except torch._dynamo.exc.TorchDynamoException as error:
                why = " ".join(str(error).split("\n\n")[0].split())[:200]
                raise UserError(f"compile=true: torch.compile fails here ({why}); it needs a C++ compiler, on a GPU "
                                "Triton as well. Use compile=false") from None
        return forward

    for layer in layers:
        layer.forward = switch(layer.forward, torch.compile(layer.forward, dynamic=True, backend=backend))


def keep_4bit_weights_trainable(model) -> None:
    """Stop bitsandbytes from repacking 4-bit weights.

    On CPUs with avx512_bf16 one no-grad forward in eval mode does so for good, and LoRA gradients are wrong then."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


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
    one = torch.zeros((1, 1), dtype=torch.long)
    blank = {"input_ids": one, "position_ids": one, "attention_mask": torch.ones_like(one),
             "target": torch.full((1,), IGNORE)}
    for number in range(max(dist.of_all(len(batches)))):
        yield batches[number] if number < len(batches) else ([], blank)


def rank_of(options) -> int:
    """Give the rank of a new adapter, which PiSSA and OLoRA double. Raises UserError."""
    if not (principal := PRINCIPAL.fullmatch(options.lora_init)) and options.lora_init not in PLAIN:
        raise UserError(f"lora_init={options.lora_init!r}: use default, gaussian, orthogonal, pissa, pissa_niter_4 "
                        "or olora")
    return options.lora_r * (2 if principal else 1)


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
            for dim, factor in enumerate((a, b)):
                factor.register_hook(functools.partial(_first, dim, rank))


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


def _first(dim: int, rank: int, grad: torch.Tensor) -> torch.Tensor:
    """Keep the gradient of the first half."""
    grad = grad.clone()
    grad.narrow(dim, rank, rank).zero_()
    return grad
