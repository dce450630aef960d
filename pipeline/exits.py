"""How the process of a command ends: the exit code, one message, and which process says it.

Nothing heavy is imported, and nothing here knows a command. Under torchrun a process that failed
ends at once: the others may wait for it, and a thread of gloo that still holds a tensor at the
interpreter's own end would abort.
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
from rekindle.train.launch import launched, one_of_many

if TYPE_CHECKING:
    from rekindle.pipeline.progress import Progress


INTERRUPTED = 130  # exit code


def is_main() -> bool:
    """Whether this is the only process, or torchrun's first."""
    return not one_of_many() or launched().rank == 0


def leave(code: int) -> NoReturn:
    """Exit at once: threads that still compute or read ahead have nothing to save.

    What was to be uploaded is removed all the same.
    """
    tidy_up()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def tidy_up() -> None:
    """Remove what was to be uploaded to a store; the interpreter's own end does it elsewhere."""
    if "rekindle.data.storage.store" in sys.modules:
        from rekindle.data.storage.uploads import remove_uploads

        remove_uploads()


def by_itself() -> None:
    """What is known of a command that goes on without --resume before it has looked: nothing."""


@contextmanager
def resumable(resumed: Callable[[], bool | None] = by_itself) -> Iterator["Progress"]:
    """Show progress; an interrupt, or what ran out, ends with what is kept and the line that goes
    on. ``resumed``: whether that line needs --resume, for there is something to go on with; or
    ``by_itself``.

    Results are printed after the block: until then the terminal is that of the bars.
    """
    from rekindle.pipeline.progress import Progress

    try:
        with interruptible(resumed), Progress.to_terminal(silent=not is_main()) as progress:
            yield progress
    except ResumableError as error:
        line = line_again(bool(resumed()), error.settings)
        raise InputError(f"{str(error).rstrip('.')}. To go on: {line}") from None


@contextmanager
def interruptible(resumed: Callable[[], bool | None] = lambda: False) -> Iterator[None]:
    """End on Ctrl-C and SIGTERM at once, with what is kept and the line that goes on.

    ``resumed``: as for ``resumable``; also the word for that line, where the interrupt has none.
    """
    try:
        yield
    except KeyboardInterrupt as error:
        if is_main():
            told, more = "", resumed()
            kept = more
            if isinstance(error, Interrupted):
                told, kept = error.told, error.kept
            how = {True: "To go on", False: "To begin again", None: "To run it again"}[kept]
            say(f"\ninterrupted{told}. {how}: {line_again(bool(more))}")
        import multiprocessing

        for process in multiprocessing.active_children():
            process.kill()
        leave(INTERRUPTED)


def line_again(resumed: bool = False, settings: Sequence[str] = ()) -> str:
    """The line that goes on with this command: as it was typed, and with further ``settings``."""
    typed = sys.argv[1:]
    more = ["--resume"] if resumed and "--resume" not in typed else []
    more += [part for setting in settings for part in ("--set", setting)]
    several = ["torchrun", "--nproc-per-node", os.environ.get("LOCAL_WORLD_SIZE", "1")]
    start = [*several, "--no-python"] if one_of_many() else []
    return shlex.join([*start, "pipeline", *typed, *more])


def line_with(option: str) -> str:
    """The line that was typed, with one option more."""
    return shlex.join(["pipeline", *sys.argv[1:], option])


@contextmanager
def usage_as_input_errors() -> Iterator[None]:
    """Make an InputError of what is wrong with the line itself: an unknown option, say.

    Those are click's errors, which typer carries with it or not: they are known by what they have.
    """
    try:
        yield
    except Exception as error:
        told = getattr(error, "format_message", None)
        if told is None or type(error).__name__ == "NoArgsIsHelpError":
            raise
        typed = getattr(getattr(error, "ctx", None), "command_path", "pipeline")
        text = " ".join(told().split()).rstrip(".")
        raise InputError(f"{text}. `{typed} --help` shows what may be given") from None


# What to do, by what the system says of a file.
_ADVICE = {
    errno.EEXIST: "a file of that name stands where a folder is needed; give another place",
    errno.ENOTDIR: "a file stands where a folder is needed; give another place",
    errno.EISDIR: "a folder stands where a file is needed; give the path of a file",
    errno.ENOENT: "give the path of what is there",
    errno.EACCES: "give a place that may be read and written, or change its permissions",
    errno.EPERM: "give a place that may be read and written, or change its permissions",
    errno.EROFS: "give a place that may be written",
    errno.ENOSPC: "make room on that disk, and give the same line again",
    errno.EDQUOT: "make room within the quota, and give the same line again",
    errno.EFBIG: "give a place on a file system (or under a `ulimit -f`) for files of that size",
    errno.EMFILE: "raise the limit of open files (`ulimit -n`)",
    errno.ELOOP: "a symbolic link leads back to itself; give the place itself",
    errno.ENAMETOOLONG: "give a shorter name",
}


@contextmanager
def errors_as_exit_codes() -> Iterator[None]:
    """What a user can cause becomes one message and an exit code; our bugs keep their traceback.

    A job that is told to end (SIGTERM, as schedulers do) ends as by Ctrl-C. Not under torchrun,
    which ends processes that way when one has failed: they may wait for it for ever.
    """
    main = threading.current_thread() is threading.main_thread() and not one_of_many()
    before = signal.getsignal(signal.SIGTERM)
    if main:
        obey_sigterm()
    try:
        yield
    except RekindleError as error:
        if str(error) and _speaks():
            say(f"error: {error}")
        _fail(error.exit_code)
    except KeyboardInterrupt:
        say(f"\ninterrupted. To run it again: {line_again()}")
        leave(INTERRUPTED)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        if error.errno is None or (error.filename is None and not full):
            raise
        where = error.filename or f"the disk or the temporary folder ({tempfile.gettempdir()})"
        advice = _ADVICE.get(error.errno, "see whether that disk and its mount are sound")
        say(f"error: {where}: {error.strerror}; {advice}")
        _fail(2)
    finally:
        if main:
            signal.signal(signal.SIGTERM, before)


def _fail(code: int) -> NoReturn:
    if one_of_many():
        leave(code)
    sys.exit(code)


def _speaks() -> bool:
    """Whether an error is this process's to tell: under torchrun, what goes wrong before the
    processes have joined goes wrong in all of a machine's, and the first one says it.
    """
    torch = sys.modules.get("torch")
    joined = torch is not None and torch.distributed.is_initialized()
    return joined or not one_of_many() or launched().local_rank == 0
