"""What the fault tests share: the count of a case, and the command line in a child process that may be killed.

A topic is a module of this folder with `run(full, folder) -> list[Tally]`: the fast part in CI, the full one by
`python -m tests.faults --full`. `folder` is empty and the topic's own.
"""
import contextlib
import importlib
import io
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tiny import write_tiny
from toy import ending_model, write_problems

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests"
TOPICS = ("resume_sft", "resume_rlaif", "kill_save", "disk_full", "corrupt", "signals", "not_finite", "bad_rows",
          "judge_faults", "hostile", "checker", "invariance", "long_run", "out_of_memory")


FORKING = ("kill_save", "disk_full")  # topics that fork the process that they are in


@dataclass
class Tally:
    """How often a fault was tried, and in words each time that something was lost."""
    case: str
    tried: int = 0
    lost: list[str] = field(default_factory=list)

    def add(self, survived: bool, words: str) -> None:
        """Count one try; words: which one, for when it was lost."""
        self.tried += 1
        if not survived:
            self.lost.append(words)

    @property
    def survived(self) -> int:
        return self.tried - len(self.lost)


def tallies_of(topic: str, full: bool, folder: Path) -> list[Tally]:
    """Run a topic. On a machine with a GPU one that forks is run by a child without CUDA and without autograd's
    threads, both of which a fork can't take along."""
    if topic not in FORKING or not torch.cuda.is_available():
        return importlib.import_module(topic).run(full, folder)
    rows = folder / "rows.json"
    words = (topic, "--out", str(rows), *(["--full"] if full else []))
    status, said = run_child(*words, module="tests.faults", timeout_s=3600, CUDA_VISIBLE_DEVICES="")
    if not rows.exists():
        raise RuntimeError(f"{topic} ended with {status}: {said[-2000:]}")
    return [Tally(row["case"], row["tried"], row["lost"]) for row in json.loads(rows.read_text())]


def heard(action: Callable[[], object], *errors: type[Exception]) -> tuple[str, Exception | None]:
    """(what an action prints and warns of, that of `errors` which it raised)."""
    error = None
    with contextlib.redirect_stdout(io.StringIO()) as out, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            action()
        except errors as raised:
            error = raised
    return out.getvalue() + "".join(str(w.message) for w in said), error


def model_and_data(folder: Path, n: int = 24) -> tuple[str, str]:
    """A tiny model with many end tokens, and n toy problems."""
    model = ending_model(write_tiny(folder / "tiny"), folder / "model")
    return model, write_problems(folder / "problems.jsonl", n=n)


def child_env(**changes: str) -> dict[str, str]:
    """The environment of a child: this tree and the tests' helpers importable, one thread, no hub; `changes` on top."""
    path = os.pathsep.join([str(ROOT), str(TESTS / "helpers"), str(TESTS / "faults")])
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
                         "TOKENIZERS_PARALLELISM": "false"} | changes


def start(*words: str, module: str = "minimath", cwd: Path | None = None, **env: str) -> subprocess.Popen:
    """`python -m module words` in a child; stdout and stderr in one pipe, as text."""
    return subprocess.Popen([sys.executable, "-m", module, *words], cwd=cwd or ROOT, env=child_env(**env), text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, errors="replace")


def run_child(*words: str, timeout_s: float = 300.0, **options) -> tuple[int, str]:
    """(exit status, output) of `start`; a child that takes longer is killed and gives status -9."""
    with start(*words, **options) as child:
        try:
            said, _ = child.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            child.kill()
            said, _ = child.communicate()
    return child.returncode, said
