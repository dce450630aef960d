"""Handle Ctrl-C and SIGTERM: when they take effect, and what is then reported. Without torch.

A signal ends work at once, as KeyboardInterrupt, unless a moment more saves what was done: there
``Stop`` notes it, and the work ends at its next good place.
"""

import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from rekindle.train.launch import is_one_of_many

log = logging.getLogger("rekindle")

# seconds within which a second signal counts as the first, sent to a group and to its leader
SAME_SIGNAL_SECONDS = 1.0
_OURS = (signal.SIG_DFL, signal.default_int_handler)  # any other handler is the caller's and stays


class Interrupted(KeyboardInterrupt):
    """An interrupt, and what can be continued: ``message`` follows the word "interrupted".

    ``is_saved``: whether anything was saved.
    """

    def __init__(self, message: str, is_saved: bool = True):
        super().__init__(message, is_saved)
        self.message, self.is_saved = message, is_saved


@contextmanager
def reporting_interrupts(describe_kept: Callable[[], tuple[str, bool]]) -> Iterator[None]:
    """Make an interrupt within the block say what was saved, unless that was said further inside.

    ``describe_kept`` returns a description of it, and whether anything was saved.
    """
    try:
        yield
    except Interrupted:
        raise
    except KeyboardInterrupt:
        message, is_saved = describe_kept()
        raise Interrupted(f"; {message}", is_saved) from None


def obey_sigterm() -> None:
    """Make SIGTERM end this process's work as Ctrl-C does."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


class Stop:
    """Remembers that this process was told to end, for work that ends at a place of its own choice.

    After ``listen`` the first signal is noted and logged (with ``at_once`` it interrupts, because
    others save the work), and a second one interrupts at once, unless it comes within SAME seconds
    and thus counts as the first. In a process started by another one, no signal interrupts: the
    other one forwards signals and ends processes that take too long.
    """

    def __init__(self, patient: bool, at_once: bool = False):
        self.is_requested = False
        self._patient = patient or is_one_of_many()
        self._at_once = at_once
        self._handlers_before: dict[signal.Signals, object] = {}
        self._requested_at = 0.0

    @classmethod
    @contextmanager
    def heard(cls, at_once: bool = False) -> Iterator["Stop"]:
        """Yield a Stop that hears signals from its ``listen`` to the end of the block."""
        started = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        stop = cls(patient=started and not at_once, at_once=at_once)
        try:
            yield stop
        finally:
            for number, handler in stop._handlers_before.items():
                signal.signal(number, handler)  # type: ignore[arg-type]

    def listen(self) -> None:
        """Hear signals from now on; does nothing outside the main thread."""
        if self._handlers_before or threading.current_thread() is not threading.main_thread():
            return
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) in _OURS:
                self._handlers_before[number] = signal.signal(number, self._handle_signal)

    def note_request(self) -> None:
        """Note that this process was told to end; a further signal counts as a second one."""
        if not self.is_requested:
            self.is_requested, self._requested_at = True, time.monotonic()

    def _handle_signal(self, number: int, frame: FrameType | None) -> None:
        if not self.is_requested:
            self.note_request()
            if self._at_once:
                raise KeyboardInterrupt
            hint = "" if self._patient else "; a second Ctrl-C ends at once"
            log.info("told to end: finishing the step and writing a checkpoint%s", hint)
        elif time.monotonic() - self._requested_at > SAME_SIGNAL_SECONDS and not self._patient:
            raise KeyboardInterrupt
