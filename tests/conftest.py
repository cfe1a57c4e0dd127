"""Shared fixtures. Nothing here reaches a model hub."""
import gc
import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported: no network in tests
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if os.environ.get("MINIMATH_TEST_CUDA") != "1":  # before torch is imported: numbers are those of a CPU
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
# torch would take all processors for each worker of xdist; and a number that is set does not follow what else the
# machine does (core/threads.py), so that runs can be compared bit by bit
os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1)
                                                 // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))))

import tempfile

os.environ["MINIMATH_CACHE"] = tempfile.mkdtemp(prefix="minimath-tests-")  # judges' replies: not in the user's home

import pytest


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes more than a few seconds; deselect with -m 'not slow'")


@pytest.fixture(scope="module", autouse=True)
def fewer_objects_to_look_through():
    """Leave what is there before a file's tests out of garbage collections.

    Rollouts and passes ask for full ones, which take 0.3 s with the libraries alone, and longer with all tests read."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory) -> str:
    """Folder with a tiny random Llama (safetensors) and its ChatML tokenizer. Read only: it is shared."""
    from tiny import write_tiny
    return str(write_tiny(tmp_path_factory.mktemp("tiny") / "llama"))


@pytest.fixture(scope="session")
def tiny_tokenizer(tiny_dir):
    """The tokenizer of `tiny_dir`. Read only: it is shared."""
    from transformers import AutoTokenizer
    return AutoTokenizer.from_pretrained(tiny_dir)


@pytest.fixture
def here(monkeypatch, capsys, tmp_path):
    """here(WORDS) -> (status, stdout, stderr) of the command line in this process, in an empty folder."""
    from minimath.cli import main
    monkeypatch.chdir(tmp_path)

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["minimath", *words])
        status = main()
        said = capsys.readouterr()
        return status, said.out, said.err

    return run


def pytest_collection_modifyitems(items):
    """Files with tests of a minute and more first: at the end one process would work while the others wait."""
    long = ("test_triton.py", "test_kernel_limits.py", "test_compile.py", "test_faults.py", "test_dist.py",
            "test_ablate.py", "test_gpu.py")
    items.sort(key=lambda item: item.path.name not in long)  # stable: the order within a file stays
