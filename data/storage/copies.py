"""Local copies of objects, in one bounded folder that all processes of a node share.

  $REKINDLE_COPIES/              rekindle-copies-UID in the temporary folder unless it is set
    KEY/                         a copy: the files of one object or folder, complete; never changed
    .KEY.0123abcd.BYTES.part/    a copy being fetched, locked by its process; BYTES are reserved
    .lock                        held while something is added, taken or removed
    .fetching-00 … .fetching-ff  held while a copy is fetched, so that a node fetches each once
    .in-use                      a byte for each copy, locked by the processes that use it

The locks of a killed process are released. A copy in use is not removed; of the others, the least
recently used go first. If there is no room, there is no copy, and the caller reads without one.
"""

import fcntl
import hashlib
import logging
import os
import re
import shutil
import tempfile
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import BinaryIO

from rekindle.data.errors import InputError
from rekindle.data.storage.atomic import new_attempt, remove, sync

log = logging.getLogger("rekindle")

# environment variables
FOLDER_VARIABLE, GIGABYTES_VARIABLE = "REKINDLE_COPIES", "REKINDLE_COPIES_GB"
DISK_SHARE = (
    0.5  # of the disk space that is free or taken by copies, unless REKINDLE_COPIES_GB is set
)
# Nothing else in the folder is ever removed, because it may hold other things.
_KEY = re.compile(r"[0-9a-f]{32}")
_PART = re.compile(r"\.[0-9a-f]{32}\.[0-9a-f]{8}\.(\d+)\.part")


def copies() -> "Copies":
    """Return the node's copies, in the folder given by the environment."""
    setting = os.environ.get(FOLDER_VARIABLE)
    default = Path(tempfile.gettempdir()) / f"rekindle-copies-{os.getuid()}"
    return _copies_in(Path(setting).expanduser() if setting else default)


@cache  # a process loses its locks when it closes any of their files
def _copies_in(root: Path) -> "Copies":
    return Copies(root)


def copy_key(*parts: object) -> str:
    """Return the key for ``parts`` (address, size, checksum), which identify the content."""
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()[:32]


class Copies:
    """The copies in ``root``. One object per folder and process: see ``copies``."""

    def __init__(self, root: Path):
        self.root = root
        self.problem = ""  # why the last copy had no room
        self._reset()

    def _reset(self) -> None:
        self._process = os.getpid()
        self._uses: Counter[str] = Counter()  # number of uses by this process
        self._lock_file: BinaryIO | None = None
        self._mutex = threading.RLock()

    @contextmanager
    def using(self, key: str, size: int, fetch: Callable[[Path], None]) -> Iterator[Path | None]:
        """Yield the folder of a copy within the block; otherwise like ``take``."""
        folder = self.take(key, size, fetch)
        try:
            yield folder
        finally:
            if folder is not None:
                self.release(key)

    def take(self, key: str, size: int, fetch: Callable[[Path], None]) -> Path | None:
        """Return the folder of the copy ``key``, which stays until ``release``; None without room.

        A missing copy is made by ``fetch``, which fills an empty folder with ``size`` bytes.
        ``problem`` says why there is no room; other disk errors also count as no room. Raise
        InputError and FileNotFoundError of ``fetch``; InputError for a folder of another user.
        """
        if self._process != os.getpid():  # a fork: the locks belong to its parent
            self._reset()
        try:
            self._prepare()
            if folder := self._existing(key):
                return folder
            with _locked(self.root / f".fetching-{key[:2]}"):
                return self._existing(key) or self._make(key, size, fetch)
        except OSError as error:
            if isinstance(error, FileNotFoundError):  # what should be fetched does not exist
                raise
            self.problem = f"{self.root}: {error.strerror or error}"
            return None

    def release(self, key: str) -> None:
        """Release a copy that was taken."""
        with self._mutex:
            self._uses[key] -= 1
            if not self._uses[key]:
                del self._uses[key]
                if self._lock_file is not None:
                    fcntl.lockf(self._lock_file, fcntl.LOCK_UN, 1, _lock_byte(key))

    def release_with(self, owner: object, key: str) -> None:
        """Release a copy together with ``owner``."""
        weakref.finalize(owner, self._release_in, os.getpid(), key)

    def _release_in(self, process: int, key: str) -> None:
        if process == os.getpid():  # a fork has not taken it
            self.release(key)

    @property
    def max_bytes(self) -> int:
        """The bytes that all copies together may use."""
        if setting := os.environ.get(GIGABYTES_VARIABLE):
            with suppress(ValueError):
                if (gigabytes := float(setting)) >= 0:
                    return int(gigabytes * 1e9)
            raise InputError(
                f"{GIGABYTES_VARIABLE}={setting}: give the gigabytes for local copies, such as 200"
            )
        copied = sum(size for _, size in self._sizes())
        return int(DISK_SHARE * (shutil.disk_usage(self.root).free + copied))

    def _prepare(self) -> None:
        if self._lock_file is not None:
            return
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        if self.root.lstat().st_uid != os.getuid():
            raise InputError(
                f"{self.root} belongs to another user, who could change what is read there; give a "
                f"folder of your own with {FOLDER_VARIABLE}"
            )
        with self._mutex:
            if self._lock_file is None:
                self._lock_file = open(self.root / ".in-use", "a+b")  # noqa: SIM115 - until the end

    def _existing(self, key: str) -> Path | None:
        folder = self.root / key
        with _locked(self.root / ".lock", shared=True), suppress(FileNotFoundError):
            os.utime(folder)
            self._lock_copy(key)
            return folder
        return None

    def _lock_copy(self, key: str) -> None:
        with self._mutex:
            assert self._lock_file is not None  # set by ``_prepare``
            if not self._uses[key]:
                fcntl.lockf(self._lock_file, fcntl.LOCK_SH | fcntl.LOCK_NB, 1, _lock_byte(key))
            self._uses[key] += 1

    def _make(self, key: str, size: int, fetch: Callable[[Path], None]) -> Path | None:
        partial = self.root / f".{key}.{new_attempt()}.{size}.part"
        with _locked(self.root / ".lock"):
            if not self._make_room(size):
                return None
            partial.mkdir()
            lock = os.open(partial, os.O_RDONLY)
            fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            fetch(partial)
            for file in sorted(partial.rglob("*")):
                sync(file)
            with _locked(self.root / ".lock"):
                self._lock_copy(key)
                os.rename(partial, self.root / key)
            return self.root / key
        except BaseException:
            remove(partial)
            raise
        finally:
            os.close(lock)

    def _make_room(self, size: int) -> bool:
        """Remove leftovers of killed processes and unused copies until ``size`` bytes fit."""
        for partial in self.root.glob(".*.part"):
            if _PART.fullmatch(partial.name) and _is_abandoned(partial):
                remove(partial)
        max_bytes, sizes = self.max_bytes, dict(self._sizes())
        used_bytes = sum(sizes.values())

        def fits() -> bool:
            return used_bytes + size <= max_bytes and size <= shutil.disk_usage(self.root).free

        if not fits() and size <= max_bytes:
            for folder in sorted(
                filter(self._is_unused, sizes), key=lambda one: one.stat().st_mtime
            ):
                removed = folder.with_name(f".{folder.name}.{new_attempt()}.0.part")
                os.rename(folder, removed)  # atomic, whenever this process is killed
                remove(removed)
                used_bytes -= sizes[folder]
                if fits():
                    break
        if fits():
            return True
        self.problem = (
            f"{self.root} has room for {max_bytes / 1e9:.3g} GB of copies ({GIGABYTES_VARIABLE}), "
            f"and running processes use {used_bytes / 1e9:.3g} GB of it"
        )
        return False

    def _sizes(self) -> Iterator[tuple[Path, int]]:
        """Yield every copy, including those being fetched, with their bytes."""
        for entry in os.scandir(self.root):
            if match := _PART.fullmatch(entry.name):
                yield Path(entry.path), int(match[1])
            elif _KEY.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False):
                files = (os.path.join(at, n) for at, _, names in os.walk(entry.path) for n in names)
                yield Path(entry.path), sum(map(os.path.getsize, files))

    def _is_unused(self, folder: Path) -> bool:
        key = folder.name
        with self._mutex:
            if key[0] == "." or self._uses[key]:
                return False
            assert self._lock_file is not None  # set by ``_prepare``
            try:
                fcntl.lockf(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, _lock_byte(key))
            except OSError:
                return False
            fcntl.lockf(self._lock_file, fcntl.LOCK_UN, 1, _lock_byte(key))
        return True


def _lock_byte(key: str) -> int:
    """Return the byte of ``.in-use`` for a copy."""
    return int(key[:15], 16)


def _is_abandoned(part: Path) -> bool:
    """Return whether no process fetches it any more."""
    try:
        folder = os.open(part, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError:
        return False
    finally:
        os.close(folder)


@contextmanager
def _locked(path: Path, shared: bool = False) -> Iterator[None]:
    with open(path, "ab") as file:
        fcntl.flock(file, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        yield
