"""Progress of long work on stderr: bars on a terminal; elsewhere a log line per minute for each
task, even a silent one, and one when it finishes.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich import progress as rich_progress
from rich.console import Console
from rich.table import Column
from rich.text import Text

from rekindle.data.counted import counted
from rekindle.pipeline.console import in_line

log = logging.getLogger("rekindle")

LINE_EVERY = 60.0  # seconds, without a terminal
TICK = 15.0  # seconds between checks for silent tasks
SILENCE = LINE_EVERY + TICK  # seconds after which a silent task gets a line
Show = Callable[["ProgressTask", str | None], None]


class ProgressTask:
    """One line of progress: drawn, logged now and then, or only counted.

    ``show`` is called at each change with the task and the note, if there is a new one. An empty
    ``unit`` means that nothing is counted: the work is running or done.
    """

    def __init__(self, name: str, unit: str, total: int | None = None, show: Show | None = None):
        self.name, self.unit, self.total = name, unit, total
        self.counts: dict[str, float] = {}
        self.done = self.done_before = 0
        self.started = time.monotonic()
        self._show: Show = show or (lambda task, note: None)

    def begin(self, done: int) -> None:
        """Measure speed from now on; ``done`` units existed before."""
        self.done = self.done_before = done
        self.started = time.monotonic()
        self._show(self, None)

    def expect(self, total: int | None) -> None:
        """Set the ``total`` number of units, once it is known."""
        self.total = total
        self.begin(self.done)

    def advance(self, amount: int = 1, **counts: float) -> None:
        """Count ``amount`` more units as done, and anything else by name."""
        self.done += amount
        for name, value in counts.items():
            self.counts[name] = self.counts.get(name, 0) + value
        self._show(self, None)

    def note(self, text: str) -> None:
        """Show ``text`` beside the bar, or in the lines instead of the rates."""
        self._show(self, text)

    def rates(self) -> str:
        """Return units per second, tokens per second and bytes so far, as far as they are known."""
        seconds = max(time.monotonic() - self.started, 1e-9)
        newly_done, parts = self.done - self.done_before, list[str]()
        if newly_done > 1 and self.unit:  # one unit gives no rate
            parts.append(f"{newly_done / seconds:,.1f} {self.unit}/s")
        if "tokens" in self.counts:
            parts.append(f"{self.counts['tokens'] / seconds:,.0f} tokens/s")
        if "bytes" in self.counts:
            parts.append(f"{self.counts['bytes'] / 1e6:,.1f} MB")
        return " · ".join(parts)

    def counted(self) -> str:
        """Return how many units are done, of how many; empty if none are counted."""
        if not self.unit:
            return ""
        singular = self.unit.removesuffix("s")
        if self.total:
            return f"{self.done:,} of {counted(self.total, singular)}"
        return counted(self.done, singular)


class _Lines:
    """The log lines of a task: one per minute, or only at notes if the task gives notes."""

    def __init__(self) -> None:
        self.last_time, self.note = time.monotonic(), ""

    def show(self, task: ProgressTask, note: str | None) -> None:
        """Log a line, unless the last one is recent."""
        self.note = note or self.note
        if time.monotonic() - self.last_time >= LINE_EVERY and not (self.note and note is None):
            self.log_line(task)

    def log_line(self, task: ProgressTask) -> None:
        """Log a line: how far the task is, its note or its rates, and the time left."""
        self.last_time, seconds = time.monotonic(), time.monotonic() - task.started
        time_left = ""
        newly_done = task.done - task.done_before
        rates = task.rates() if newly_done else ""
        text = self.note or rates or f"at work for {_clock(seconds)}"
        if task.total and newly_done:
            time_left = f" · {_clock(seconds / newly_done * (task.total - task.done))} left"
        message = " · ".join(filter(None, [task.counted(), text]))
        log.info("%s: %s%s", task.name, message, time_left)


class _Counts(rich_progress.MofNCompleteColumn):
    """Show how many units are done, of how many; if none are counted, whether the task is done."""

    def render(self, task: rich_progress.Task) -> Text:
        """Leave out an unknown total."""
        if not task.fields.get("unit"):
            return Text("done" if task.finished else "")
        return super().render(task) if task.total is not None else Text(f"{task.completed:,.0f}")


def _clock(seconds: float) -> timedelta:
    return timedelta(seconds=round(seconds))


class Progress:
    """Makes tasks; ``Progress.to_terminal()`` as a context manager draws them."""

    def __init__(self, bars: rich_progress.Progress | None = None, quiet: bool = True):
        self._bars, self._quiet = bars, quiet
        self._at_work: dict[ProgressTask, _Lines] = {}

    @property
    def is_shown(self) -> bool:
        """Whether progress is shown at all."""
        return self._bars is not None or not self._quiet

    @classmethod
    def silent(cls) -> "Progress":
        """Draw nothing and log nothing."""
        return cls()

    @classmethod
    @contextmanager
    def to_terminal(cls, silent: bool = False) -> Iterator["Progress"]:
        """Draw bars if stderr is a terminal; else log lines. Neither if ``silent``."""
        console = Console(stderr=True)
        if silent or not console.is_terminal:
            lines, ended = cls(quiet=silent), threading.Event()
            threading.Thread(target=lines._watch_silence, args=(ended,), daemon=True).start()
            try:
                yield lines
            finally:
                ended.set()
            return
        # On a narrow terminal the note is cut, never the count and the time left.
        width, count_column = console.width, Column(no_wrap=True, min_width=9)
        name_column = Column(no_wrap=True, overflow="ellipsis", max_width=max(12, width // 5))
        note_column = Column(no_wrap=True, overflow="ellipsis", ratio=1)
        columns = (
            rich_progress.TextColumn("{task.description}", markup=False, table_column=name_column),
            rich_progress.BarColumn(bar_width=max(5, width // 10)),
            _Counts(table_column=count_column),
            rich_progress.TimeRemainingColumn(table_column=count_column.copy()),
            rich_progress.TextColumn("{task.fields[note]}", markup=False, table_column=note_column),
        )
        with rich_progress.Progress(*columns, console=console, expand=True) as bars:
            yield cls(bars, quiet=False)

    @contextmanager
    def task(self, name: str, unit: str, total: int | None = None) -> Iterator[ProgressTask]:
        """Show a task of ``total`` units (None: unknown) while the block runs.

        ``unit`` is a plural. If it is empty, the task only shows that it is running, and then done.
        """
        bars = self._bars
        if bars is None:
            lines = _Lines()
            task = ProgressTask(name, unit, total, None if self._quiet else lines.show)
            self._at_work[task] = lines
            try:
                yield task
            finally:
                del self._at_work[task]
            if not self._quiet and task.done:
                seconds = time.monotonic() - task.started
                rates = f" ({text})" if (text := task.rates()) else ""
                done = counted(task.done, unit.removesuffix("s")) if unit else "done"
                log.info("%s: %s in %.1f s%s", name, done, seconds, rates)
            return
        bar = bars.add_task(in_line(name), total=total, note="", unit=unit)

        def show(task: ProgressTask, note: str | None) -> None:
            text = task.rates() if note is None else in_line(note)
            bars.update(bar, completed=task.done, total=task.total, note=text)

        task = ProgressTask(name, unit, total, show)
        yield task
        bars.update(bar, total=task.done, completed=task.done)

    def _watch_silence(self, ended: threading.Event) -> None:
        """Log that a long silent task is at work, until everything has ended."""
        while not self._quiet and not ended.wait(TICK):
            self.say_at_work()

    def say_at_work(self) -> None:
        """Log a line for each task that has been silent for SILENCE seconds."""
        for task, lines in list(self._at_work.items()):
            if time.monotonic() - lines.last_time >= SILENCE:
                lines.log_line(task)


SILENT = Progress.silent()
