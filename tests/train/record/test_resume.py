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
from types import SimpleNamespace

import pytest

from rekindle.data.cache import Cache
from rekindle.data.errors import CheckpointError, InputError
from rekindle.data.settings import parse_settings
from rekindle.data.storage.seal import seal, unseal
from rekindle.pipeline.caching.cache_teachers import cache_teachers
from rekindle.pipeline.config import RunConfig
from rekindle.train import loop
from rekindle.train.config import StudentConfig, TrainConfig
from rekindle.train.loop import train_student
from rekindle.train.record import checkpoint, run_log
from rekindle.train.record.run_log import read_metrics
from testlib.loop import stop_at
from testlib.models import NARROW
from testlib.students import metrics, same_weights

DISTILL = [
    {"teachers": ["big"], "temperature": 2.0, "weight": {"over": 0.6}},
    {"teachers": ["odd.lm", "even.lm"], "combine": "route", "weight": 0.3},
    {"teachers": ["sense", "tags"], "weight": 0.2},
]
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


def replaying(world, out):
    """The same with replay that follows the held-out losses of two domains, at every second step
    newly; so many threads that they would read past evaluations.
    """
    values = {
        "steps": STEPS,
        "batch_sequences": 5,
        "learning_rate": 1e-2,
        "warmup_steps": 2,
        "checkpoint_every": 3,
        "evaluate_every": 2,
        "evaluate_sequences": 9,
        "evaluate_domains": True,
        "held_out": 0.2,
        "prefetch_threads": 3,
        "domains": ["new"],
        "replay": {"domains": ["old", "older"], "fraction": 0.5, "choose": "loss_change"},
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
    summary = json.loads((out / "summary.json").read_text())
    checkpoints = sorted(p.name for p in (out / "checkpoints").iterdir())
    last = json.loads((out / f"checkpoints/step-{STEPS:08d}/trainer.json").read_text())
    files = {n: d for n, d in last["files"].items() if n.endswith(".safetensors")}
    return (
        metrics(out),
        summary["evaluation"],
        summary["coverage"],
        checkpoints,
        files,
        last["best"],
    )


def assert_same(out, whole):
    assert same_weights(out, whole)
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


def killed_at_random(world, out, seed, run=train) -> int:
    """Kill, go on, kill … until a child comes to its end. How often it was killed."""
    draw = random.Random(seed)
    for kills in count():
        pipe, end = os.pipe()

        def work(end=end):
            run(world, out)(lambda step, values: os.write(end, b"."))

        child = fork(work)
        os.close(end)
        steps = draw.randint(0, 5)  # after so many steps of this child, or at its end
        seen = 0
        while seen < steps and os.read(pipe, 1):
            seen += 1
        time.sleep(draw.uniform(0, 0.15))
        if kills < 4:
            os.kill(child, signal.SIGKILL)
        os.close(pipe)
        if ended(child):
            return kills
    raise AssertionError


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(1, 12))]
)
def test_a_run_killed_again_and_again_goes_on_to_the_same_bits(masked_world, whole, tmp_path, seed):
    assert killed_at_random(masked_world, tmp_path / "run", seed) > 1
    assert_same(tmp_path / "run", whole)


# --- replay that follows the losses ---


@pytest.fixture(scope="module")
def domains_world(tmp_path_factory, wordpiece, make_model):
    """Three domains, no teacher."""
    folder = tmp_path_factory.mktemp("domains")
    words = ["the old model learns", "a river runs", "new light falls over", "the cache keeps"]
    names = ("old", "older", "new")
    lines = [
        {"text": f"{words[n % 4]} {words[n // 4 % 4]} {n}.", "domain": names[n // 4 % 3]}
        for n in range(60)
    ]
    (folder / "docs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    student = make_model("bert", "AutoModelForMaskedLM", wordpiece, 10, **NARROW)
    values = {
        "corpus": {
            "source": str(folder / "docs.jsonl"),
            "domain_field": "domain",
            "tokenizer": str(wordpiece),
            "sequence_length": 24,
        },
        "cache": {"path": str(folder / "cache"), "sequences_per_shard": 40, "replicas": 2},
        "student": {"model": str(student)},
    }
    config = RunConfig.model_validate(values)
    cache_teachers(config)
    return SimpleNamespace(open=lambda: Cache.open(folder / "cache"), student=student)


def test_a_killed_run_goes_on_to_replay_the_same(domains_world, tmp_path):
    whole = tmp_path / "whole"
    replaying(domains_world, whole)()
    evaluations = [r for r in read_metrics(whole) if r["kind"] == "evaluate"]
    assert all({"ce/new", "ce/old", "ce/older"} <= r.keys() for r in evaluations)
    last = json.loads((whole / f"checkpoints/step-{STEPS:08d}/trainer.json").read_text())
    assert len(last["order"]["losses"]) == STEPS // 2
    assert all(sum(counts) > 0 for counts in zip(*last["order"]["tokens"], strict=True))
    for record, learned in zip(evaluations, last["order"]["losses"], strict=True):
        assert learned == pytest.approx([record["ce/old"], record["ce/older"]], rel=1e-7)
    assert killed_at_random(domains_world, tmp_path / "run", 0, replaying) > 1
    assert_same(tmp_path / "run", whole)
    again = json.loads((tmp_path / f"run/checkpoints/step-{STEPS:08d}/trainer.json").read_text())
    assert again["order"] == last["order"]


def test_older_checkpoints_that_a_kill_left_are_removed_where_it_goes_on(masked_world, tmp_path):
    """It may come between a checkpoint and the removal of those before it."""
    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        train(masked_world, out)(stop_at(7))
    *_, newest = before = sorted((out / "checkpoints").iterdir())
    for step in (1, 2):
        shutil.copytree(newest, newest.with_name(f"step-{step:08d}"))
    with pytest.raises(KeyboardInterrupt):
        train(masked_world, out)(stop_at(7))
    assert sorted((out / "checkpoints").iterdir()) == before


def test_a_run_that_replayed_by_the_former_rule_is_refused(domains_world, tmp_path):
    """Its checkpoints hold the losses alone; refused before a step is taken."""
    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        replaying(domains_world, out)(stop_at(7))
    path = sorted(out.glob("checkpoints/step-*/trainer.json"))[-1]
    state = unseal(json.loads(path.read_bytes()), "trainer.json")
    path.write_bytes(seal(state | {"order": state["order"]["losses"]}))
    before = (out / "metrics.jsonl").read_bytes()
    with pytest.raises(CheckpointError, match="begun by another version") as caught:
        replaying(domains_world, out)()
    assert caught.value.exit_code == 3
    assert (out / "metrics.jsonl").read_bytes() == before


def test_seconds_go_on_counting(domains_world, tmp_path):
    """After a resume, from those of the checkpoint."""
    out = tmp_path / "run"

    def stop(step, values):
        if step == 8:
            os.kill(os.getpid(), signal.SIGKILL)

    assert not ended(fork(lambda: replaying(domains_world, out)(stop)))
    checkpoint = json.loads((out / "checkpoints/step-00000006/trainer.json").read_text())
    replaying(domains_world, out)()
    seconds = {r["step"]: r["seconds"] for r in read_metrics(out) if r["kind"] == "train"}
    assert list(seconds) == list(range(1, STEPS + 1))
    assert sorted(seconds.values()) == list(seconds.values())
    assert seconds[6] <= checkpoint["seconds"] < seconds[7]
    assert seconds[STEPS] <= json.loads((out / "summary.json").read_text())["seconds"]


def test_a_second_process_on_a_run_is_refused_and_touches_nothing(masked_world, whole, tmp_path):
    out = tmp_path / "run"

    def touched():
        found = out.glob("**/*")  # TensorBoard's file is the first one's, in a thread of its own
        return {p: p.stat().st_mtime_ns for p in found if not p.name.startswith("events.")}

    def begin_again(step, values):
        if step in (1, 8):
            before = touched()
            with pytest.raises(InputError, match=f"another process works on .*{os.getpid()}"):
                train(masked_world, out)()
            assert touched() == before

    train(masked_world, out)(begin_again)
    assert_same(out, whole)
    assert not list(out.glob("**/.*"))  # neither a lock nor anything unfinished


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

    places = [(checkpoint, "save_file"), (checkpoint, "sha256_of")]
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


@pytest.mark.parametrize(
    "share", [0.62, *(pytest.param(s, marks=pytest.mark.slow) for s in (0.1, 0.37, 0.9))]
)
def test_a_run_that_dies_while_it_writes(masked_world, whole, calls, tmp_path, share):
    dies_at_and_goes_on(masked_world, tmp_path / "run", 1 + int(share * calls))
    assert_same(tmp_path / "run", whole)


@pytest.mark.slow
def test_a_run_that_dies_at_any_call_that_writes(masked_world, whole, calls, tmp_path):
    for number in range(1, calls + 1, 3):
        dies_at_and_goes_on(masked_world, tmp_path / f"{number}", number)
        assert_same(tmp_path / f"{number}", whole)
        shutil.rmtree(tmp_path / f"{number}")


def test_a_run_whose_checkpoints_are_damaged_or_gone_is_left_as_it_is(masked_world, tmp_path):
    """What they held would be trained again without a word, and the metrics cut."""
    out = tmp_path / "run"

    def stop(step, values):
        if step == 8:
            os.kill(os.getpid(), signal.SIGKILL)

    assert not ended(fork(lambda: train(masked_world, out)(stop)))
    told = (out / "metrics.jsonl").read_bytes()
    for folder in (out / "checkpoints").iterdir():
        (folder / "trainer.json").write_text("{}")
    for _ in ("damaged", "gone"):
        with pytest.raises(CheckpointError, match=r"cannot continue: .* records . steps"):
            train(masked_world, out)()
        assert (out / "metrics.jsonl").read_bytes() == told
        shutil.rmtree(out / "checkpoints", ignore_errors=True)
