"""The command itself, interrupted and killed."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rekindle.pipeline.caching.cache_teachers import cache_teachers
from rekindle.pipeline.checks.verify import verify_cache
from rekindle.pipeline.config import dump_config
from testlib.command import run_main
from testlib.killing import CORPUS, assert_finished, fork_workers, units
from testlib.processes import Child, alive, descendants, stat_of, until

CLI = [sys.executable, "-m", "rekindle.pipeline.cli"]


@pytest.fixture
def long(tmp_path, configure, every) -> Any:
    """A configuration that keeps any machine busy: a teacher with many passes per unit."""
    slow = every[3] | {"monte_carlo": {"passes": 30}}
    corpus = {"limit_sequences": 60, "sequence_length": 16}
    cache = {"sequences_per_shard": 3}
    config = configure(tmp_path / "cache", [slow], corpus, cache)
    (tmp_path / "run.yaml").write_text(dump_config(config))
    return config


def assert_left_at_once(process: Any, interrupt: Callable[[], None], started: float) -> None:
    """In two seconds, or in as many as it took to come so far on a machine that is busy."""
    children = descendants(process.pid)
    began = time.monotonic()
    seconds = max(2, began - started)
    interrupt()
    assert process.wait(300) == 130
    assert time.monotonic() - began < seconds
    assert until(lambda: not alive(children), seconds), "a child outlives it"


def assert_line_to_resume(errors: str, run: Path, workers: int) -> None:
    assert "Traceback" not in errors
    assert "Error" not in errors
    (line,) = [line for line in errors.splitlines() if "interrupted" in line]
    assert line.endswith(f"To go on: pipeline cache-teachers {run} --workers {workers}")


@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_ctrl_c_ends_at_once_with_the_line_to_go_on(tmp_path, long, workers):
    run, cache = tmp_path / "run.yaml", tmp_path / "cache"

    def work() -> None:
        fork_workers()
        run_main("cache-teachers", run, "--workers", workers)

    started, child = time.monotonic(), Child(work)
    assert until(lambda: units(cache) or child.ended()), child.errors
    assert_left_at_once(child, lambda: os.kill(child.pid, signal.SIGINT), started)
    assert_line_to_resume(child.errors, run, workers)
    there = units(cache)
    again = cache_teachers(long)
    assert again.units_present == len(there)
    assert again.units_done > 0
    assert verify_cache(str(cache)).problems == []


def start(run: Path, workers: int) -> subprocess.Popen[str]:
    """The command as a user starts it, in a process group of its own."""
    return subprocess.Popen(
        [*CLI, "cache-teachers", str(run), "--workers", str(workers)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_ctrl_c_of_the_real_command(tmp_path, long, workers):
    run, cache = tmp_path / "run.yaml", tmp_path / "cache"
    started, process = time.monotonic(), start(run, workers)
    assert until(lambda: units(cache) or process.poll() is not None)
    assert_left_at_once(process, lambda: process.send_signal(signal.SIGINT), started)
    assert process.stderr is not None
    assert_line_to_resume(process.stderr.read(), run, workers)
    again = start(run, workers)
    assert again.communicate()[1].count("Traceback") == 0
    assert again.returncode == 0
    assert verify_cache(str(cache)).problems == []
    assert cache_teachers(long).units_done == 0


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["worker", "group", "parent"])
def test_a_process_of_the_real_command_is_killed(tmp_path, configure, every, victim):
    """Worker processes of their own interpreters: the quick tests above fork theirs."""
    alone = configure(tmp_path / "alone", every[:1], CORPUS, {"sequences_per_shard": 1})
    cache_teachers(alone)
    cache, run = tmp_path / "cache", tmp_path / "run.yaml"
    config = configure(cache, every[:1], CORPUS, {"sequences_per_shard": 1})
    run.write_text(dump_config(config))
    process = start(run, 2)
    assert until(lambda: units(cache) or process.poll() is not None)
    children = descendants(process.pid)
    parents = {pid: int(stat[1]) for pid in children if (stat := stat_of(pid))}
    forked = [pid for pid, parent in parents.items() if parent != process.pid]  # by the server
    assert len(forked) == 2
    if victim == "group":
        os.killpg(process.pid, signal.SIGKILL)
    else:
        os.kill(process.pid if victim == "parent" else forked[0], signal.SIGKILL)
    try:
        assert process.wait(300) == (2 if victim == "worker" else -signal.SIGKILL)
        assert until(lambda: not alive(children), 30), "workers outlive the process they work for"
    finally:
        for pid in alive(children):
            os.kill(pid, signal.SIGKILL)
    assert process.stderr is not None
    errors = process.stderr.read()
    assert "Traceback" not in errors
    assert ("teacher 'lm': its process was killed" in errors) == (victim == "worker")
    assert_finished(cache, config, tmp_path / "alone")


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_the_real_command_killed_at_random_times(tmp_path, configure, every, workers):
    """Until it is through: no matter how often, and when, even while it starts."""
    teachers, many = every[:3], {"sequences_per_shard": 1}
    alone = configure(tmp_path / "alone", teachers, CORPUS, many)
    cache_teachers(alone)
    config = configure(tmp_path / "cache", teachers, CORPUS, many)
    (tmp_path / "run.yaml").write_text(dump_config(config))
    rng = random.Random(workers)
    for _ in range(6):
        process = start(tmp_path / "run.yaml", workers)
        time.sleep(rng.uniform(2, 12))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if (tmp_path / "cache").exists():
        assert_finished(tmp_path / "cache", config, tmp_path / "alone")
