"""How the process of a command ends: the exit code, one message, and which process says it.

Nothing heavy is imported, and nothing here knows a command. Under torchrun a process that failed
ends at once: the others may wait for it, and a thread of gloo that still holds a tensor at the
interpreter's own end would abort.
"""

import errno
import os
import shlex
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from rekindle.data.errors import RekindleError
from rekindle.pipeline.console import say

if TYPE_CHECKING:
    from rekindle.pipeline.progress import Progress


def is_main() -> bool:
    """Whether this is the only process, or torchrun's first."""
    return os.environ.get("RANK", "0") == "0"


def is_one_of_many() -> bool:
    """Whether torchrun started this process beside others."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def leave(code: int) -> NoReturn:
    """Exit at once: threads that still compute or read ahead have nothing to save.

    What was downloaded of a cache is removed all the same.
    """
    tidy_up()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def tidy_up() -> None:
    """Remove what was downloaded of a cache; the interpreter's own end does it elsewhere."""
    if "rekindle.data.storage.store" in sys.modules:
        from rekindle.data.storage.store import remove_downloads

        remove_downloads()


@contextmanager
def resumable(line: str) -> Iterator["Progress"]:
    """Show progress; Ctrl-C ends with the line that goes on where it stopped.

    Results are printed after the block: until then the terminal is that of the bars.
    """
    from rekindle.pipeline.progress import Progress

    try:
        with Progress.to_terminal(silent=not is_main()) as progress:
            yield progress
    except KeyboardInterrupt:
        if is_main():
            say(f"\ninterrupted; finished work is kept. To go on: {line}")
        import multiprocessing

        for process in multiprocessing.active_children():
            process.kill()
        leave(130)


def command_again(
    command: list[str],
    out: Path,
    set_: list[str] | None = None,
    sweep: list[str] | None = None,
    workers: int | None = None,
    ending: Sequence[str] = (),
) -> str:
    """The line that goes on with a command, as it would be typed."""
    options = [part for value in set_ or [] for part in ("--set", value)]
    options += [part for value in sweep or [] for part in ("--sweep", value)]
    options += ["--workers", str(workers)] if workers else []
    return shlex.join(["pipeline", *command, "--out", str(out), *options, *ending])


@contextmanager
def errors_as_exit_codes() -> Iterator[None]:
    """What a user can cause becomes one message and an exit code; our bugs keep their traceback."""
    try:
        yield
    except RekindleError as error:
        if str(error) and _speaks():
            say(f"error: {error}")
        _fail(error.exit_code)
    except KeyboardInterrupt:
        say("\ninterrupted")
        leave(130)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        if error.errno is None or (error.filename is None and not full):
            raise
        where = error.filename or f"the disk or the temporary folder ({tempfile.gettempdir()})"
        say(f"error: {where}: {error.strerror}")
        _fail(2)


def _fail(code: int) -> NoReturn:
    if is_one_of_many():
        leave(code)
    sys.exit(code)


def _speaks() -> bool:
    """Whether an error is this process's to tell: under torchrun, what goes wrong before the
    processes have joined goes wrong in all of a machine's, and the first one says it.
    """
    torch = sys.modules.get("torch")
    joined = torch is not None and torch.distributed.is_initialized()
    return joined or os.environ.get("LOCAL_RANK", "0") == "0"
