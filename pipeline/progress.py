"""Progress of long work, on stderr: bars on a terminal; elsewhere a line now and then, and one per
finished task.
"""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich import progress as rich_progress
from rich.console import Console
from rich.table import Column

from rekindle.pipeline.console import in_line

log = logging.getLogger("rekindle")

LINE_EVERY = 30.0  # seconds, where there is no terminal
Show = Callable[["ProgressTask", str | None], None]


class ProgressTask:
    """One line of progress: drawn, logged now and then, or only counted.

    ``show`` is called at each change with the task and the note, if there is a new one.
    """

    def __init__(self, name: str, unit: str, total: int | None = None, show: Show | None = None):
        self.name, self.unit, self.total = name, unit, total
        self.counts: dict[str, float] = {}
        self.done = self.before = 0
        self.started = time.monotonic()
        self._show: Show = show or (lambda task, note: None)

    def begin(self, done: int) -> None:
        """Measure speed from now on; ``done`` units were there before."""
        self.done = self.before = done
        self.started = time.monotonic()
        self._show(self, None)

    def expect(self, total: int | None) -> None:
        """Take ``total`` units for all there are, once that is known."""
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
        """Say units per second, tokens per second and bytes so far."""
        seconds = max(time.monotonic() - self.started, 1e-9)
        parts = [f"{(self.done - self.before) / seconds:,.1f} {self.unit}/s"]
        if "tokens" in self.counts:
            parts.append(f"{self.counts['tokens'] / seconds:,.0f} tokens/s")
        if "bytes" in self.counts:
            parts.append(f"{self.counts['bytes'] / 1e6:,.1f} MB")
        return " · ".join(parts)


def _lines() -> Show:
    """Log a line, unless there was one a moment ago; for who gives notes, at these alone."""
    said, noted = time.monotonic(), False

    def show(task: ProgressTask, note: str | None) -> None:
        nonlocal said, noted
        noted = noted or note is not None
        now, nothing_yet = time.monotonic(), task.done == task.before
        if nothing_yet or now - said < LINE_EVERY or (noted and note is None):
            return
        said = now
        of, left = "", ""
        if task.total:
            made = max(task.done - task.before, 1)
            remaining = (now - task.started) / made * (task.total - task.done)
            of, left = f" of {task.total:,}", f" · {timedelta(seconds=round(remaining))} left"
        text = task.rates() if note is None else note
        log.info("%s: %s%s %s · %s%s", task.name, f"{task.done:,}", of, task.unit, text, left)

    return show


class Progress:
    """Makes tasks; ``Progress.to_terminal()`` as a context manager draws them."""

    def __init__(self, bars: rich_progress.Progress | None = None, quiet: bool = True):
        self._bars, self._quiet = bars, quiet

    @property
    def is_shown(self) -> bool:
        """Whether anybody sees it."""
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
            yield cls(quiet=silent)
            return
        # On a narrow terminal the note is cut, never the count and the time that is left.
        width, kept = console.width, Column(no_wrap=True, min_width=9)
        named = Column(no_wrap=True, overflow="ellipsis", max_width=max(12, width // 5))
        noted = Column(no_wrap=True, overflow="ellipsis", ratio=1)
        columns = (
            rich_progress.TextColumn("{task.description}", markup=False, table_column=named),
            rich_progress.BarColumn(bar_width=max(5, width // 10)),
            rich_progress.MofNCompleteColumn(table_column=kept),
            rich_progress.TimeRemainingColumn(table_column=kept.copy()),
            rich_progress.TextColumn("{task.fields[note]}", markup=False, table_column=noted),
        )
        with rich_progress.Progress(*columns, console=console, expand=True) as bars:
            yield cls(bars, quiet=False)

    @contextmanager
    def task(self, name: str, unit: str, total: int | None = None) -> Iterator[ProgressTask]:
        """Show a task of ``total`` units (None: unknown) while the block runs."""
        bars = self._bars
        if bars is None:
            task = ProgressTask(name, unit, total, None if self._quiet else _lines())
            yield task
            if not self._quiet and task.done:
                seconds, done = time.monotonic() - task.started, f"{task.done:,}"
                log.info("%s: %s %s in %.1f s (%s)", name, done, unit, seconds, task.rates())
            return
        bar = bars.add_task(in_line(name), total=total, note="")

        def show(task: ProgressTask, note: str | None) -> None:
            told = task.rates() if note is None else in_line(note)
            bars.update(bar, completed=task.done, total=task.total, note=told)

        task = ProgressTask(name, unit, total, show)
        yield task
        bars.update(bar, total=task.done, completed=task.done)


SILENT = Progress.silent()
