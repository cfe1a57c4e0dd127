"""What a rollout counts with when it looks at the memory: sampling, what stays, errors that mean no memory."""
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from minimath.core.errors import is_out_of_memory
from minimath.models import memory
from minimath.models.forward import Head
from minimath.rollout.sampling import Sampling, logits_of, sample_tokens

ROWS, CUDA = 8, torch.device("cuda")


class Live(TorchDispatchMode):
    """Sums the bytes of the storages that live; `known` ones were there before."""

    def __init__(self, *known: torch.Tensor):
        super().__init__()
        self.bytes = self.peak = 0
        self.seen = {each.untyped_storage()._cdata: 0 for each in known}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for each in out if isinstance(out, (tuple, list)) else [out]:
            storage = each.untyped_storage()
            if storage._cdata not in self.seen:
                self.seen[storage._cdata] = storage.nbytes()
                self.bytes += storage.nbytes()
                weakref.finalize(storage, self.gone, storage._cdata)
        self.peak = max(self.peak, self.bytes)
        return out

    def gone(self, key: int) -> None:
        self.bytes -= self.seen.pop(key)


@pytest.mark.parametrize("how", [Sampling(), Sampling(0.7), Sampling(0.0), Sampling(top_k=20), Sampling(min_p=0.05),
                                 Sampling(top_p=0.9), Sampling(0.9, top_p=0.9, min_p=0.05, top_k=20)])
@pytest.mark.parametrize("softcap", [0.0, 30.0])
@pytest.mark.parametrize("vocab", [32_768, 50_257])  # the second is padded
def test_sampling_takes_no_more_than_the_estimate_and_not_much_less(how, softcap, vocab):
    weight, hidden, noise = torch.randn(vocab, 4), torch.randn(ROWS, 4), torch.rand(ROWS)
    with Live(weight, hidden, noise) as live, torch.no_grad():
        sample_tokens(logits_of(hidden, Head(weight, None, softcap, 1.0), None), noise, how)
    counted, on_a_card = (ROWS * memory.sampling_bytes(vocab, how, device) for device in ("cpu", "cuda"))
    slack = 2.1 * ROWS * vocab * 4 if how.temperature == 0 else 1.1 * ROWS * vocab * 4
    assert counted - slack <= live.peak <= counted * 1.02
    assert on_a_card - counted == (3 * ROWS * vocab * 4 if how.top_p < 1 else 0)  # what a sort has beside its results


@pytest.mark.parametrize("text", [
    "CUDA out of memory. Tried to allocate 2.00 GiB", "HIP out of memory.", "CUDA error: out of memory",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "cuDNN error: CUDNN_STATUS_ALLOC_FAILED", "HIPBLAS_STATUS_ALLOC_FAILED",
    "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
    "Triton Error [CUDA]: out of memory", "[enforce fail] DefaultCPUAllocator: can't allocate memory"])
def test_errors_that_mean_no_memory_are_known(text):
    assert is_out_of_memory(RuntimeError(text))


@pytest.mark.parametrize("text", ["CUDA error: an illegal memory access was encountered", "shapes differ",
                                  "CUBLAS_STATUS_EXECUTION_FAILED", "CUDA error: device-side assert triggered"])
def test_other_errors_are_not_taken_for_it(text):
    assert not is_out_of_memory(RuntimeError(text))


@pytest.mark.parametrize(("peak", "stays"), [(30, True), (60, True), (70, False)])
def test_buffers_stay_where_an_update_has_room_beside_them(monkeypatch, peak, stays):
    """Of 100: 10 the model, 20 the buffers, 5 in graphs; an update took `peak` - 10, and 65 are left."""
    for name, value in {"max_memory_allocated": peak, "memory_allocated": 30, "memory_reserved": 40}.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (60, 100))
    assert memory.has_room_beside(CUDA, 20, 5) == stays
    assert not memory.has_room_beside(torch.device("cpu"), 0, 0)


def test_what_is_kept_for_later_is_given_back_when_memory_runs_out():
    class Keeper:
        kept = True

        def close(self):
            self.kept = False

    memory.KEEPERS.add(keeper := Keeper())
    memory.give_back()
    assert not keeper.kept
