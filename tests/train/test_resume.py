"""A student's run killed anywhere goes on to the same bits: weights, metrics, best, coverage.

The runs are forked: a child that SIGKILL ends leaves what a lost machine leaves, and starts in
milliseconds.
"""

import json
import os
import random
import shutil
import signal
import time
from contextlib import contextmanager
from itertools import count

import pytest
import torch
from safetensors.torch import load_file

from rekindle.data.settings import parse_settings
from rekindle.train import checkpoint, loop, run_log
from rekindle.train.config import StudentConfig, TrainConfig
from rekindle.train.loop import train_student
from rekindle.train.run_log import read_metrics

DISTILL = [
    {"teachers": ["big"], "temperature": 2.0, "weight": {"over": 0.6}},
    {"teachers": ["odd.lm", "even.lm"], "combine": "route", "weight": 0.3},
    {"teachers": ["sense", "tags"], "weight": 0.2},
]
TIMES = ("tokens_per_second", "data_wait", "seconds")
STEPS = 12


def train(world, out):
    """Twelve steps with dropout, a checkpoint at every third, an evaluation at every fourth."""
    values = {
        "steps": STEPS,
        "batch_sequences": 5,
        "micro_batch_sequences": 2,
        "learning_rate": 1e-3,
        "warmup_steps": 2,
        "checkpoint_every": 3,
        "evaluate_every": 4,
        "evaluate_sequences": 6,
        "held_out": 0.1,
        "prefetch_threads": 2,
        "objective": {"distill": DISTILL},
    }
    config = parse_settings(TrainConfig, values)
    student = StudentConfig(model=str(world.student))
    return lambda report=lambda step, values: None: train_student(
        world.open(), student, config, out, resume=True, report=report
    )


def fork(work) -> int:
    """Run ``work`` in a child, which ends with 0 or by a signal; returns its process number."""
    child = os.fork()
    if child:
        return child
    try:
        work()
        os._exit(0)
    finally:
        os._exit(1)


def ended(child) -> bool:
    """Waits; whether the child came to its end. An error in it fails the test."""
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return False
    assert os.WEXITSTATUS(status) == 0
    return True


def left(out):
    """All that a run leaves but for what depends on the clock."""
    records = [{k: v for k, v in r.items() if k not in TIMES} for r in read_metrics(out)]
    summary = json.loads((out / "summary.json").read_text())
    checkpoints = sorted(p.name for p in (out / "checkpoints").iterdir())
    last = json.loads((out / f"checkpoints/step-{STEPS:08d}/trainer.json").read_text())
    files = {n: d for n, d in last["files"].items() if n.endswith(".safetensors")}
    return records, summary["evaluation"], summary["coverage"], checkpoints, files, last["best"]


def weights(out):
    return {
        f"{file} {name}": tensor
        for file in ("model", "heads")
        for name, tensor in load_file(out / f"{file}.safetensors").items()
    }


def assert_same(out, whole):
    ours, theirs = weights(out), weights(whole)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert left(out) == left(whole)


@pytest.fixture(scope="module")
def whole(masked_world, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    train(masked_world, out)()
    records = read_metrics(out)
    steps = [r["step"] for r in records if r["kind"] == "train"]
    assert steps == list(range(1, STEPS + 1))
    return out


# --- at random moments ---


def killed_at_random(world, out, seed) -> int:
    """Kill, go on, kill … until a child comes to its end. How often it was killed."""
    draw = random.Random(seed)
    for kills in count():
        pipe, end = os.pipe()

        def work(end=end):
            train(world, out)(lambda step, values: os.write(end, b"."))

        child = fork(work)
        os.close(end)
        steps = draw.randint(0, 5)  # after so many steps of this child, or at its end
        seen = 0
        while seen < steps and os.read(pipe, 1):
            seen += 1
        time.sleep(draw.uniform(0, 0.15))
        if kills < 6:
            os.kill(child, signal.SIGKILL)
        os.close(pipe)
        if ended(child):
            return kills
    raise AssertionError


@pytest.mark.parametrize(
    "seed", [0, 1, *(pytest.param(n, marks=pytest.mark.slow) for n in range(2, 12))]
)
def test_a_run_killed_again_and_again_goes_on_to_the_same_bits(masked_world, whole, tmp_path, seed):
    assert killed_at_random(masked_world, tmp_path / "run", seed) > 1
    assert_same(tmp_path / "run", whole)


# --- around everything that touches the disk ---


@contextmanager
def dying_at(number):
    """Die at the ``number``-th call that touches the disk; yields the calls there were."""
    calls = []

    def deadly(module, name):
        real = getattr(module, name)

        def call(*arguments, **options):
            calls.append(name)
            if len(calls) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **options)

        setattr(module, name, call)
        return lambda: setattr(module, name, real)

    places = [(checkpoint, "save_file"), (checkpoint, "_sync"), (checkpoint, "_sha256")]
    places += [(os, "rename"), (os, "replace"), (shutil, "rmtree"), (os, "fsync")]
    places += [(run_log.RunLog, "write"), (loop, "save_checkpoint"), (checkpoint, "seal")]
    undo = [deadly(module, name) for module, name in places]
    try:
        yield calls
    finally:
        for back in undo:
            back()


@pytest.fixture(scope="module")
def calls(masked_world, whole, tmp_path_factory):
    with dying_at(0) as found:
        train(masked_world, tmp_path_factory.mktemp("counted") / "run")()
    assert {"rename", "rmtree", "write", "fsync"} <= set(found)
    return len(found)


def dies_at_and_goes_on(world, out, number):
    def work():
        with dying_at(number):
            train(world, out)()

    assert not ended(fork(work))
    assert ended(fork(train(world, out)))


@pytest.mark.parametrize("share", [0.1, 0.37, 0.62, 0.9])
def test_a_run_that_dies_while_it_writes(masked_world, whole, calls, tmp_path, share):
    dies_at_and_goes_on(masked_world, tmp_path / "run", 1 + int(share * calls))
    assert_same(tmp_path / "run", whole)


@pytest.mark.slow
def test_a_run_that_dies_at_any_call_that_writes(masked_world, whole, calls, tmp_path):
    for number in range(1, calls + 1, 3):
        dies_at_and_goes_on(masked_world, tmp_path / f"{number}", number)
        assert_same(tmp_path / f"{number}", whole)
        shutil.rmtree(tmp_path / f"{number}")


def test_the_checkpoints_may_be_lost(masked_world, whole, tmp_path):
    """All damaged: the run begins anew, and its metrics with it."""
    out = tmp_path / "run"

    def stop(step, values):
        if step == 8:
            os.kill(os.getpid(), signal.SIGKILL)

    assert not ended(fork(lambda: train(masked_world, out)(stop)))
    for folder in (out / "checkpoints").iterdir():
        (folder / "trainer.json").write_text("{}")
    train(masked_world, out)()
    assert_same(out, whole)
