"""Who is told how far the work is: a bar, or nobody."""

from typing import Protocol


class Watch(Protocol):
    """A progress task of the command line, for one."""

    def expect(self, total: int | None) -> None:
        """There are so many units in all; None: it is not known."""
        return

    def advance(self, amount: int = 1) -> None:
        """So many more are done."""
        return


class _Nobody(Watch):
    """Looks away."""


NOBODY = _Nobody()
