"""A command's output folder in an object store: the command works in a local folder, and its
lasting files are uploaded as they are written.

  REKINDLE_COPIES/.runs/NAME-KEY/          where it works; each command fills it from the store
  REKINDLE_COPIES/.runs/.NAME-KEY.store    its address, and the launch it belongs to
  REKINDLE_COPIES/.runs/.NAME-KEY.used     locked by the processes that work in it
"""

import fcntl
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

from rekindle.data.errors import InputError, RekindleError
from rekindle.data.places import address_of
from rekindle.data.storage.atomic import new_attempt, remove, write_text
from rekindle.data.storage.copies import copies, copy_key
from rekindle.data.storage.object_store import ObjectStore, refuse_unconditional
from rekindle.train.interrupts import Interrupted
from rekindle.train.launch import launched, one_of_many

log = logging.getLogger("rekindle")

Fill = Callable[[Path, ObjectStore], None]


def local_place(out: Path) -> Path:
    """Return the local folder for ``out``."""
    if (address := address_of(out)) is None:
        return out
    return copies().root / ".runs" / f"{address.rpartition('/')[2]}-{copy_key(address)[:8]}"


@contextmanager
def working_copy(out: Path, fill: Fill) -> Iterator[Path]:
    """Yield the folder in which a command for ``out`` works: itself, or if that is in a store, a
    local folder, which ``fill`` makes from what is there; it is removed after success.

    Messages meanwhile name the address. Raises InputError if another process of this machine works
    on it, or the bucket does not exist.
    """
    address = address_of(out)
    if address is None:
        yield out
        return
    folder = local_place(out)
    root, mark = folder.parent, _mark(folder)
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    with speaking_of(address, folder), open(root / f".{folder.name}.used", "ab") as used:
        with open(root / f".{folder.name}.lock", "ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            ours = f"{address}\n{_launch()}\n"
            # The first process of a launch on a node fills it for all of them.
            if not mark.exists() or mark.read_text() != ours:
                _refuse_used(used, address)
                remove(folder)
                fill(folder, _reached(address))
                write_text(mark, ours)
            fcntl.flock(used, fcntl.LOCK_SH)
        yield folder
        if launched().local_rank == 0:
            remove(mark)
            remove(folder)


def store_of(folder: Path) -> ObjectStore | None:
    """Return the store to which a local folder, or its parent, is uploaded; None for a folder that
    is used in place.
    """
    for place, inside in ((folder, ""), (folder.parent, f"/{folder.name}")):
        if (mark := _mark(place)).exists():
            return _opened(mark.read_text().partition("\n")[0] + inside)
    return None


def place_of(folder: Path) -> str:
    """Return an output folder's name: its address, if it is in a store."""
    store = store_of(folder)
    return str(folder) if store is None else store.location


def another(address: str) -> InputError:
    """Return the error for the second process at one address."""
    return InputError(f"another process works on {address}; wait for it, or give another --out")


def _mark(folder: Path) -> Path:
    return folder.parent / f".{folder.name}.store"


@lru_cache(maxsize=16)
def _opened(address: str) -> ObjectStore:
    return ObjectStore(address)


def _reached(address: str) -> ObjectStore:
    refuse_unconditional(address)
    store = _opened(address)
    if bucket := store.bucket_missing:
        raise InputError(
            f"there is no bucket {bucket!r} for {address} (or these credentials may not see it); "
            "make it, or correct the address"
        )
    return store


def _launch() -> str:
    """Return what the processes of one launch on a node have in common."""
    if not one_of_many():
        return new_attempt()
    names = ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT")
    return " ".join([str(os.getppid()), *(os.environ.get(name, "") for name in names)])


def _refuse_used(used: BinaryIO, address: str) -> None:
    try:
        fcntl.flock(used, fcntl.LOCK_EX | fcntl.LOCK_NB)  # exchanged for the shared lock later
    except BlockingIOError:
        raise another(address) from None


# --- what is said ---------------------------------------------------------------------------------


@contextmanager
def speaking_of(address: str, folder: Path) -> Iterator[None]:
    """Make messages name the address instead of the local folder."""

    def renamed(text: str) -> str:
        return text.replace(str(folder), address)

    def rename(record: logging.LogRecord) -> bool:
        record.msg, record.args = renamed(record.getMessage()), ()
        return True

    log.addFilter(rename)
    try:
        yield
    except RekindleError as error:
        error.args = tuple(renamed(one) if isinstance(one, str) else one for one in error.args)
        raise
    except Interrupted as error:
        error.told = renamed(error.told)
        raise
    finally:
        log.removeFilter(rename)
