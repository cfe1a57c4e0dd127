"""Count what code makes a card do, without a card: what the host waits for, copies to the card, launches.

    with on_a_card() as work:
        policy = policy_on_card(cfg)       # shapes on "cuda:0", no numbers
        update(policy, optimizer, rows)
    assert work.reads == [...]             # one line each: "item() in minimath/train/optimizer.py:57"

Tensors on the card are torch's fake tensors: they know device, shape and dtype. What is on the CPU is computed; what
is read from the card is ones. Triton's kernels are launched and do nothing. torch's C++ code, which in a build for a
CPU knows no cards (autograd would end the process), is told that the tensors are on the CPU; Python, and the choice
of an operator's implementation, see a card."""
import contextlib
import sys
import warnings
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _foreach_utils
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from minimath.kernels import common
from minimath.models import load
from minimath.models.forward import base_causal_lm
from minimath.models.policy import load_policy

aten = torch.ops.aten
CARD = torch.device("cuda:0")
REPO = Path(__file__).parents[2]
NOTHING = ("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "_unsafe_view", "lift_fresh")
BY_MASK = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default)
CHIP = SimpleNamespace(multi_processor_count=132, gcnArchName="", total_memory=80 << 30, major=9, minor=0)


class Work(TorchDispatchMode):
    """What was asked of the card so far.

    reads: the host waited for a result. copies: to the card. waits: those of the copies that the host waited for, as
    their source was not pinned or not non_blocking. launches: by operator or kernel; views and empty tensors are none.
    """

    def __init__(self):
        super().__init__()
        self.reads, self.copies, self.waits, self.launches = [], [], [], Counter()
        self.pinned: dict[int, torch.Tensor] = {}  # by address; held, so that no other tensor gets it

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func._schema.name.removeprefix("aten::")
        if func is torch.ops.prim.device.default:
            return torch.device("cpu")
        leaves, goal = tree_leaves((args, kwargs)), kwargs.get("device")
        if goal and torch._C._current_graph_task_id() >= 0:  # made by autograd, which believes that all is on the CPU
            goal = kwargs["device"] = CARD
        if not any(map(on_card, leaves)) and (goal is None or goal.type != "cuda"):
            return self.on_cpu(func, name, args, kwargs)
        if name == "_local_scalar_dense":
            self.reads.append(f"item() {place()}")
            return True if args[0].dtype == torch.bool else 1.0 if args[0].is_floating_point() else 1
        if name == "equal":
            self.reads.append(f"equal() {place()}")
            return True
        if name == "nonzero":
            self.reads.append(f"nonzero() {place()}")
            return torch.empty(args[0].numel(), args[0].dim(), dtype=torch.long, device=CARD)  # all of them
        if func in BY_MASK:
            args = self.by_index(name, *args)
        source = args[0] if name == "_to_copy" else args[1] if name == "copy_" else None
        if source is not None and not on_card(source):
            self.copied(source, kwargs.get("non_blocking", False) or name == "copy_" and args[2:3] == (True,))
        elif name == "copy_" and not on_card(args[0]):
            self.reads.append(f"copy_() {place()}")
            return args[0].fill_(1)
        elif not (name in NOTHING or any(a.alias_info and not a.alias_info.is_write for a in func._schema.returns)):
            self.launches[name] += 1
        return func(*args, **kwargs)

    def on_cpu(self, func, name, args, kwargs):
        """Compute; what is pinned is noted, as torch has no pinned memory without a card."""
        pin = kwargs.pop("pin_memory", False)
        with _disable_current_modes():
            if name == "is_pinned":
                return args[0].untyped_storage().data_ptr() in self.pinned
            out = args[0].clone() if name == "_pin_memory" else func(*args, **kwargs)
        if pin or name == "_pin_memory":
            self.pinned[out.untyped_storage().data_ptr()] = out
        return out

    def by_index(self, name, x, indices, *rest):
        """Note masks, whose places the host asks for, and indices and values that are not on the card."""
        for index in indices:
            if index is not None and index.dtype in (torch.bool, torch.uint8):
                self.reads.append(f"mask {place()}")
            elif index is not None and not on_card(index):
                self.copied(index, False)
        if rest and not on_card(rest[0]):
            self.copied(rest[0], False)
            rest = (torch.empty_like(rest[0], device=CARD), *rest[1:])
        if name == "index":
            indices = [torch.empty(i.numel(), dtype=torch.long, device=CARD) if i is not None and i.dtype == torch.bool
                       else i for i in indices]
            if len(indices) == 1 and indices[0] is not None and x.dim() > 1:
                x = x.reshape(-1, *x.shape[1:])
        return x, indices, *rest

    def copied(self, source: torch.Tensor, non_blocking: bool) -> None:
        line = f"{tuple(source.shape)} {place()}"
        self.copies.append(line)
        if not (non_blocking and source.untyped_storage().data_ptr() in self.pinned):
            self.waits.append(line)

    def run_kernel(self, kernel, *args, grid=None, warmup=False, **kwargs) -> None:
        """Stand for triton's JITFunction.run."""
        self.launches[kernel.fn.__name__] += 1

    def counts(self) -> dict[str, int]:
        return {"reads": len(self.reads), "copies": len(self.copies), "waits": len(self.waits),
                "launches": self.launches.total()}

    def clear(self) -> None:
        for each in (self.reads, self.copies, self.waits, self.launches):
            each.clear()


def on_card(x) -> bool:
    return isinstance(x, FakeTensor) and x.fake_device.type == "cuda"


def place() -> str:
    """Say which line of the package asked."""
    frame = sys._getframe(2)
    while frame and not (frame.f_code.co_filename.startswith((str(REPO / "minimath"), str(REPO / "kernels")))):
        frame = frame.f_back
    return f"in {Path(frame.f_code.co_filename).relative_to(REPO)}:{frame.f_lineno}" if frame else "in a test"


@contextlib.contextmanager
def on_a_card(capability: tuple[int, int] = (9, 0)):
    """Yield a Work that counts; inside, device "cuda:0" can be used, for shapes."""
    if torch.backends.cuda.is_built() and not torch.cuda.is_available():
        pytest.skip("this build of torch looks for a real card: one for a CPU is needed, or a card")
    work = Work()

    def to(self, *args, **kwargs):
        if isinstance(args[0] if args else None, torch.Tensor):
            return to(self, args[0].device, args[0].dtype, **kwargs)
        if not on_card(self):
            return plain_to(self, *args, **kwargs)
        device, dtype, later, _ = torch._C._nn._parse_to(*args, **kwargs)
        if device is None or device.type != "cpu":
            return self if dtype is None else plain_to(self, dtype, copy=kwargs.get("copy", False))
        if not later:  # non_blocking: who reads it waits for an event
            work.reads.append(f"to(cpu) {place()}")
        with _disable_current_modes():
            return torch.ones(self.shape, dtype=dtype or self.dtype)

    def grouped(tensors, with_indices=False):
        groups = group(tensors, with_indices)
        card = any(map(on_card, tensors[0]))
        return {(CARD if card else device, dtype): each for (device, dtype), each in groups.items()}

    plain_to, group, nothing = torch.Tensor.to, torch._C._group_tensors_by_device_and_dtype, contextlib.nullcontext
    methods = {"cpu": lambda self: to(self, "cpu"), "tolist": lambda self: to(self, "cpu").tolist(),
               "new_tensor": lambda self, data, dtype=None: torch.tensor(data, dtype=dtype or self.dtype, device=CARD),
               "type_as": lambda self, other: to(self, other.dtype), "is_cuda": property(on_card)}
    cards = {"get_device_properties": lambda *_: CHIP, "get_device_capability": lambda *_: capability,
             "device_of": nothing, "device": nothing, "set_device": nothing, "current_device": lambda: 0}
    with contextlib.ExitStack() as stack:
        for name, method in methods.items():
            stack.enter_context(mock.patch.object(FakeTensor, name, method, create=True))
        stack.enter_context(mock.patch.object(torch.Tensor, "to", to))
        for name, stub in cards.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, stub))
        stack.enter_context(mock.patch.object(torch._C, "_group_tensors_by_device_and_dtype", grouped))
        stack.enter_context(mock.patch.object(_foreach_utils, "_foreach_supported_types",
                                              [*_foreach_utils._foreach_supported_types, FakeTensor]))
        if common.triton:
            stack.enter_context(mock.patch.object(common.triton.runtime.jit.JITFunction, "run",
                                                  lambda self, *a, **k: work.run_kernel(self, *a, **k)))
        for cached in ("architecture", "processors"):  # by device: they would remember this one
            stack.callback(getattr(getattr(common, cached, None), "cache_clear", int))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(work)
        yield work


def policy_on_card(cfg, *, train: bool = True):
    """Load a policy on the CPU and put it on the card; to be called within on_a_card."""
    with _disable_current_modes(), mock.patch.object(load, "fuse", lambda base: ""):
        policy = load_policy(cfg, train=train)
    for module in policy.model.modules():
        for held in (module._parameters, module._buffers):
            for name, old in held.items():
                if old is not None:
                    new = torch.empty(old.shape, dtype=old.dtype, device=CARD)
                    held[name] = torch.nn.Parameter(new, old.requires_grad) if isinstance(old, torch.nn.Parameter) \
                        else new
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fake weights are all at address 0, and torch warns of it
        _ = cfg.model.compile or cfg.model.shard or load.fuse(base_causal_lm(policy.model))
    return policy
