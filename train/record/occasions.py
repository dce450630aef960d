"""When a run writes a checkpoint, and when it ends early: the same in all its processes."""

import time

from rekindle.train.distributed import World
from rekindle.train.interrupts import Stop
from rekindle.train.schedules import seconds_of


class Occasions:
    """Asked after each step by every process of a ``world``.

    ``every``: steps between checkpoints, or a time as ``train.checkpoint_every`` has it, which is
    that of the main process. ``stop``: whether this process was told to end.
    """

    def __init__(self, every: int | str, world: World, stop: Stop):
        self.world, self.stop = world, stop
        self.every = seconds_of(every) if isinstance(every, str) else every
        self.by_time = isinstance(every, str)
        self._since = time.monotonic()

    def after(self, done: int) -> tuple[bool, bool]:
        """Return whether a checkpoint of ``done`` steps is due, and whether the run is to end."""
        due = not self.by_time and done % self.every == 0
        if self.by_time and self.world.main:
            due = time.monotonic() - self._since >= self.every
        # One is told to end, or the main one's time is up: so for all.
        wishes = self.world.sum([float(due and self.world.main), float(self.stop.asked)])
        return wishes[0] > 0, wishes[1] > 0

    def saved(self) -> None:
        """A checkpoint was written: the next one is due after as long again."""
        self._since = time.monotonic()
