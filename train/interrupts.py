"""Ctrl-C and SIGTERM: who hears them, when they are obeyed, and what is then said. Without torch.

A signal ends work at once, as KeyboardInterrupt, but where a moment more keeps what was done: there
``Stop`` notes it, and the work ends by itself at the next good place.
"""

import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from rekindle.train.launch import one_of_many

log = logging.getLogger("rekindle")

SAME = 1.0  # seconds in which a second signal is the first one, sent to a group and to its leader
_OURS = (signal.SIG_DFL, signal.default_int_handler)  # any other handler is the caller's, and stays


class Interrupted(KeyboardInterrupt):
    """An interrupt, and what there is to go on with: ``told`` comes after the word "interrupted".

    ``kept``: whether there is anything.
    """

    def __init__(self, told: str, kept: bool = True):
        super().__init__(told, kept)
        self.told, self.kept = told, kept


@contextmanager
def telling(kept: Callable[[], tuple[str, bool]]) -> Iterator[None]:
    """Say what is ``kept`` (and whether anything is) of what an interrupt ends within the block,
    unless that was said further inside.
    """
    try:
        yield
    except Interrupted:
        raise
    except KeyboardInterrupt:
        told, anything = kept()
        raise Interrupted(f"; {told}", anything) from None


def obey_sigterm() -> None:
    """Have a SIGTERM end this process's work as Ctrl-C does."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


class Stop:
    """Whether this process was told to end, for work that ends at a place of its own choice.

    From ``listen`` on the first signal is noted and said (``at_once``: it interrupts, what is to be
    kept is kept by others), and a second one interrupts at once, but within SAME seconds: that is
    the first one. In a process that another one started none does: that one sends signals on, and
    ends who takes too long.
    """

    def __init__(self, patient: bool, at_once: bool = False):
        self.asked = False
        self._patient = patient or one_of_many()
        self._at_once = at_once
        self._before: dict[signal.Signals, object] = {}
        self._since = 0.0

    @classmethod
    @contextmanager
    def heard(cls, at_once: bool = False) -> Iterator["Stop"]:
        """Give one that hears signals from its ``listen`` to the end of the block."""
        started = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        stop = cls(patient=started and not at_once, at_once=at_once)
        try:
            yield stop
        finally:
            for number, handler in stop._before.items():
                signal.signal(number, handler)  # type: ignore[arg-type]

    def listen(self) -> None:
        """Hear signals from now on; in a thread of a program that is not its main one, none."""
        if self._before or threading.current_thread() is not threading.main_thread():
            return
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) in _OURS:
                self._before[number] = signal.signal(number, self._hear)

    def told(self) -> None:
        """Note that this process was told to end: a signal from now on is a second one."""
        if not self.asked:
            self.asked, self._since = True, time.monotonic()

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if not self.asked:
            self.told()
            if self._at_once:
                raise KeyboardInterrupt
            again = "" if self._patient else "; a second Ctrl-C leaves at once"
            log.info("told to end: the step is finished, and a checkpoint written%s", again)
        elif time.monotonic() - self._since > SAME and not self._patient:
            raise KeyboardInterrupt
