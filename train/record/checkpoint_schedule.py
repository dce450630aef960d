"""When a run writes a checkpoint, and when it ends early: the same in all its processes."""

import time

from rekindle.train.distributed import World
from rekindle.train.interrupts import Stop
from rekindle.train.schedules import seconds_of


class CheckpointSchedule:
    """Decides after each step, the same in every process of a ``world``.

    ``every``: steps between checkpoints, or a time as in ``train.checkpoint_every``, measured by
    the main process. ``stop``: whether this process was told to end.
    """

    def __init__(self, every: int | str, world: World, stop: Stop):
        self.world, self.stop = world, stop
        self.every = seconds_of(every) if isinstance(every, str) else every
        self.by_time = isinstance(every, str)
        self._since = time.monotonic()

    def after(self, steps_done: int) -> tuple[bool, bool]:
        """Return whether a checkpoint is due after ``steps_done`` steps, and whether the run must
        end.
        """
        due = not self.by_time and steps_done % self.every == 0
        if self.by_time and self.world.main:
            due = time.monotonic() - self._since >= self.every
        # If one process was told to end, or the main one's time is up, it holds for all.
        votes = self.world.sum([float(due and self.world.main), float(self.stop.is_requested)])
        return votes[0] > 0, votes[1] > 0

    def saved(self) -> None:
        """Note that a checkpoint was written: the next one is due after the same time again."""
        self._since = time.monotonic()
