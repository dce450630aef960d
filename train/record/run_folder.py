"""Open the folder that a command writes into: a new one, or one to continue in, by one process at a
time.

A file in the folder says what the run in it is (``run.json``, ``sweep.json``, …).
"""

import fcntl
import json
import logging
import os
import socket
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO, TypeVar

from rekindle.data.errors import CheckpointError, InputError
from rekindle.data.places import same_place
from rekindle.data.storage.atomic import is_temporary, remove_leftovers

log = logging.getLogger("rekindle")

LOCK_FILE = ".lock"  # exists while a process works in the folder, and after one that was killed

Inspected = TypeVar("Inspected")


@contextmanager
def open_folder(out: Path, inspect: Callable[[], Inspected]) -> Iterator[Inspected]:
    """Hold ``out`` alone; yield what ``inspect`` finds there.

    ``inspect`` raises if the command must not continue, and is called twice: before anything is
    written, and once no other process can begin there. Raises InputError if another process works
    in ``out``.
    """
    try:
        inspect()
    except InputError:
        _check_not_locked(out)  # its message says more than that something is there
        raise
    with locked_folder(out):
        inspected = inspect()
        remove_leftovers(out)
        yield inspected


def is_continued(
    out: Path, file: str, kind: str, resume: bool, other_files: Collection[str] = ()
) -> bool:
    """Return whether ``out`` holds a ``kind`` to continue; False if it is new or empty, apart from
    ``other_files``.

    Raises InputError if it holds anything else, or must not be resumed.
    """
    has_record = (out / file).is_file()
    if has_record and resume:
        return True
    nearest = next(path for path in (*out.absolute().parents, Path("/")) if path.exists())
    if not nearest.is_dir():
        raise InputError(f"{out} cannot be made: {nearest} is a file; give another --out")
    ignored = {LOCK_FILE, *other_files}
    if out.exists() and (
        not out.is_dir()
        or any(path.name not in ignored and not is_temporary(path.name) for path in out.iterdir())
    ):
        raise InputError(
            f"{out} is not empty. Give another --out, or --resume to continue the {kind} in it"
            if has_record
            else f"{out} is not empty and holds no {kind}; give another --out"
        )
    return False


def check_new(out: Path, file: str, kind: str) -> None:
    """Raise InputError if a ``kind`` cannot begin in ``out``: it is not empty, or held."""
    try:
        is_continued(out, file, kind, resume=False)
    except InputError:
        _check_not_locked(out)  # its message says more than that something is there
        raise


@contextmanager
def reading_record(record: Path, advice: str = "") -> Iterator[None]:
    """Turn errors in reading a file that a run left into a CheckpointError."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{record} is damaged ({error}){advice and '; ' + advice}") from None


def read_record(
    path: Path, advice: str = "", constant: Callable[[str], object] = float
) -> dict[str, Any] | None:
    """Return the object in a JSON file that a run left; None if there is no file.

    ``constant`` is called for numbers that are not finite. Raises CheckpointError, with ``advice``,
    for a damaged file.
    """
    if not path.exists():
        return None
    with reading_record(path, advice):
        return dict(json.loads(path.read_text(encoding="utf-8"), parse_constant=constant))


def check_same_settings(
    folder: Path, recorded: object, current: object, rule: str, free: Collection[str] = ()
) -> None:
    """Raise CheckpointError, naming the key, if the ``current`` settings differ from the
    ``recorded`` ones.

    The ``free`` keys (dotted) may differ, and a path may be written differently. ``rule`` says what
    to do.
    """
    current = json.loads(json.dumps(current))
    for key, (recorded_value, current_value) in differences([recorded, current]).items():
        may_differ = any(f"{key}.".startswith(f"{one}.") for one in free)
        if may_differ or same_place(recorded_value, current_value):
            continue
        difference = f"{key}: {recorded_value!r} there, "
        if current_value is None and not _has_key(current, key):
            raise CheckpointError(
                f"{folder} was begun by an older version of Rekindle, with a setting that this one "
                f"lacks ({difference}none here). Finish it with the version that began it, or "
                "start again in another --out"
            )
        raise CheckpointError(
            f"{folder} was begun with another configuration ({difference}{current_value!r} here). "
            f"{rule}"
        )


def _has_key(settings: object, key: str) -> bool:
    """Return whether nested settings have a dotted key."""
    for part in key.split("."):
        if isinstance(settings, list):
            settings = dict(enumerate(settings)).get(int(part))
        elif not isinstance(settings, Mapping) or part not in settings:
            return False
        else:
            settings = settings[part]
    return True


def differences(
    settings: Sequence[object], path: tuple[str, ...] = (), items: bool = False
) -> dict[str, list[object]]:
    """Return the keys of nested settings whose values are not all equal, with each value.

    Lists of sections of equal length are compared item by item; with ``items``, so are lists of
    plain values. Other lists differ as a whole.
    """
    if all(one == settings[0] for one in settings):
        return {}
    sections = [one for one in settings if isinstance(one, Mapping)]
    lists = [one for one in settings if isinstance(one, list) and (items or _is_of_sections(one))]
    if len(lists) == len(settings) and len({len(one) for one in lists}) == 1:
        sections = [dict(enumerate(one)) for one in lists]
    if len(sections) < len(settings):
        return {".".join(path): list(settings)}
    differing: dict[str, list[object]] = {}
    for key in dict.fromkeys(key for one in sections for key in one):
        differing |= differences([one.get(key) for one in sections], (*path, str(key)), items)
    return differing


def _is_of_sections(value: list[object]) -> bool:
    return all(isinstance(one, Mapping) for one in value)


# --- one process at a time ------------------------------------------------------------------------


@contextmanager
def locked_folder(folder: Path, wait: bool = False) -> Iterator[bool]:
    """Hold the folder's lock; a killed process releases it. Yield False where none can be held.

    Some file systems have no locks. Raises InputError if another process
    holds the lock, unless this one is to ``wait``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK_FILE
    while True:
        with open(path, "a+", encoding="utf-8") as lock:
            is_locked = _lock(lock, folder, wait)
            if is_locked and not _is_lock_of(lock, path):
                continue  # the former holder has removed it
            try:
                yield is_locked
            finally:
                path.unlink(missing_ok=True)
            return


def _lock(lock: TextIO, folder: Path, wait: bool) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        raise _locked_error(lock, folder) from None
    except OSError as error:
        log.warning(
            "%s cannot be locked (%s): a second process in it would not be noticed",
            folder,
            error.strerror,
        )
        return False
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {socket.gethostname()}")
    lock.flush()
    return True


def _locked_error(lock: TextIO, folder: Path) -> InputError:
    lock.seek(0)
    return InputError(
        f"another process works on {folder} ({lock.read() or 'it has just begun'}); wait for it, "
        "or give another --out"
    )


def _check_not_locked(folder: Path) -> None:
    """Raise InputError if another process holds the folder."""
    with suppress(FileNotFoundError, NotADirectoryError), open(folder / LOCK_FILE) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _locked_error(lock, folder) from None
        except OSError:  # a file system without locks
            return


def _is_lock_of(lock: TextIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(lock.fileno()), path.stat())
    except FileNotFoundError:
        return False
