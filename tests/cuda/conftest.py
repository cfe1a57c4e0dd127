"""Devices of the tests in this folder: the first two cards with MINIMATH_TEST_CUDA=1, the CPU with =cpu, else none."""
import os

import pytest
import torch

ASKED = os.environ.get("MINIMATH_TEST_CUDA", "")
COUNT = torch.cuda.device_count() if ASKED == "1" else 0
DEVICES = ["cpu"] if ASKED == "cpu" else [f"cuda:{index}" for index in range(min(2, COUNT))]


@pytest.fixture(params=DEVICES or ["none"])
def device(request) -> str:
    """The device by name, the current one while the test runs."""
    if request.param == "none":
        pytest.skip("for a card: MINIMATH_TEST_CUDA=1 pytest tests/cuda")
    if request.param == "cpu":
        yield "cpu"
        return
    before = torch.cuda.current_device()
    torch.cuda.set_device(request.param)
    yield request.param
    torch.cuda.synchronize()  # a fault of a kernel belongs to the test that launched it
    torch.cuda.set_device(before)
