"""Progress of long work, on stderr: bars on a terminal; elsewhere a line now and then, and one per
finished task.
"""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial

from rich import progress as rich_progress
from rich.console import Console
from rich.table import Column

log = logging.getLogger("rekindle")

LINE_EVERY = 30.0  # seconds, where there is no terminal


class ProgressTask:
    """One line of progress: drawn, logged now and then, or only counted (``quiet``).

    ``draw`` takes what changes of the bar, as rich names it.
    """

    def __init__(
        self,
        name: str,
        unit: str,
        total: int | None = None,
        draw: Callable[..., object] | None = None,
        quiet: bool = True,
    ):
        self.name, self.unit, self.total, self.quiet = name, unit, total, quiet
        self.counts: dict[str, float] = {}
        self.done = 0
        self.started = self._said = time.monotonic()
        self._draw, self._noted, self._before = draw, False, 0

    def begin(self, done: int) -> None:
        """Measure speed from now on; ``done`` units were there before."""
        self.done = self._before = done
        self.started = time.monotonic()
        if self._draw is not None:
            self._draw(completed=done)

    def advance(self, amount: int = 1, **counts: float) -> None:
        """Count ``amount`` more units as done, and anything else by name."""
        self.done += amount
        for name, value in counts.items():
            self.counts[name] = self.counts.get(name, 0) + value
        if self._draw is not None:
            self._draw(advance=amount, note=self.rates())
        elif not self._noted:
            self._say(self.rates)

    def note(self, text: str) -> None:
        """Show ``text`` beside the bar, or in the lines instead of the rates."""
        self._noted = True
        if self._draw is not None:
            self._draw(note=text)
        else:
            self._say(lambda: text)

    def _say(self, text: Callable[[], str]) -> None:
        """Log a line, unless there was one a moment ago."""
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
        """Say units per second, tokens per second and bytes so far."""
        seconds = max(time.monotonic() - self.started, 1e-9)
        parts = [f"{(self.done - self._before) / seconds:,.1f} {self.unit}/s"]
        if "tokens" in self.counts:
            parts.append(f"{self.counts['tokens'] / seconds:,.0f} tokens/s")
        if "bytes" in self.counts:
            parts.append(f"{self.counts['bytes'] / 1e6:,.1f} MB")
        return " · ".join(parts)


class Progress:
    """Makes tasks; ``Progress.to_terminal()`` as a context manager draws them."""

    def __init__(self, bars: rich_progress.Progress | None = None, quiet: bool = True):
        self._bars, self._quiet = bars, quiet

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
            rich_progress.TextColumn("{task.description}", table_column=named),
            rich_progress.BarColumn(bar_width=max(5, width // 10)),
            rich_progress.MofNCompleteColumn(table_column=kept),
            rich_progress.TimeRemainingColumn(table_column=kept.copy()),
            rich_progress.TextColumn("{task.fields[note]}", table_column=noted),
        )
        with rich_progress.Progress(*columns, console=console, expand=True) as bars:
            yield cls(bars, quiet=False)

    @contextmanager
    def task(self, name: str, unit: str, total: int | None = None) -> Iterator[ProgressTask]:
        """Show a task of ``total`` units (None: unknown) while the block runs."""
        draw = None
        if self._bars is not None:
            draw = partial(self._bars.update, self._bars.add_task(name, total=total, note=""))
        task = ProgressTask(name, unit, total, draw, self._quiet)
        yield task
        if draw is not None:
            draw(total=task.done, completed=task.done)
        elif not self._quiet and task.done:
            seconds = time.monotonic() - task.started
            log.info(
                "%s: %s %s in %.1f s (%s)", name, f"{task.done:,}", unit, seconds, task.rates()
            )


SILENT = Progress.silent()
