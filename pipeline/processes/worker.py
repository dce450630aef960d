"""A child process: where it works, how it begins, fails and ends. Knows nothing of its work.

Children are forked from a server, a process of its own that has seen neither CUDA nor this
process's threads. A fork of this process would inherit both, and could use neither.
"""

import atexit
import logging
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import connection, forkserver
from multiprocessing.connection import Connection
from pathlib import Path

from rekindle.data.errors import InputError, RekindleError
from rekindle.pipeline.console import log_to_stderr
from rekindle.pipeline.exits import tidy_up
from rekindle.train.interrupts import Interrupted, obey_sigterm

# What children import, seconds of work. For CPUs the server does it once; for a CUDA device each
# child does it for itself, as its device has to be chosen before anything can look at one.
_PRELOADED = [
    "rekindle.pipeline.caching.cache_teachers",
    "rekindle.pipeline.train_student",
    "torch.utils.tensorboard",
    "transformers.models.bert.modeling_bert",
]
_FINE_TUNING = "rekindle.train.finetune.run"  # a third as much again

if any("multiprocessing.forkserver" in word for word in sys.orig_argv):
    # This is the server. To take down all that it imported would keep it for seconds after its
    # parent's end, and with it the terminal or pipe that both write to.
    atexit.register(os._exit, 0)

Work = Callable[[Connection], object]  # what a child does, given its connection to the parent


class WorkerKilled(InputError):
    """A child was killed: mostly by the system, for want of memory, so fewer workers may help."""


@dataclass(frozen=True)
class Place:
    """One process's: its CUDA device as CUDA_VISIBLE_DEVICES names it (None: the CPU)."""

    device: str | None
    threads: int

    def take(self) -> None:
        """Make this process work here; before it looks at any device."""
        if self.device is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = self.device
        os.environ["RAYON_NUM_THREADS"] = str(self.threads)  # those of tokenizers
        import torch

        torch.set_num_threads(self.threads)


@dataclass(frozen=True)
class Returned:
    """The last message of a child: what its work returned."""

    value: object


class Worker:
    """A child process that does ``work``, a picklable function, at ``place``.

    It leaves Ctrl-C to its parent, which may tell it to end with SIGTERM; it ends when its parent
    does, and writes what it prints or logs to ``log_file`` (None: where its parent does). ``name``
    stands in error messages.
    """

    def __init__(self, name: str, work: Work, place: Place, log_file: Path | None = None):
        context = multiprocessing.get_context("forkserver")
        if place.device is None:
            context.set_forkserver_preload(_PRELOADED)
        self.place = place
        self._connection, theirs = context.Pipe()
        arguments = (name, work, place, theirs, log_file)
        self._process = context.Process(target=_live, args=arguments, daemon=True)
        self._process.start()
        theirs.close()

    def send(self, message: object) -> None:
        """Hand ``message`` to the work. If the child was killed, ``receive`` says so."""
        with suppress(BrokenPipeError):
            self._connection.send(message)

    def receive(self) -> object:
        """Wait for the next message and return it; ``Returned`` is the last one.

        Raises the RekindleError or OSError that ended the work, any other error as RuntimeError
        with the child's traceback, Interrupted if it was told to end, and WorkerKilled if the
        process was killed.
        """
        try:
            message = self._connection.recv()
        except (EOFError, OSError):
            self._process.join()
            if self._process.exitcode == -signal.SIGTERM:  # it had not begun to listen
                raise Interrupted("", kept=False) from None
            raise WorkerKilled(
                f"its process was killed (exit code {self._process.exitcode}; out of memory?)"
            ) from None
        if isinstance(message, BaseException | Returned):
            self._process.join()  # it may have temporary files to remove
            self._connection.close()
        if isinstance(message, BaseException):
            raise message
        return message

    def tell_to_end(self) -> None:
        """Have the work end as soon as what it has done is kept; ``receive`` then says so."""
        self._process.terminate()

    def kill(self) -> None:
        """End the process at once, whatever it does."""
        self._process.kill()
        self._process.join()
        self._connection.close()

    @staticmethod
    def with_messages(
        workers: Collection["Worker"], seconds: float | None = None
    ) -> list["Worker"]:
        """Wait until some of ``workers`` have something to receive, and return those: none if the
        ``seconds`` are over before.
        """
        ready = connection.wait([worker._connection for worker in workers], seconds)
        return [worker for worker in workers if worker._connection in ready]


@contextmanager
def killed_at_exit(workers: Collection[Worker]) -> Iterator[None]:
    """Kill ``workers`` when the block ends, for instance by Ctrl-C.

    Nothing is waited for: what a worker has not finished is made again.
    """
    try:
        yield
    finally:
        for worker in workers:
            worker.kill()


def warm_up() -> None:
    """Begin to import what children on CPUs need, in the background; for fine-tuning as well."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*_PRELOADED, _FINE_TUNING])
    forkserver.ensure_running()


def _live(name: str, work: Work, place: Place, parent: Connection, log_file: Path | None) -> None:
    """The life of a child."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    obey_sigterm()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if log_file is not None:
        with open(log_file, "ab", buffering=0) as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
    log_to_stderr(logging.WARNING)
    try:
        place.take()
        last: object = Returned(work(parent))
    except (RekindleError, OSError) as error:
        last = error
    except KeyboardInterrupt as error:
        last = error if isinstance(error, Interrupted) else Interrupted("", kept=False)
    except Exception:
        last = RuntimeError(f"{name} failed:\n{traceback.format_exc()}")
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the end itself takes no time
    parent.send(last)
    tidy_up()  # and return: multiprocessing still gives back the semaphores that libraries took


def _end_with_parent() -> None:
    """A child left behind must not go on writing where the same command, run again, writes."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


# --- places: each a device and a share of the threads ---------------------------------------------


def visible_devices() -> list[str]:
    """The CUDA devices that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",")[:count] if named else [str(number) for number in range(count)]


def places_for(workers: int) -> list[Place]:
    """A place for each worker: they share the devices in turn, and all the threads of one."""
    import torch

    threads = max(1, torch.get_num_threads() // workers)
    devices = visible_devices()
    if not devices:
        return [Place(None, threads)] * workers
    return [Place(devices[number % len(devices)], threads) for number in range(workers)]
