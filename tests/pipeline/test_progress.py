"""Progress without a terminal: a line a minute, with what is left; and one at the end."""

import logging
import re

import pytest
from rich.console import Console
from rich.progress import MofNCompleteColumn

from rekindle.pipeline import progress as module
from rekindle.pipeline.processes.jobs import Report, StepReports
from rekindle.pipeline.progress import Progress, ProgressTask


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def lines(caplog):
    return [record.getMessage() for record in caplog.records]


def test_a_line_a_minute_and_one_at_the_end(clock, caplog):
    with (
        caplog.at_level(logging.INFO, logger="rekindle"),
        Progress(quiet=False).task("run", "steps", total=200) as task,
    ):
        for _ in range(200):
            clock[0] += 1.0
            task.advance(1, tokens=10)
    found = lines(caplog)
    assert found[0] == "run: 60 of 200 steps · 1.0 steps/s · 10 tokens/s · 0:02:20 left"
    assert [line.split()[1] for line in found[:3]] == ["60", "120", "180"]
    assert found[3] == "run: 200 steps in 200.0 s (1.0 steps/s · 10 tokens/s)"
    assert len(found) == 4


def test_a_bar_without_units_has_no_count(monkeypatch):
    monkeypatch.setattr(Console, "is_terminal", True)
    monkeypatch.setenv("COLUMNS", "100")
    with Progress.to_terminal() as progress:
        bars = progress._bars
        with (
            progress.task("caching", "") as alone,
            progress.task("reading", "rows") as open_end,
            progress.task("training", "steps", 4) as counted,
        ):
            for task in (open_end, counted):
                task.advance(3)
            column = next(one for one in bars.columns if isinstance(one, MofNCompleteColumn))
            assert [column.render(task).plain for task in bars.tasks] == ["", "3", "3/4"]
            alone.advance()
        assert column.render(bars.tasks[0]).plain == "done"


def test_what_says_nothing_is_said_to_be_at_work(clock, caplog):
    progress = Progress(quiet=False)
    with (
        caplog.at_level(logging.INFO, logger="rekindle"),
        progress.task("expert", "steps") as silent,
        progress.task("run", "steps", total=90) as told,
    ):
        for second in range(1, 171):
            clock[0] += 1.0
            if second <= 30:
                told.advance(1)
            progress.say_at_work()
        silent.note("seed 1, epoch 2")
    assert lines(caplog) == [
        "expert: 0 steps · at work for 0:01:15",
        "run: 30 of 90 steps · 0.4 steps/s · 0:02:30 left",
        "expert: 0 steps · at work for 0:02:30",
        "run: 30 of 90 steps · 0.2 steps/s · 0:05:00 left",
        "run: 30 steps in 170.0 s (0.2 steps/s)",
    ]


def test_a_note_is_said_instead_of_the_rates(clock, caplog):
    with (
        caplog.at_level(logging.INFO, logger="rekindle"),
        Progress(quiet=False).task("run", "steps") as task,
    ):
        for step in range(70):
            clock[0] += 1.0
            task.advance(1)
            task.note(f"loss {step}.0")
    assert lines(caplog)[0] == "run: 60 steps · loss 59.0"


def test_what_counts_nothing_has_neither_a_number_nor_a_rate(clock, caplog):
    with (
        caplog.at_level(logging.INFO, logger="rekindle"),
        Progress(quiet=False).task("expert on trec", "") as task,
    ):
        clock[0] += 80.0
        task.note("seed 1  epoch 2/5")
        task.advance()
    assert lines(caplog) == [
        "expert on trec: seed 1  epoch 2/5",
        "expert on trec: done in 80.0 s",
    ]


def test_silence_is_silent(clock, caplog):
    with caplog.at_level(logging.INFO, logger="rekindle"), Progress.silent().task("a", "b") as task:
        clock[0] += 1000.0
        task.advance(5)
        task.note("x")
    assert not caplog.records


def test_all_steps_of_a_job_are_reported():
    """Those that were done before, and those that follow."""
    shown = ProgressTask("student", "steps")
    report = Report(lambda tell: tell(shown))
    with StepReports(report).task("student", "steps", total=10) as task:
        task.begin(4)
        for _ in range(6):
            task.advance(1)
    report.advance(1)
    assert task.done == 10
    assert shown.done == 11


def test_what_was_there_before_is_no_speed(clock):
    with Progress.silent().task("run", "steps", total=100) as task:
        clock[0] += 50.0
        task.begin(90)
        clock[0] += 2.0
        task.advance(4)
    assert task.rates() == "2.0 steps/s"


@pytest.mark.parametrize(
    ("done", "told"),
    [(1, r"a task: 1 step in \d+\.\d s"), (2, r"a task: 2 steps in .* s \(.* steps/s\)")],
)
def test_one_of_a_unit_is_told_as_one_and_has_no_rate(caplog, done, told):
    with (
        caplog.at_level(logging.INFO, "rekindle"),
        Progress(quiet=False).task("a task", "steps") as task,
    ):
        task.advance(done)
    assert re.fullmatch(told, caplog.messages[-1])
