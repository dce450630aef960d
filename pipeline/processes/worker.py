"""A child process: where it works, how it begins, fails and ends. Knows nothing of its work.

Children are forked from a server, a separate process without CUDA and without this process's
threads. A fork of this process would inherit both, and could use neither.
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

# What children import, which takes seconds. For CPUs the server imports it once; for a CUDA device
# each child imports it itself, because its device must be chosen first.
_PRELOADED = [
    "rekindle.pipeline.caching.cache_teachers",
    "rekindle.pipeline.train_student",
    "torch.utils.tensorboard",
    "transformers.models.bert.modeling_bert",
]
_FINE_TUNING = "rekindle.train.finetune.run"  # takes a third as long again

if any("multiprocessing.forkserver" in word for word in sys.orig_argv):
    # This is the server. Tearing down all its imports would keep it alive for seconds after its
    # parent, holding the terminal or pipe that both write to.
    atexit.register(os._exit, 0)

Work = Callable[[Connection], object]  # what a child does, given its connection to the parent


class WorkerKilled(InputError):
    """A child was killed, mostly by the system for lack of memory; fewer workers may help."""


@dataclass(frozen=True)
class Place:
    """Where a process works: its CUDA device as in CUDA_VISIBLE_DEVICES (None: the CPU)."""

    device: str | None
    threads: int

    def take(self) -> None:
        """Make this process work here. Call it before anything looks at a device."""
        if self.device is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = self.device
        os.environ["RAYON_NUM_THREADS"] = str(self.threads)  # the threads of tokenizers
        import torch

        torch.set_num_threads(self.threads)


@dataclass(frozen=True)
class Returned:
    """The last message of a child: what its work returned."""

    value: object


class Worker:
    """A child process that does ``work``, a picklable function, at ``place``.

    It leaves Ctrl-C to its parent, which may tell it to end with SIGTERM. It ends when its parent
    does. Its output and logs go to ``log_file`` (None: where its parent's go). ``name`` appears in
    error messages.
    """

    def __init__(self, name: str, work: Work, place: Place, log_file: Path | None = None):
        context = multiprocessing.get_context("forkserver")
        if place.device is None:
            context.set_forkserver_preload(_PRELOADED)
        self.place = place
        self._connection, child_end = context.Pipe()
        arguments = (name, work, place, child_end, log_file)
        self._process = context.Process(target=_run_child, args=arguments, daemon=True)
        self._process.start()
        child_end.close()

    def send(self, message: object) -> None:
        """Send ``message`` to the work. If the child was killed, ``receive`` says so."""
        with suppress(BrokenPipeError):
            self._connection.send(message)

    def receive(self) -> object:
        """Wait for the next message and return it; ``Returned`` is the last one.

        Raise the RekindleError or OSError that ended the work, any other error as RuntimeError with
        the child's traceback, Interrupted if it was told to end, and WorkerKilled if the process
        was killed.
        """
        try:
            message = self._connection.recv()
        except (EOFError, OSError):
            self._process.join()
            if self._process.exitcode == -signal.SIGTERM:  # it was not listening yet
                raise Interrupted("", is_saved=False) from None
            raise WorkerKilled(
                f"its process was killed (exit code {self._process.exitcode}; out of memory?)"
            ) from None
        if isinstance(message, BaseException | Returned):
            self._process.join()  # it may have temporary files to remove
            self._connection.close()
        if isinstance(message, BaseException):
            raise message
        return message

    def request_end(self) -> None:
        """Have the work end as soon as its results are saved; ``receive`` then says so."""
        self._process.terminate()

    def kill(self) -> None:
        """End the process at once, whatever it is doing."""
        self._process.kill()
        self._process.join()
        self._connection.close()

    @staticmethod
    def with_messages(
        workers: Collection["Worker"], seconds: float | None = None
    ) -> list["Worker"]:
        """Wait until some of ``workers`` have something to receive, and return those; none after
        ``seconds``.
        """
        ready = connection.wait([worker._connection for worker in workers], seconds)
        return [worker for worker in workers if worker._connection in ready]


@contextmanager
def killed_at_exit(workers: Collection[Worker]) -> Iterator[None]:
    """Kill ``workers`` when the block ends, for instance by Ctrl-C.

    Nothing is waited for: what a worker has not finished is done again later.
    """
    try:
        yield
    finally:
        for worker in workers:
            worker.kill()


def warm_up() -> None:
    """Begin to import what children on CPUs (and fine-tuning) need, in the background."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*_PRELOADED, _FINE_TUNING])
    forkserver.ensure_running()


def _run_child(
    name: str, work: Work, place: Place, parent: Connection, log_file: Path | None
) -> None:
    """Run the child process."""
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
        last_message: object = Returned(work(parent))
    except (RekindleError, OSError) as error:
        last_message = error
    except KeyboardInterrupt as error:
        last_message = error if isinstance(error, Interrupted) else Interrupted("", is_saved=False)
    except Exception:
        last_message = RuntimeError(f"{name} failed:\n{traceback.format_exc()}")
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # ending itself takes no time
    parent.send(last_message)
    tidy_up()  # and return: multiprocessing still releases semaphores that libraries took


def _end_with_parent() -> None:
    """End this child with its parent. An orphan must not go on writing where the same command, run
    again, writes.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


# --- places: each a device and a share of the threads ---------------------------------------------


def visible_devices() -> list[str]:
    """Return the CUDA devices this process may use, as named in CUDA_VISIBLE_DEVICES."""
    import torch

    count = torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",")[:count] if visible else [str(number) for number in range(count)]


def places_for(workers: int) -> list[Place]:
    """Return a place for each worker: they take devices in turn, and share the threads equally."""
    import torch

    threads = max(1, torch.get_num_threads() // workers)
    devices = visible_devices()
    if not devices:
        return [Place(None, threads)] * workers
    return [Place(devices[number % len(devices)], threads) for number in range(workers)]
