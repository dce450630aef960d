"""How a command's process ends: its exit code, its message, and which process prints it.

Imports nothing heavy and knows no command. Under torchrun a process that failed exits at once: the
others may wait for it, and a gloo thread that still holds a tensor would abort at the interpreter's
exit.
"""

import errno
import os
import shlex
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn

from rekindle.data.errors import InputError, RekindleError, ResumableError
from rekindle.pipeline.console import say
from rekindle.train.interrupts import Interrupted, obey_sigterm
from rekindle.train.launch import current_launch, is_one_of_many

if TYPE_CHECKING:
    from rekindle.pipeline.progress import Progress


INTERRUPTED = 130  # exit code


def is_main() -> bool:
    """Return whether this is the only process, or torchrun's first."""
    return not is_one_of_many() or current_launch().rank == 0


def leave(code: int) -> NoReturn:
    """Exit at once: threads that still compute or read ahead have nothing to save.

    Files waiting for upload are still removed.
    """
    tidy_up()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def tidy_up() -> None:
    """Remove files waiting for upload to a store; elsewhere the interpreter's exit does it."""
    if "rekindle.data.storage.store" in sys.modules:
        from rekindle.data.storage.uploads import remove_uploads

        remove_uploads()


def resumption_unknown() -> None:
    """Return None: a command that resumes without --resume has not looked yet for anything to
    continue.
    """


@contextmanager
def resumable(resumed: Callable[[], bool | None] = resumption_unknown) -> Iterator["Progress"]:
    """Show progress. On an interrupt, or lack of space, say what is kept and which line continues.

    ``resumed``: whether that line needs --resume because there is something to continue, or
    ``resumption_unknown``. Print results after the block: until then the bars own the terminal.
    """
    from rekindle.pipeline.progress import Progress

    try:
        with interruptible(resumed), Progress.to_terminal(silent=not is_main()) as progress:
            yield progress
    except ResumableError as error:
        command = line_again(bool(resumed()), error.settings)
        raise InputError(f"{str(error).rstrip('.')}. To go on: {command}") from None


@contextmanager
def interruptible(resumed: Callable[[], bool | None] = lambda: False) -> Iterator[None]:
    """End at once on Ctrl-C and SIGTERM, saying what is kept and which line continues.

    ``resumed``: as for ``resumable``; it also chooses the wording if the interrupt says nothing.
    """
    try:
        yield
    except KeyboardInterrupt as error:
        if is_main():
            message, is_resumed = "", resumed()
            is_kept = is_resumed
            if isinstance(error, Interrupted):
                message, is_kept = error.message, error.is_saved
            lead = {True: "To go on", False: "To begin again", None: "To run it again"}[is_kept]
            say(f"\ninterrupted{message}. {lead}: {line_again(bool(is_resumed))}")
        import multiprocessing

        for process in multiprocessing.active_children():
            process.kill()
        leave(INTERRUPTED)


def line_again(resumed: bool = False, settings: Sequence[str] = ()) -> str:
    """Return the line that continues this command: as typed, with further ``settings``."""
    typed = sys.argv[1:]
    options = ["--resume"] if resumed and "--resume" not in typed else []
    options += [part for setting in settings for part in ("--set", setting)]
    torchrun = ["torchrun", "--nproc-per-node", os.environ.get("LOCAL_WORLD_SIZE", "1")]
    prefix = [*torchrun, "--no-python"] if is_one_of_many() else []
    return shlex.join([*prefix, "pipeline", *typed, *options])


def line_with(option: str) -> str:
    """Return the line that was typed, with one more option."""
    return shlex.join(["pipeline", *sys.argv[1:], option])


@contextmanager
def usage_as_input_errors() -> Iterator[None]:
    """Turn errors in the command line itself, such as an unknown option, into InputError.

    These are click's errors, which typer may bundle: they are recognized by their attributes.
    """
    try:
        yield
    except Exception as error:
        format_message = getattr(error, "format_message", None)
        if format_message is None:
            raise
        if type(error).__name__ == "NoArgsIsHelpError":  # no command was given: its help is shown
            raise SystemExit(2) from None
        typed = getattr(getattr(error, "ctx", None), "command_path", "pipeline")
        text = " ".join(format_message().split()).rstrip(".")
        stop = "" if text.endswith("?") else "."  # typer names the nearest command in a question
        raise InputError(f"{text}{stop} `{typed} --help` shows what may be given") from None


# Advice for the system's file errors.
_ADVICE_FOR = {
    errno.EEXIST: "a file of that name exists where a folder is needed; give another place",
    errno.ENOTDIR: "a file exists where a folder is needed; give another place",
    errno.EISDIR: "a folder exists where a file is needed; give the path of a file",
    errno.ENOENT: "give the path of something that exists",
    errno.EACCES: "give a place you may read and write, or change its permissions",
    errno.EPERM: "give a place you may read and write, or change its permissions",
    errno.EROFS: "give a place that can be written",
    errno.ENOSPC: "make room on that disk, and run the same line again",
    errno.EDQUOT: "make room within the quota, and run the same line again",
    errno.EFBIG: "give a place on a file system (or under a `ulimit -f`) for files of that size",
    errno.EMFILE: "raise the limit of open files (`ulimit -n`)",
    errno.ELOOP: "a symbolic link leads back to itself; give the place itself",
    errno.ENAMETOOLONG: "give a shorter name",
}


@contextmanager
def errors_as_exit_codes() -> Iterator[None]:
    """Turn what a user can cause into one message and an exit code; our bugs keep their traceback.

    SIGTERM, which schedulers send, counts as Ctrl-C. Not under torchrun, which ends processes that
    way after one has failed: they may wait for it for ever.
    """
    is_main_thread = threading.current_thread() is threading.main_thread() and not is_one_of_many()
    former_handler = signal.getsignal(signal.SIGTERM)
    if is_main_thread:
        obey_sigterm()
    try:
        yield
    except RekindleError as error:
        if str(error) and _reports_errors():
            say(f"error: {error}")
        _fail(error.exit_code)
    except KeyboardInterrupt:
        say(f"\ninterrupted. To run it again: {line_again()}")
        leave(INTERRUPTED)
    except OSError as error:
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        if error.errno is None or (error.filename is None and not is_full):
            raise
        place = error.filename or f"the disk or the temporary folder ({tempfile.gettempdir()})"
        advice = _ADVICE_FOR.get(error.errno, "check that the disk and its mount are sound")
        say(f"error: {place}: {error.strerror}; {advice}")
        _fail(2)
    finally:
        if is_main_thread:
            signal.signal(signal.SIGTERM, former_handler)


def _fail(code: int) -> NoReturn:
    if is_one_of_many():
        leave(code)
    sys.exit(code)


def _reports_errors() -> bool:
    """Return whether this process reports an error. Under torchrun, an error before the processes
    have joined happens in all processes of a machine, and the first one reports it.
    """
    torch = sys.modules.get("torch")
    joined = torch is not None and torch.distributed.is_initialized()
    return joined or not is_one_of_many() or current_launch().local_rank == 0
