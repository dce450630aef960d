"""What `pipeline doctor` looks at before a run: disk, memory, locks, and one step."""

import errno
import fcntl
import os

import pytest
import torch
import yaml

from rekindle.data.errors import InputError
from rekindle.pipeline.checks import machine
from rekindle.pipeline.config import load_config
from testlib.command import pipeline


@pytest.fixture
def run_file(tmp_path, small_corpus, make_teacher):
    values = {
        "corpus": small_corpus,
        "cache": {"path": str(tmp_path / "cache"), "replicas": 2},
        "teachers": [make_teacher("lm", "masked_lm", targets={"kind": "topk", "k": 8})],
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    return tmp_path / "run.yaml"


def test_a_machine_that_is_ready(run_file, tmp_path):
    done = pipeline("doctor", run_file)
    assert done.returncode == 0, done.stderr
    facts = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    assert facts["disk"].partition(" will be written")[0] != "0 bytes"
    assert f"free at {tmp_path}" in facts["disk"]
    assert f"locks in {tmp_path} work" in facts["locks"]
    assert "of weights in" in done.stdout.partition("memory, lm")[2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.yaml"]


def test_bytes_to_write_are_those_of_the_plan(run_file):
    config = load_config(run_file)
    (plan,) = machine._plans(config)
    assert plan.totals.bytes
    assert machine.check_disk(config).startswith(
        f"{machine.shown_bytes(plan.totals.bytes)} will be"
    )


def failing(number):
    def lock(file, operation, *rest):
        raise OSError(number, os.strerror(number))

    return lock


@pytest.mark.parametrize("kind", ["flock", "lockf"])
def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(fcntl, kind, failing(errno.ENOLCK))
    told = machine.check_locks(tmp_path)
    assert told.startswith(f"PROBLEM: {tmp_path} supports no locks (No locks available)")
    assert "one process at a time" in told
    assert not [*tmp_path.iterdir()]


def test_a_lock_that_is_given_twice_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", lambda *given: None)
    assert "a lock is granted twice" in machine.check_locks(tmp_path)


def test_the_step_is_taken_and_held_against_float64(monkeypatch):
    assert machine.check_step().startswith("there is no CUDA device; one step on cpu: loss ")
    plain = machine.linear_kd_loss

    def wrong(*given, impl="auto", **more):
        found = plain(*given, impl=impl, **more)
        return found if impl == "torch" else found._replace(loss=found.loss * 1.001)

    monkeypatch.setattr(machine, "linear_kd_loss", wrong)
    assert machine.tiny_step(torch.device("cpu")).startswith("PROBLEM: one step on cpu")
    with pytest.raises(InputError, match=r"not ready\. step: one step on cpu"):
        machine.refuse_problems({"step": machine.check_step()})


def test_a_gpu_on_which_no_step_can_be_taken(monkeypatch):
    def broken(device):
        raise RuntimeError("CUDA error: no kernel image is available\nmore")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(machine, "tiny_step", broken)
    assert machine.check_step() == (
        "PROBLEM: the step on the GPU failed (CUDA error: no kernel image is available); "
        "check driver and triton"
    )


def test_free_memory_is_some():
    assert 0 < machine.free_memory("cpu") < 1 << 46
