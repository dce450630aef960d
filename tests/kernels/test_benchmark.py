"""The benchmark of the losses runs end to end wherever the package does."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "kd_losses.py"


@pytest.mark.slow
def test_toy_run_measures_every_task_beside_peers(tmp_path: Path) -> None:
    out = tmp_path / "results.csv"
    run = subprocess.run(
        [sys.executable, str(BENCHMARK), "--toy", "--out", str(out)], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-3000:]
    rows = list(csv.DictReader(out.open()))
    for task in ("logits", "linear", "linear-ce"):
        timed = {
            r["provider"] for r in rows if r["case"].split()[0] == task and r["metric"] == "time"
        }
        assert {"rekindle", "eager"} <= timed
    assert all(float(r["value"]) > 0 for r in rows)


@pytest.mark.slow
def test_every_shape_of_the_row_kernel_is_measured(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    out = tmp_path / "results.csv"
    command = [sys.executable, str(BENCHMARK), "--toy", "--shapes", "--out", str(out)]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr[-3000:]
    timed = {r["provider"].split(" ", 1)[1].split()[0] for r in csv.DictReader(out.open())}
    assert timed == {"copy", "table", "held", "streamed"}
