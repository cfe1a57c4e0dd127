"""What this machine is, what will be used on it and why, and whether it works.

    minimath doctor [device=...] [dtype=...]

A self test of seconds: every kernel's loss and gradient against float64. Exit status 1 when something that would be
used is missing or does not work."""
import contextlib
import importlib.metadata
import os
import platform
from typing import Literal, NamedTuple

import torch
from packaging.requirements import Requirement

from minimath.config.load import load_config
from minimath.config.options import Stage
from minimath.config.schema import ModelOptions
from minimath.kernels import linear_cross_entropy, linear_logp, linear_token_loss, reference
from minimath.kernels.common import runs_triton
from minimath.models.load import pick_device, pick_dtype
from minimath.models.memory import free_bytes

# a machine may lack these: an option asks for them, or something slower stands in
USES = {"triton": "the kernels on CUDA and ROCm", "bitsandbytes": "quant=nf4 and 8-bit optimizers",
        "datasets": "hub data sets and parquet", "vllm": "rollout=vllm",
        "flash-attn": "attn=flash_attention_2", "openai": "judge=openai", "gguf": "the demo's model",
        "wandb": "trackers=wandb", "tensorboard": "trackers=tensorboard", "trackio": "trackers=trackio"}


class DoctorConfig(Stage):
    """What would be used."""
    model: ModelOptions


class Finding(NamedTuple):
    """One line of the report; - stands for what only an option asks for."""
    what: str
    state: Literal["ok", "note", "FAIL", "-"]
    words: str


def doctor(words: list[str]) -> int:
    """Print the report; returns the exit status. Raises UserError."""
    model = load_config(DoctorConfig, None, words, section="doctor").model
    device = pick_device(model.device)
    dtype, why = pick_dtype(model.dtype, device)
    findings = [*machine_findings(device, dtype, why), *package_findings(),
                *(tested(name, device, dtype) for name in KERNELS)]
    for f in findings:
        print(f"{f.what:<28} {f.state:<5} {f.words}")
    failed = [f.what for f in findings if f.state == "FAIL"]
    print(f"does not work: {', '.join(failed)}" if failed else "all that would be used works")
    return 1 if failed else 0


def machine_findings(device: torch.device, dtype: torch.dtype, why: str) -> list[Finding]:
    """Describe system, device, dtype, kernels and memory, with the reasons for the choices."""
    free = free_bytes(device)
    kernels = "Triton" if runs_triton(torch.empty(0, device=device)) else \
        "chunked torch: Triton serves CUDA and ROCm" if device.type != "cuda" else \
        "chunked torch: triton is not installed (pip install triton), which is slower"
    windows, wsl = platform.system() == "Windows", "microsoft" in platform.release().lower()
    more = ": not tried; install it in WSL instead (wsl --install), which reaches the card" * windows + " (WSL)" * wsl
    system = f"{platform.system()} {platform.machine()}, Python {platform.python_version()}{more}"
    return [Finding("system", "note" if windows else "ok", system),
            Finding("device", "note" if device.type == "cpu" else "ok", device_words(device)),
            Finding("dtype", "ok", f"{str(dtype).removeprefix('torch.')}: {why}" +
                    (", with a loss scale" if dtype == torch.float16 else "")),
            Finding("kernels", "ok", kernels),
            Finding("memory", "ok", f"{free / 2**30:.1f} GiB free") if free else
            Finding("memory", "note", f"how much of {device.type} is free is not known: set max_num_seqs=")]


def device_words(device: torch.device) -> str:
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        chip = card.gcnArchName if torch.version.hip else f"sm_{card.major}{card.minor}"
        more = f"; {torch.cuda.device_count()} cards, one is used" if torch.cuda.device_count() > 1 else ""
        return f"{card.name} ({chip}), {card.total_memory / 2**30:.1f} GiB{more}"
    if device.type == "mps":
        return "Apple GPU (mps): plain torch kernels, no NF4"
    why = "torch sees no GPU" if torch.version.cuda or torch.version.hip else "this torch is built for the CPU only"
    return f"CPU, {torch.get_num_threads()} of {os.cpu_count()} threads: {why}; fine for the demo and small models"


def package_findings() -> list[Finding]:
    """Compare versions with the ranges of the installed minimath."""
    lines, out = importlib.metadata.requires("minimath") if version_of("minimath") else [], []
    needs = {need.name: need for need in map(Requirement, lines)
             if not need.marker or need.marker.evaluate({"extra": ""})}
    for name in dict.fromkeys([*needs, *USES]):
        version, need, use = version_of(name), needs.get(name), USES.get(name)
        if not version:
            how = (f": pip install '{name}{need.specifier}'" if need else "") + (f", for {use}" if use else "")
            out.append(Finding(name, "-" if not need else "note" if use else "FAIL", f"not installed{how}"))
        elif need and not need.specifier.contains(version.partition("+")[0], prereleases=True):
            out.append(Finding(name, "note", f"{version} is outside {need.specifier}, which is what was tried"))
        else:
            out.append(Finding(name, "ok", version))
    return out


def version_of(name: str) -> str | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(name)
    return None


KERNELS = {
    "linear_logp": lambda x, weight, target: -linear_logp(x, weight, target).mean(),
    "linear_token_loss": lambda x, weight, target: linear_token_loss(
        x, weight, target, lambda stats, rows: -stats.logp / len(target))[0],
    "linear_cross_entropy": linear_cross_entropy,
}


def kernel_test(kernel, device: torch.device, dtype: torch.dtype) -> str:
    """Compare loss and gradient of the mean negative log-prob with float64.

    The bound is 4 times the error that rounding the exact gradient to dtype makes, and at least 1e-5. Raises
    ArithmeticError."""
    generator = torch.Generator().manual_seed(0)
    n, d, v = 67, 96, 1009  # odd on purpose
    x = torch.randn(n, d, generator=generator).to(device, dtype).requires_grad_()
    head = (torch.randn(v, d, generator=generator) / d ** 0.5).to(device, dtype)
    target = torch.randint(0, v, (n,), generator=generator).to(device)
    loss = kernel(x, head, target)
    exact_x = x.detach().cpu().double().requires_grad_()  # the rounded inputs: their rounding is not the kernel's fault
    exact = -reference.linear_logp(exact_x, head.cpu().double(), target.cpu()).mean()
    [got], [want] = torch.autograd.grad(loss, x), torch.autograd.grad(exact, exact_x)
    off = float((got.cpu().double() - want).norm() / want.norm())
    bound = max(1e-5, 4 * float((want.to(dtype).double() - want).norm() / want.norm()))
    loss_off = abs(loss.item() - exact.item()) / abs(exact.item())
    if off > bound or loss_off > max(1e-5, torch.finfo(dtype).eps):
        raise ArithmeticError(f"gradient off by {off:.1e} (bound {bound:.1e}), loss by {loss_off:.1e}")
    return f"{'Triton' if runs_triton(x) else 'torch'}, {str(dtype).removeprefix('torch.')}: gradient within {off:.1e}"


def tested(name: str, device: torch.device, dtype: torch.dtype) -> Finding:
    try:
        return Finding(f"test: {name}", "ok", kernel_test(KERNELS[name], device, dtype))
    except Exception as error:  # whatever it is, the report goes on
        return Finding(f"test: {name}", "FAIL", f"{type(error).__name__}: {error}".partition("\n")[0][:200])
