"""metrics.jsonl: one line per step and kind, whatever was interrupted and resumed."""

import json
import math

import pytest

from rekindle.data.errors import CheckpointError
from rekindle.train.record.run_log import RunLog, read_metrics


def write_steps(run, first, steps, evaluate_every=3):
    log = RunLog(run, first)
    for done in range(first + 1, steps + 1):
        log.write("train", done, {"loss": 1 / done})
        if done % evaluate_every == 0:
            log.write("evaluate", done, {"loss": 2 / done})
    log.close()


def kinds(run):
    return [(record["kind"], record["step"]) for record in read_metrics(run)]


def expected(steps, evaluate_every=3):
    both = [
        [("train", s)] + [("evaluate", s)] * (s % evaluate_every == 0) for s in range(1, steps + 1)
    ]
    return [record for pair in both for record in pair]


def test_records_are_json_lines_in_order(tmp_path):
    write_steps(tmp_path, 0, 5)
    assert kinds(tmp_path) == expected(5)
    first = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    assert first == {"kind": "train", "step": 1, "loss": 1.0}
    assert list((tmp_path / "tensorboard").iterdir())


@pytest.mark.parametrize("checkpoint", range(8))
@pytest.mark.parametrize("reached", [7, 8])
def test_a_resume_leaves_neither_gap_nor_double(tmp_path, checkpoint, reached):
    write_steps(tmp_path, 0, reached)
    write_steps(tmp_path, checkpoint, 10)
    assert kinds(tmp_path) == expected(10)


@pytest.mark.parametrize("cut", range(1, 40, 3))
def test_the_line_that_a_kill_cut_short_is_dropped(tmp_path, cut):
    write_steps(tmp_path, 0, 6)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    assert len(kinds(tmp_path)) < len(expected(6)) or cut == 1
    write_steps(tmp_path, 4, 9)
    assert kinds(tmp_path) == expected(9)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("[1]", "is not a JSON object"),
        ('{"kind": "train", "step": 2', "is not a JSON object"),
        ('{"step": 2, "loss": 1.0}', "has no kind"),
        ('{"kind": "train", "step": 2.5, "loss": 1.0}', "has 2.5 for step"),
        ('{"kind": "train", "step": 2, "loss": "1.0"}', "has '1.0' for loss"),
    ],
)
def test_a_line_that_is_no_record_is_named(tmp_path, line, told):
    write_steps(tmp_path, 0, 3)
    path = tmp_path / "metrics.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], line, *lines[2:]]) + "\n")
    with pytest.raises(CheckpointError, match=rf"metrics\.jsonl is damaged: line 2 {told}"):
        read_metrics(tmp_path)


def test_records_are_on_disk_before_the_log_is_closed(tmp_path):
    log = RunLog(tmp_path, 0)
    log.write("train", 1, {"loss": 0.5})
    assert kinds(tmp_path) == [("train", 1)]
    log.close()


@pytest.mark.parametrize("value", [3e-7, 1.23456789e-5, 0.1, 7.0, 123456789.0, 1e12])
def test_values_keep_their_digits(tmp_path, value):
    """A learning rate of 3e-7 must not be written as 0."""
    log = RunLog(tmp_path, 0)
    log.write("evaluate", 1, {"value": value})
    log.close()
    assert math.isclose(read_metrics(tmp_path)[0]["value"], value, rel_tol=1e-6)


def test_tensorboard_has_every_step_once_after_a_resume(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write_steps(tmp_path, 0, 7)
    for file in (tmp_path / "tensorboard").iterdir():  # files are read in order of these seconds
        file.rename(file.with_name("events.out.tfevents.1000000000.earlier"))
    write_steps(tmp_path, 4, 10)
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [event.step for event in board.Scalars("train/loss")] == list(range(1, 11))
    assert [event.step for event in board.Scalars("evaluate/loss")] == [3, 6, 9]
