"""Signals to a run: the step in hand is finished, its checkpoint written, and the bits stay."""

import os
import signal
import threading

import pytest

from rekindle.train import loop as module
from rekindle.train.interrupts import SAME_SIGNAL_SECONDS, Interrupted
from rekindle.train.record import checkpoint_schedule
from rekindle.train.record.checkpoint import latest_checkpoint
from testlib.loop import ALL, no_reader_left, run, train_config
from testlib.processes import before_call
from testlib.students import metrics, same_weights


def signalled(*numbers):
    for number in numbers:
        os.kill(os.getpid(), number)


@pytest.mark.parametrize(
    ("where", "number", "signals", "step"),
    [
        ("take_step", 3, [signal.SIGINT], 3),
        ("take_step", 7, [signal.SIGTERM, signal.SIGTERM], 7),  # to the group, and by its leader
        ("_evaluate", 1, [signal.SIGTERM], 5),  # which is finished, as the metrics show
        ("_save", 1, [signal.SIGINT], 5),  # of step 4: the one in hand is the next
        ("_save", 4, [signal.SIGINT], 10),  # of the end
    ],
)
def test_a_signal_leaves_a_checkpoint_of_the_step(
    masked_world, whole, tmp_path, monkeypatch, where, number, signals, step
):
    out, config = tmp_path / "run", train_config(ALL)
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with monkeypatch.context() as patch:
        before_call(module, where, number, lambda: signalled(*signals), patch.setattr)
        with pytest.raises(Interrupted) as caught:
            run(masked_world, out, config)
    assert caught.value.message == f" at step {step}; a checkpoint of it is written"
    assert caught.value.is_saved
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    assert latest_checkpoint(out)[1]["step"] == step
    assert no_reader_left()
    result = run(masked_world, out, config, resume=True)
    assert same_weights(out, whole.directory)
    assert metrics(out) == metrics(whole.directory)
    assert result.coverage == whole.coverage


def test_a_second_signal_interrupts_at_once(masked_world, tmp_path, monkeypatch):
    out = tmp_path / "run"
    now = [0.0]
    monkeypatch.setattr("rekindle.train.interrupts.time.monotonic", lambda: now[0])

    def twice():
        signalled(signal.SIGINT)
        now[0] += SAME_SIGNAL_SECONDS + 0.1
        signalled(signal.SIGINT)

    before_call(module, "take_step", 6, twice, monkeypatch.setattr)
    with pytest.raises(Interrupted) as caught:
        run(masked_world, out, train_config(ALL))
    assert caught.value.message == f"; kept: {out}/checkpoints/step-00000005"


@pytest.mark.parametrize("where", ["prepare", "RunLog"])
def test_a_signal_before_the_first_step_ends_at_once(masked_world, tmp_path, monkeypatch, where):
    before_call(module, where, 1, lambda: signalled(signal.SIGINT), monkeypatch.setattr)
    with pytest.raises(Interrupted) as caught:
        run(masked_world, tmp_path / "run", train_config(ALL))
    assert (caught.value.message, caught.value.is_saved) == ("; there is no checkpoint yet", False)


def test_a_handler_of_the_caller_stays(masked_world, tmp_path, monkeypatch):
    """A scheduler's own, say, which asks for more time; and a thread hears no signals at all."""
    heard = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    try:
        before_call(module, "take_step", 3, lambda: signalled(signal.SIGTERM), monkeypatch.setattr)
        assert run(masked_world, tmp_path / "run", train_config(ALL)).steps == 10
    finally:
        signal.signal(signal.SIGTERM, before)
    assert heard == [signal.SIGTERM]
    done = []
    thread = threading.Thread(
        target=lambda: done.append(run(masked_world, tmp_path / "thread", train_config(ALL)))
    )
    thread.start()
    thread.join()
    assert done[0].steps == 10


def test_checkpoints_by_time(masked_world, whole, tmp_path, monkeypatch):
    """By the clock on the wall, from the end of the one before; the bits stay."""
    clock = [0.0]
    monkeypatch.setattr(checkpoint_schedule.time, "monotonic", lambda: clock[0])
    written = []
    real = module.save_checkpoint

    def save(run, step, *others):
        written.append(step)
        clock[0] += 100.0  # of writing
        return real(run, step, *others)

    def tick(step, values):
        clock[0] += 40.0

    monkeypatch.setattr(module, "save_checkpoint", save)
    config = train_config(ALL, checkpoint_every="2 min", keep_best=None)
    run(masked_world, tmp_path / "run", config, report=tick)
    assert written == [3, 6, 9, 10]
    assert same_weights(tmp_path / "run", whole.directory)
