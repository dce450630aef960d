"""Forked children, and processes found in /proc."""

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path


class Child:
    """A forked process that runs ``work``; its stderr is kept."""

    def __init__(self, work: Callable[[], object]):
        # A pipe, which works even if the process may not write to files.
        self._pipe, end = os.pipe()
        self._said = b""
        self.status: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            self._run(work, end)
        os.close(end)
        os.set_blocking(self._pipe, False)

    def _run(self, work: Callable[[], object], end: int) -> None:
        code = 1
        try:
            os.setpgid(0, 0)
            os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads are not forked
            sys.stderr = open(end, "w", buffering=1)  # noqa: SIM115
            try:
                work()
                code = 0
            except SystemExit as leaving:
                code = int(leaving.code or 0)
            except BaseException:
                traceback.print_exc()
        finally:
            os._exit(code)

    @property
    def errors(self) -> str:
        with suppress(BlockingIOError):
            while more := os.read(self._pipe, 1 << 16):
                self._said += more
        return self._said.decode()

    def closed(self) -> bool:
        """Return whether nobody is left who could write to the pipe."""
        try:
            more = os.read(self._pipe, 1 << 16)
        except BlockingIOError:
            return False
        self._said += more
        return not more

    def ended(self) -> bool:
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.status = os.waitstatus_to_exitcode(status) if pid else None
        return self.status is not None

    def wait(self, seconds: float = 300) -> int:
        """Return its exit code, or minus the signal that ended it."""
        until(self.ended, seconds)
        if self.status is None:
            os.killpg(self.pid, signal.SIGKILL)
            raise AssertionError(f"it did not end: {self.errors}")
        return self.status


def until(condition: Callable[[], object], seconds: float = 300) -> bool:
    """Return whether the condition became true in time."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


def stat_of(pid: int) -> list[str]:
    """Return state, parent, group, … of a process; [] if there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def alive(pids: set[int]) -> set[int]:
    return {pid for pid in pids if (stat := stat_of(pid)) and stat[0] not in "ZX"}


def descendants(pid: int) -> set[int]:
    found: set[int] = set()
    everything = {int(p.name) for p in Path("/proc").iterdir() if p.name.isdecimal()}
    parents = {p: int(stat[1]) for p in everything if (stat := stat_of(p))}
    while more := {p for p, parent in parents.items() if parent in found | {pid}} - found:
        found |= more
    return found


def before_call(owner, name, number, act, put=setattr):
    """Call ``act`` before the ``number``-th call of ``owner.name``: permanently (in a child), or as
    long as ``put`` says (``monkeypatch.setattr``).
    """
    real, calls = getattr(owner, name), []

    def call(*arguments, **options):
        calls.append(name)
        if len(calls) == number:
            act()
        return real(*arguments, **options)

    put(owner, name, call)
