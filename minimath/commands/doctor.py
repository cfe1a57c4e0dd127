"""What this machine is, what minimath will use on it and why, and whether that works: minimath doctor [device=...]

A self test of seconds: every kernel's loss and gradient against float64, NF4 and the 8-bit optimiser of bitsandbytes,
the answer checker's child process, the cache folder. Exit status 1 when something that would be used does not work.
"""
import importlib.metadata
import os
import platform
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from minimath.grading.answer import AnswerChecker
from minimath.config.load import load_config
from minimath.config.schema import ModelConfig
from minimath.judges.cache import cache_folder
from minimath.kernels import linear_cross_entropy, linear_logp, linear_token_loss, reference
from minimath.kernels.common import runs_triton
from minimath.models.memory import free_bytes
from minimath.models.load import pick_device, pick_dtype

PACKAGES = ("torch", "triton", "numpy", "transformers", "peft", "bitsandbytes", "datasets", "accelerate", "safetensors",
            "math-verify")
# a machine may lack these: an option asks for them, or something slower stands in
FOR = {"triton": "the kernels on CUDA and ROCm", "bitsandbytes": "quant=nf4 and 8-bit optimisers",
       "datasets": "hub data sets and parquet"}
OPTIONAL = {"liger-kernel": "liger=true", "flash-attn": "attn=flash_attention_2", "vllm": "rollout=vllm",
            "gguf": "the demo's model", "wandb": "trackers=wandb", "tensorboard": "trackers=tensorboard",
            "trackio": "trackers=trackio"}
ENOUGH_DISK = 2 << 30


@dataclass
class Finding:
    """One line of the report. state: ok, note (works, with a reservation) or FAIL."""
    what: str
    state: str
    words: str


def doctor(words: list[str]) -> int:
    """The command. Prints the report; returns the exit status. Raises UserError for words that are no options."""
    cfg = load_config(ModelConfig, None, words, section="model")
    findings = [*machine_findings(cfg), *package_findings()]
    device = pick_device(cfg.model.device)
    dtype, _ = pick_dtype(cfg.model.dtype, device)
    findings += [tested(*check) for check in self_tests(device, dtype)]
    print_report(findings)
    failed = [f.what for f in findings if f.state == "FAIL"]
    print(f"does not work: {', '.join(failed)}" if failed else "all that would be used works")
    return 1 if failed else 0


def print_report(findings: list[Finding]) -> None:
    from rich.console import Console
    from rich.table import Table
    colours = {"ok": "green", "note": "yellow", "FAIL": "bold red"}
    table = Table(show_header=False, box=None, pad_edge=False)
    for f in findings:
        table.add_row(f.what, f"[{colours[f.state]}]{f.state}[/]", f.words)
    console = Console(soft_wrap=False)
    console.width = max(console.width, 100)
    console.print(table, markup=True, highlight=False)


# ---- what there is

def machine_findings(cfg: ModelConfig) -> list[Finding]:
    """Device, dtype, kernels and memory, with the reasons for the choices."""
    device = pick_device(cfg.model.device)
    dtype, why = pick_dtype(cfg.model.dtype, device)
    slow = device.type == "cpu"
    out = [system_finding(), Finding("device", "note" if slow else "ok", device_words(device)),
           Finding("dtype", "ok", f"{str(dtype).removeprefix('torch.')}: {why}"
                   + (", with a loss scale" if dtype == torch.float16 else "")),
           Finding("kernels", "ok", "Triton" if runs_triton(torch.empty(0, device=device)) else kernel_words(device))]
    free = free_bytes(device)
    words = f"{free / 2**30:.1f} GiB free" if free else f"how much of {device.type} is free is not known: set slots="
    return [*out, Finding("memory", "ok" if free else "note", words)]


def system_finding() -> Finding:
    """Operating system and Python. Windows is served through WSL, where it is Linux."""
    words = f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"
    if platform.system() == "Windows":
        return Finding("system", "note", f"{words}: not tried, no Triton, and two runs in one folder are not told "
                       "apart; install it in WSL instead (wsl --install), which reaches the card")
    return Finding("system", "ok", words + (" (WSL)" if "microsoft" in platform.release().lower() else ""))


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


def kernel_words(device: torch.device) -> str:
    return "chunked torch: Triton serves CUDA and ROCm" if device.type != "cuda" else \
        "chunked torch: triton is not installed (pip install triton), which is slower"


def package_findings() -> list[Finding]:
    """Versions against the ranges of the installed minimath; optional packages by what they are for."""
    from packaging.requirements import Requirement
    try:
        wanted = {r.name: r for r in map(Requirement, importlib.metadata.requires("minimath") or [])
                  if not r.marker or r.marker.evaluate({"extra": ""})}
    except importlib.metadata.PackageNotFoundError:
        wanted = {}  # run from a checkout that is not installed
    out = []
    for name in PACKAGES:
        version, need = version_of(name), wanted.get(name)
        if version is None:
            hint = f": pip install '{need.name}{need.specifier}'" if need else ""
            use = f", for {FOR[name]}" if name in FOR else ""
            out.append(Finding(name, "FAIL" if need and not use else "note", "not installed" + hint + use))
        elif need and not need.specifier.contains(version.partition("+")[0], prereleases=True):
            out.append(Finding(name, "note", f"{version} is outside {need.specifier}, which is what was tried"))
        else:
            out.append(Finding(name, "ok", version))
    there = [f"{name} {version_of(name)}" for name in OPTIONAL if version_of(name)]
    missing = [f"{name} ({use})" for name, use in OPTIONAL.items() if not version_of(name)]
    words = f"{', '.join(there) or 'none'}; not installed: {', '.join(missing) or 'none'}"
    return [*out, Finding("optional", "ok", words)]


def version_of(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


# ---- whether it works

def self_tests(device: torch.device, dtype: torch.dtype) -> list[tuple[str, Callable[[], str]]]:
    """(name, test) each; a test returns what it found in words, or raises."""
    tests = [(f"test: {name}", lambda kernel=kernel: kernel_test(kernel, device, dtype))
             for name, kernel in KERNELS.items()]
    if version_of("bitsandbytes") and device.type != "mps":
        tests += [("test: NF4", lambda: nf4_test(device, dtype)), ("test: 8-bit AdamW", lambda: adamw8bit_test(device))]
    return [*tests, ("test: answer checker", answer_test), ("test: cache folder", cache_test)]


def tested(what: str, test: Callable[[], str]) -> Finding:
    started = time.perf_counter()
    try:
        words = test()
    except Exception as error:  # whatever it is, the report goes on
        first = (str(error).strip().splitlines() or [""])[0]
        return Finding(what, "FAIL", f"{type(error).__name__}: {first}"[:200])
    return Finding(what, "note" if words.startswith("note:") else "ok",
                   f"{words.removeprefix('note: ')} ({time.perf_counter() - started:.1f} s)")


KERNELS = {
    "linear_logp": lambda x, weight, target: -linear_logp(x, weight, target).mean(),
    "linear_token_loss": lambda x, weight, target: linear_token_loss(
        x, weight, target, lambda stats, rows: -stats.logp / len(target))[0],
    "linear_cross_entropy": lambda x, weight, target: linear_cross_entropy(x, weight, target),
}


def kernel_test(kernel, device: torch.device, dtype: torch.dtype) -> str:
    """Loss and gradient of the mean negative log-prob against float64; the bound is 4 times the error that rounding the
    exact gradient to dtype makes, and at least 1e-5."""
    generator = torch.Generator().manual_seed(0)
    n, d, v = 67, 96, 1009  # odd on purpose
    hidden, weight = torch.randn(n, d, generator=generator), torch.randn(v, d, generator=generator) / d ** 0.5
    target = torch.randint(0, v, (n,), generator=generator).to(device)
    x = hidden.to(device, dtype).requires_grad_()
    head = weight.to(device, dtype)
    loss = kernel(x, head, target)
    loss.backward()
    exact_x = x.detach().cpu().double().requires_grad_()  # the rounded inputs: their rounding is not the kernel's fault
    exact = -reference.linear_logp(exact_x, head.cpu().double(), target.cpu()).mean()
    exact.backward()
    want = exact_x.grad
    off = float((x.grad.cpu().double() - want).norm() / want.norm())
    bound = max(1e-5, 4 * float((want.to(dtype).double() - want).norm() / want.norm()))
    loss_off = abs(loss.item() - exact.item()) / abs(exact.item())
    if off > bound or loss_off > max(1e-5, torch.finfo(dtype).eps):
        raise ArithmeticError(f"gradient off by {off:.1e} (bound {bound:.1e}), loss by {loss_off:.1e}")
    return f"{'Triton' if runs_triton(x) else 'torch'}, {str(dtype).removeprefix('torch.')}: gradient within {off:.1e}"


def nf4_test(device: torch.device, dtype: torch.dtype) -> str:
    """Forward and input gradient of a 4-bit layer against its own dequantised weight."""
    import bitsandbytes as bnb
    from bitsandbytes.functional import dequantize_4bit

    from minimath.models.load import keep_4bit_weights_trainable
    torch.manual_seed(0)
    layer = bnb.nn.Linear4bit(128, 96, bias=False, compute_dtype=dtype, quant_type="nf4").to(device)
    keep_4bit_weights_trainable(layer)
    x = torch.randn(8, 128, device=device, dtype=dtype, requires_grad=True)
    out = layer(x)
    out.sum().backward()
    weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state).to(dtype)
    want = x.detach() @ weight.t()
    off = float((out.detach() - want).float().norm() / want.float().norm())
    grad_off = float((x.grad - weight.sum(0)).float().norm() / weight.sum(0).float().norm())
    if max(off, grad_off) > 4 * torch.finfo(dtype).eps + 1e-5:
        raise ArithmeticError(f"output off by {off:.1e}, gradient by {grad_off:.1e}")
    return "4-bit product and its gradient agree with the dequantised weight"


def adamw8bit_test(device: torch.device) -> str:
    """A step of the 8-bit optimiser, where its state is 8 bits wide, moves the weights as AdamW would."""
    import bitsandbytes as bnb
    torch.manual_seed(0)
    start, grad = torch.randn(64, 128, device=device), torch.randn(64, 128, device=device)
    moved = []
    for make in (torch.optim.AdamW, bnb.optim.AdamW8bit):
        param = torch.nn.Parameter(start.clone())
        optimizer = make([param], lr=1e-2, weight_decay=0.0)
        param.grad = grad.clone()
        optimizer.step()
        moved.append(param.detach() - start)
    off = float((moved[1] - moved[0]).norm() / moved[0].norm())
    if not off < 0.1:
        raise ArithmeticError(f"its step is {off:.0%} off AdamW's")
    return "steps as AdamW does"


def answer_test() -> str:
    with AnswerChecker() as checker:
        if not checker.equal("\\frac{\\sqrt{4}}{4}", "0.5") or checker.equal("\\frac{\\sqrt{4}}{5}", "0.5"):
            raise ArithmeticError("math-verify in the child process gives wrong verdicts")
    return "math-verify answers in its child process"


def cache_test() -> str:
    folder = Path(cache_folder("") or ".")
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / f".doctor-{os.getpid()}"
    try:
        probe.write_text("x", encoding="utf-8")
    finally:
        probe.unlink(missing_ok=True)
    free = shutil.disk_usage(folder).free
    words = f"{folder} can be written, {free / 2**30:.1f} GiB free there"
    return words if free > ENOUGH_DISK else f"note: {words}: little for checkpoints"

