"""Progress of long work, on stderr: bars on a terminal; elsewhere a line now and then, and one per
finished task.
"""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

log = logging.getLogger("rekindle")

LINE_EVERY = 30.0  # seconds, where there is no terminal


class Task:
    """One line of progress. ``advance`` counts units of work and anything else by name."""

    def __init__(
        self,
        name: str,
        unit: str,
        bar: Any = None,
        line: Any = None,
        total: int | None = None,
        quiet: bool = True,
    ):
        self.name, self.unit, self.total, self.quiet = name, unit, total, quiet
        self.counts: dict[str, float] = {}
        self.done = 0
        self.started = self._said = time.monotonic()
        self._bar, self._line, self._noted = bar, line, False
        self._before = 0

    def begin(self, done: int) -> None:
        """What follows is measured from now on; ``done`` units were there before."""
        self.done = self._before = done
        self.started = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._line, completed=done)

    def advance(self, amount: int = 1, **counts: float) -> None:
        """``amount`` more units are done."""
        self.done += amount
        for name, value in counts.items():
            self.counts[name] = self.counts.get(name, 0) + value
        if self._bar is not None:
            self._bar.update(self._line, advance=amount, note=self.rates())
        elif not self._noted:
            self._say(self.rates)

    def note(self, text: str) -> None:
        """Show ``text`` beside the bar, or in the lines instead of the rates."""
        self._noted = True
        if self._bar is not None:
            self._bar.update(self._line, note=text)
        else:
            self._say(lambda: text)

    def _say(self, text: Callable[[], str]) -> None:
        """A line in the log, unless there was one a moment ago."""
        now = time.monotonic()
        if self.quiet or now - self._said < LINE_EVERY:
            return
        self._said = now
        of, left = "", ""
        if self.total:
            made = max(self.done - self._before, 1)
            remaining = (now - self.started) / made * (self.total - self.done)
            of, left = f" of {self.total:,}", f" · {timedelta(seconds=round(remaining))} left"
        log.info("%s: %s%s %s · %s%s", self.name, f"{self.done:,}", of, self.unit, text(), left)

    def rates(self) -> str:
        """Units per second, tokens per second and bytes so far."""
        seconds = max(time.monotonic() - self.started, 1e-9)
        parts = [f"{(self.done - self._before) / seconds:,.1f} {self.unit}/s"]
        if "tokens" in self.counts:
            parts.append(f"{self.counts['tokens'] / seconds:,.0f} tokens/s")
        if "bytes" in self.counts:
            parts.append(f"{self.counts['bytes'] / 1e6:,.1f} MB")
        return " · ".join(parts)


class Progress:
    """Makes tasks; ``Progress.to_terminal()`` as a context manager draws them."""

    def __init__(self, bar: Any = None, quiet: bool = True):
        self._bar = bar
        self._quiet = quiet

    @classmethod
    def silent(cls) -> "Progress":
        """Draws nothing and logs nothing."""
        return cls()

    @classmethod
    @contextmanager
    def to_terminal(cls) -> Iterator["Progress"]:
        """Bars if stderr is a terminal, else a log line per finished task."""
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars
        from rich.table import Column

        console = Console(stderr=True)
        if not console.is_terminal:
            yield cls(quiet=False)
            return
        # On a narrow terminal the note is cut, never the count and the time that is left.
        width, kept = console.width, Column(no_wrap=True, min_width=9)
        named = Column(no_wrap=True, overflow="ellipsis", max_width=max(12, width // 5))
        noted = Column(no_wrap=True, overflow="ellipsis", ratio=1)
        columns = (
            TextColumn("{task.description}", table_column=named),
            BarColumn(bar_width=max(5, width // 10)),
            MofNCompleteColumn(table_column=kept),
            TimeRemainingColumn(table_column=kept.copy()),
            TextColumn("{task.fields[note]}", table_column=noted),
        )
        with Bars(*columns, console=console, expand=True) as bars:
            yield cls(bars, quiet=False)

    @contextmanager
    def task(self, name: str, unit: str, total: int | None = None) -> Iterator[Task]:
        """A task of ``total`` units (None: unknown)."""
        line = self._bar.add_task(name, total=total, note="") if self._bar is not None else None
        task = Task(name, unit, self._bar, line, total, self._quiet)
        yield task
        if self._bar is not None:
            self._bar.update(line, total=task.done, completed=task.done)
        elif not self._quiet and task.done:
            seconds = time.monotonic() - task.started
            log.info(
                "%s: %s %s in %.1f s (%s)", name, f"{task.done:,}", unit, seconds, task.rates()
            )
