"""The listener that is told how far work has got: a progress bar, or nobody."""

from typing import Protocol


class Watch(Protocol):
    """A listener for progress, such as a progress task of the command line."""

    def expect(self, total: int | None) -> None:
        """Announce the total number of units; None: unknown."""
        return

    def advance(self, amount: int = 1) -> None:
        """Report that more units are done."""
        return


class _Nobody(Watch):
    """Ignores all reports."""


NOBODY = _Nobody()
