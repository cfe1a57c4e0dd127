"""deterministic=true: what is set inside a run, that all is as it was after it, what is said where it is too late."""
import os

import pytest
import torch
from toy import adapter, make_config, same_tensors

from minimath.config.schema import EvalConfig
from minimath.core import same_bits as same
from minimath.core.errors import UserError
from minimath.eval.evaluate import evaluate
from minimath.rollout import sampling
from minimath.train.optimizer import Optimizer


def state() -> tuple:
    return (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled(),
            torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark,
            torch.utils.deterministic.fill_uninitialized_memory, os.environ.get(same.WORKSPACE))


ASKED = (True, False, True, False, False, ":4096:8")


@pytest.fixture(autouse=True)
def usual(monkeypatch):
    """A state that differs from ASKED in all, and is there again in the end."""
    monkeypatch.delenv(same.WORKSPACE, raising=False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    before = state()
    yield
    assert state() == before


@pytest.fixture
def seen(monkeypatch):
    """The states that were met in updates and where tokens are sampled."""
    states = []

    def noted(owner, name):
        real = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, **kwargs: (states.append(state()), real(*args, **kwargs))[1])
    noted(Optimizer, "step"), noted(sampling, "invert")
    return states


def test_it_is_set_inside_and_as_before_after_an_error():
    with pytest.raises(OSError), same.same_bits(True):
        assert state() == ASKED
        with same.in_any_order():
            assert state() == (False, *ASKED[1:])
        assert state() == ASKED
        raise OSError
    with same.same_bits(False), same.in_any_order():
        assert not torch.are_deterministic_algorithms_enabled()


def test_an_sft_run_with_it_has_it_and_the_same_adapter_on_a_cpu(train, seen):
    _, one = train("one", steps=1)
    assert ASKED not in seen and seen
    seen.clear()
    _, two = train("two", steps=1, deterministic=True)
    assert set(seen) == {ASKED} and same_tensors(adapter(one), adapter(two))


def test_an_rlaif_run_with_it_updates_so_and_samples_in_any_order(rl, seen):
    rl(steps=1, deterministic=True, top_p=0.9)
    assert set(seen) == {ASKED, (False, *ASKED[1:])}


def test_an_evaluation_with_it_has_it(tiny_dir, data, tmp_path, seen, capsys):
    cfg = make_config(EvalConfig, tiny_dir, data=data, limit=2, max_new_tokens=4, temperature=0.5,
                      out=str(tmp_path / "eval"), deterministic=True)
    evaluate(cfg)
    assert set(seen) == {(False, *ASKED[1:])} and same.SAID[:40] in capsys.readouterr().out.replace("\n", " ")


@pytest.mark.parametrize("given, why", [(":0:0", "':0:0'"), (None, "without it")])
def test_too_late_says_what_to_export(monkeypatch, given, why):
    if given:
        monkeypatch.setenv(same.WORKSPACE, given)
    else:
        monkeypatch.setattr(same, "has_begun", lambda: True)
    with pytest.raises(UserError, match=f"{why}: export {same.WORKSPACE}=:4096:8"), same.same_bits(True):
        pass
    monkeypatch.delenv(same.WORKSPACE, raising=False)


def test_cublas_has_begun_without_it_if_torch_says_so_of_a_product(monkeypatch):
    assert not same.has_begun()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch, "ones", lambda *size, device: torch.zeros(*size))
    assert not same.has_begun()
    for text, begun in ((f"set {same.WORKSPACE}", True), ("no kernel image", None)):
        def fails(*_, text=text):
            raise RuntimeError(text)
        monkeypatch.setattr(torch, "mm", fails)
        if begun:
            assert same.has_begun()
        else:
            pytest.raises(RuntimeError, same.has_begun)
