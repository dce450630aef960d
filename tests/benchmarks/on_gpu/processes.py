"""Runs a command within a time, and leaves no process of it behind."""

import os
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

PATIENCE = 10.0  # seconds that killed processes have to give back what they hold


def run_within(command: Sequence[str], seconds: float, **options: Any) -> str | None:
    """Return why a command failed; None if it is done. ``options`` are Popen's.

    It ends with all processes that it has started, whether it is late or done: also those with a
    session of their own, as torchrun's are, and those whose parents have ended. They are told by a
    variable of their environment, which a process has from the one that starts it.
    """
    mark = f"REKINDLE_PART_{uuid.uuid4().hex}"
    environment = {**os.environ, **options.pop("env", {}), mark: "1"}
    process = subprocess.Popen(command, start_new_session=True, env=environment, **options)
    try:
        code = process.wait(max(0.0, seconds))
        return f"ended with exit code {code}" if code else None
    except subprocess.TimeoutExpired:
        return f"not done within {seconds:.0f} s"
    finally:
        _kill(process.pid, os.killpg)
        process.wait()
        until = time.monotonic() + PATIENCE
        while (left := _marked(mark)) and time.monotonic() < until:
            for pid in left:
                _kill(pid, os.kill)
            time.sleep(0.05)


def _kill(number: int, how: Callable[[int, int], None]) -> None:
    with suppress(ProcessLookupError):  # it has ended itself
        how(number, signal.SIGKILL)


def _marked(mark: str) -> list[int]:
    """Return the processes of this user with this variable in their environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark.encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:  # has ended, or is another user's
            continue
    return found
