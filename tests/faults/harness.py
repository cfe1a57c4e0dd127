"""What the fault tests share: the count of a case, and the command line in a child process that may be killed.

A topic is a module of this folder with `run(full, folder) -> list[Tally]`: the fast part in CI, the full one by
`python -m tests.faults --full`. `folder` is empty and the topic's own.
"""
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests"
TOPICS = ("resume_sft", "resume_rlaif", "kill_save", "disk_full", "corrupt", "signals", "not_finite", "bad_rows",
          "judge_faults", "hostile", "checker", "invariance", "long_run", "out_of_memory")


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
