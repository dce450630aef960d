"""The progress of a fine-tuning: a bar for each seed on a terminal; otherwise a line for each
epoch, and for each minute of a long one.
"""

import logging
import sys
import time
from collections.abc import Callable

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

logger = logging.getLogger("rekindle")

LINE_EVERY = 60.0  # seconds within an epoch

Report = Callable[[str], None]  # gets each line, wherever else it is shown


class SeedProgress(Progress):
    """``report`` gets every line too."""

    def __init__(self, report: Report):
        super().__init__(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not sys.stderr.isatty(),
        )
        self._report, self._last_line = report, time.monotonic()

    def step(self, bar: TaskID, step: int, line: str) -> None:
        """Show that ``step`` steps of the seed with that bar are done."""
        self.update(bar, completed=step, description=line)
        if self.disable and time.monotonic() - self._last_line >= LINE_EVERY:
            self.tell(f"{line}  step {step}")

    def tell(self, line: str) -> None:
        """Show one line per epoch: above the bar on a terminal, else in the log."""
        self._last_line = time.monotonic()
        self._report(line)
        if self.disable:
            logger.info(line)
        else:
            self.console.print(line, markup=False)
