"""What a user sees while a model is fine-tuned, on stderr: a bar and a line an epoch above it on a
terminal; elsewhere a line an epoch, and one a minute within a long one, in the log.
"""

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LINE_EVERY = 60.0  # seconds
logger = logging.getLogger("rekindle")


class SeedLines:
    """Tells of one seed: ``step`` now and then within an epoch, ``epoch`` at its end."""

    def __init__(self, bars: Progress, seed: int, epochs: int, steps: int):
        self._bars, self._seed, self._epochs, self._steps = bars, seed, epochs, steps
        self._bar = bars.add_task(f"seed {seed}", total=steps)
        self._said = time.monotonic()

    def step(self, epoch: int, step: int, loss: float) -> None:
        """Move the bar; without one say a line, if none was said for a minute."""
        told = self._told(epoch, loss)
        self._bars.update(self._bar, completed=step, description=told)
        if self._bars.disable and time.monotonic() - self._said >= LINE_EVERY:
            self.say(f"{told}  step {step:,} of {self._steps:,}")

    def epoch(self, epoch: int, loss: float, metric: str, score: float) -> None:
        """Say what an epoch came to."""
        self.say(f"{self._told(epoch, loss)}  dev {metric} {score:.4f}")

    def say(self, line: str) -> None:
        """One line: above the bar on a terminal, else in the log."""
        self._said = time.monotonic()
        if self._bars.disable:
            logger.info(line)
        else:
            self._bars.console.print(line, markup=False, highlight=False)

    def end(self) -> None:
        """Take the bar away."""
        self._bars.remove_task(self._bar)

    def _told(self, epoch: int, loss: float) -> str:
        return f"seed {self._seed}  epoch {epoch}/{self._epochs}  loss {loss:.4f}"


@contextmanager
def seed_bars() -> Iterator[Progress]:
    """Draw bars while the block runs, where stderr is a terminal."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    console, silent = Console(stderr=True), not sys.stderr.isatty()
    with Progress(*columns, console=console, disable=silent) as bars:
        yield bars
