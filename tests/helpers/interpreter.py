"""Run a file of tests in a process of its own, under Triton's interpreter, which is chosen when triton is imported."""
import os
import re
import subprocess
import sys

import pytest


def assert_passes_under_interpreter(path: str, least: int) -> None:
    """Fail unless the tests of the file pass there, at least `least` of them."""
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", path]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    passed = re.search(r"(\d+) passed", done.stdout)
    assert done.returncode == 0 and passed and int(passed.group(1)) >= least, done.stdout[-8000:] + done.stderr[-2000:]
