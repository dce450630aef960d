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
from rekindle.train.launch import current_launch, is_one_of_many

log = logging.getLogger("rekindle")

Fill = Callable[[Path, ObjectStore], None]


def local_folder(out: Path) -> Path:
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
    folder = local_folder(out)
    root, mark = folder.parent, _mark_file(folder)
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    with naming_address(address, folder), open(root / f".{folder.name}.used", "ab") as used:
        with open(root / f".{folder.name}.lock", "ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            own_mark = f"{address}\n{_launch_id()}\n"
            # The first process of a launch on a node fills it for all of them.
            if not mark.exists() or mark.read_text() != own_mark:
                _check_unused(used, address)
                remove(folder)
                fill(folder, _existing_store(address))
                write_text(mark, own_mark)
            fcntl.flock(used, fcntl.LOCK_SH)
        yield folder
        if current_launch().local_rank == 0:
            remove(mark)
            remove(folder)


def store_of(folder: Path) -> ObjectStore | None:
    """Return the store to which a local folder, or its parent, is uploaded; None for a folder that
    is used in place.
    """
    for candidate, inside in ((folder, ""), (folder.parent, f"/{folder.name}")):
        if (mark := _mark_file(candidate)).exists():
            return _open_store(mark.read_text().partition("\n")[0] + inside)
    return None


def shown_folder(folder: Path) -> str:
    """Return an output folder's name: its address, if it is in a store."""
    store = store_of(folder)
    return str(folder) if store is None else store.location


def in_use_error(address: str) -> InputError:
    """Return the error for the second process at one address."""
    return InputError(f"another process works on {address}; wait for it, or give another --out")


def _mark_file(folder: Path) -> Path:
    return folder.parent / f".{folder.name}.store"


@lru_cache(maxsize=16)
def _open_store(address: str) -> ObjectStore:
    return ObjectStore(address)


def _existing_store(address: str) -> ObjectStore:
    refuse_unconditional(address)
    store = _open_store(address)
    if bucket := store.bucket_missing:
        raise InputError(
            f"there is no bucket {bucket!r} for {address} (or these credentials may not see it); "
            "make it, or correct the address"
        )
    return store


def _launch_id() -> str:
    """Return what the processes of one launch on a node have in common."""
    if not is_one_of_many():
        return new_attempt()
    names = ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT")
    return " ".join([str(os.getppid()), *(os.environ.get(name, "") for name in names)])


def _check_unused(used: BinaryIO, address: str) -> None:
    try:
        fcntl.flock(used, fcntl.LOCK_EX | fcntl.LOCK_NB)  # exchanged for the shared lock later
    except BlockingIOError:
        raise in_use_error(address) from None


# --- what is said ---------------------------------------------------------------------------------


@contextmanager
def naming_address(address: str, folder: Path) -> Iterator[None]:
    """Make messages name the address instead of the local folder."""

    def with_address(text: str) -> str:
        return text.replace(str(folder), address)

    def rename(record: logging.LogRecord) -> bool:
        record.msg, record.args = with_address(record.getMessage()), ()
        return True

    log.addFilter(rename)
    try:
        yield
    except RekindleError as error:
        error.args = tuple(
            with_address(argument) if isinstance(argument, str) else argument
            for argument in error.args
        )
        raise
    except Interrupted as error:
        error.message = with_address(error.message)
        raise
    finally:
        log.removeFilter(rename)
