"""Where a cache lives: a local folder or an object store. Knows names and bytes, not their meaning.

Two operations make a cache safe to write from many processes: data objects get names that no one
else uses and are never overwritten, and a small record is created *exclusively*, which is the
commit point.
"""

import errno
import fcntl
import json
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from rekindle.data.errors import CacheFormatError, InputError, unusable
from rekindle.data.storage.atomic import new_attempt, sync, write_bytes
from rekindle.data.storage.downloads import download_folder

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

NO_HARD_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)
LONGEST_PART, LONGEST_NAME = 240, 900  # bytes; file systems allow 255, S3's keys have 1,024
REQUESTS = 32  # to an object store at a time
CONFLICT_DELAYS = (0.1, 0.2, 0.4, 0.8)  # seconds, when two conditional puts meet on their way


def open_store(location: str | os.PathLike[str]) -> "Store":
    """The store at a local path or an fsspec URL (``s3://``, ``gs://``, …)."""
    text = os.fspath(location)
    local = text.removeprefix("file://")
    return ObjectStore(text) if "://" in local else LocalStore(Path(local).expanduser())


def safe_name(name: str) -> str:
    """``name`` if it stays inside the store, else CacheFormatError: records come from strangers."""
    parts = PurePosixPath(name).parts
    outside = not parts or name.startswith("/") or ".." in parts or "\\" in name or "\0" in name
    # Lone surrogates and long names are errors of the operating system, each in its own way.
    sizes = [len(part.encode("utf-8", "replace")) for part in parts]
    lone = any("\ud800" <= character <= "\udfff" for character in name)
    if outside or lone or max(sizes) > LONGEST_PART or sum(sizes) > LONGEST_NAME:
        raise CacheFormatError(
            f"the name {name!r} in a cache record leaves the cache's folder; the record is not ours"
        )
    return name


class Store(ABC):
    """Named bytes below one root."""

    location: str

    @abstractmethod
    def read_bytes(self, name: str) -> bytes:
        """The object's bytes; FileNotFoundError when there is none."""

    def names(self, folder: str) -> list[str]:
        """The names of the objects directly in ``folder``, sorted; empty when it does not exist.

        Names with a leading dot are not listed: what a killed process left, what desktops leave.
        """
        return sorted(self._entries(folder, folders=False))

    def folders(self, folder: str) -> list[str]:
        """The names of the folders directly in ``folder``, sorted."""
        return sorted(self._entries(folder, folders=True))

    @abstractmethod
    def _entries(self, folder: str, folders: bool) -> list[str]: ...

    @abstractmethod
    def create(self, name: str, content: bytes) -> bool:
        """Write a small object, whole and durable, only if its name is free. False: it was taken.

        After a lost answer a client may ask again, and be told that the name is taken by what it
        wrote itself: whoever must know the winner has to read the object.
        """

    @abstractmethod
    def replace(self, name: str, content: bytes) -> None:
        """Write a small object, whole, over whatever was there (only for what can be rebuilt)."""

    def begin(self, name: str) -> Path:
        """A local file to write a new data object into; ``finish`` or ``discard`` must follow."""
        path = self._local(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    @abstractmethod
    def _local(self, name: str) -> Path: ...

    @abstractmethod
    def finish(self, name: str) -> None:
        """Make the data object begun under ``name`` durable and visible."""

    @abstractmethod
    def discard(self, name: str) -> None:
        """Remove a data object, finished or not; no error when it is gone."""

    @contextmanager
    def writing(self, name: str) -> Iterator[None]:
        """Turns a full disk, a lost permission and the like into one message."""
        try:
            yield
        except OSError as error:
            raise InputError(
                f"cannot write {self.location}/{name}: {error.strerror or error}. What is "
                "there already stays: make room or restore the permission, then run the same "
                "command again"
            ) from error

    @abstractmethod
    def local_file(self, name: str) -> Path:
        """A local file holding the object, for a memory map; FileNotFoundError without one."""

    @abstractmethod
    def state(self, name: str) -> tuple[int, float]:
        """Bytes and time of the last change (seconds since 1970); FileNotFoundError without one."""

    @contextmanager
    def working(self) -> Iterator[bool | None]:
        """While a process writes: whether no other one does; None where that cannot be told."""
        yield None

    @property
    def writable(self) -> bool:
        """Whether it can be written to, as far as that is known: a mount may be read-only."""
        return True

    @property
    def bucket_missing(self) -> str | None:
        """The name of the bucket that it is in, if there is no such bucket to be seen."""
        return None

    def exists(self, name: str) -> bool:
        """Whether there is an object of that name."""
        try:
            self.state(name)
        except FileNotFoundError:
            return False
        return True

    def temporary(self, folder: str) -> list[str]:
        """Names of half-written small objects that a killed process left in ``folder``."""
        return []

    def read_many(self, names: Sequence[str]) -> list[bytes]:
        """The bytes of several small objects, in that order; FileNotFoundError if one is gone."""
        return [self.read_bytes(name) for name in names]

    def read_json(self, name: str) -> Any:
        """The object parsed as JSON; CacheFormatError when it is not."""
        return self.parse_json(name, self.read_bytes(name))

    def parse_json(self, name: str, content: bytes) -> Any:
        """The bytes of the object ``name`` parsed as JSON; CacheFormatError when they are not."""
        advice = ". Run `pipeline verify` on the cache; delete the file to have its part made again"
        told = f"{self.location}/{name} is damaged: it is not valid JSON"
        with unusable(told, ValueError, RecursionError, advice=advice):
            return json.loads(content)


class LocalStore(Store):
    """A folder on a local or shared file system that has hard links."""

    def __init__(self, root: Path):
        self.root = root
        self.location = str(root)

    def _local(self, name: str) -> Path:
        return self.root / safe_name(name)

    def read_bytes(self, name: str) -> bytes:  # noqa: D102
        return self._local(name).read_bytes()

    def _entries(self, folder: str, folders: bool) -> list[str]:
        path = self._local(folder)
        seen = [e for e in path.iterdir() if e.name[0] != "."] if path.is_dir() else []
        return [e.name for e in seen if (e.is_dir() if folders else e.is_file())]

    def create(self, name: str, content: bytes) -> bool:  # noqa: D102
        path = self._local(name)
        if path.exists():  # a finished cache on a read-only file system is looked at again
            return False
        with self.writing(name):
            try:
                # A link fails if the name exists: the only race-free create.
                write_bytes(path, content, publish=os.link)
            except FileExistsError:
                return False
            except OSError as error:
                if error.errno not in NO_HARD_LINKS:
                    raise
                raise InputError(
                    f"the file system of {self.root} has no hard links ({error.strerror}), which "
                    "make commits atomic. Put the cache on a local disk, on NFS or in an object "
                    "store"
                ) from None
        return True

    def replace(self, name: str, content: bytes) -> None:  # noqa: D102
        with self.writing(name):
            write_bytes(self._local(name), content)

    def finish(self, name: str) -> None:  # noqa: D102
        path = self._local(name)
        sync(path)
        sync(path.parent)

    def discard(self, name: str) -> None:  # noqa: D102
        self._local(name).unlink(missing_ok=True)

    @contextmanager
    def working(self) -> Iterator[bool | None]:  # noqa: D102
        self.root.mkdir(parents=True, exist_ok=True)
        folder = os.open(self.root, os.O_RDONLY)
        try:
            # A killed process lets go of the lock.
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            alone: bool | None = True
        except BlockingIOError:
            alone = False
        except OSError:  # not to be had on this file system
            alone = None
        try:
            yield alone
        finally:
            os.close(folder)

    @property
    def writable(self) -> bool:  # noqa: D102
        return os.access(self.root, os.W_OK)

    def state(self, name: str) -> tuple[int, float]:  # noqa: D102
        found = self._local(name).stat()
        return found.st_size, found.st_mtime

    def temporary(self, folder: str) -> list[str]:  # noqa: D102
        path = self._local(folder) if folder else self.root
        left = path.glob(".*.tmp") if path.is_dir() else ()
        return sorted(entry.relative_to(self.root).as_posix() for entry in left)

    def local_file(self, name: str) -> Path:  # noqa: D102
        path = self._local(name)
        if not path.is_file():
            raise FileNotFoundError(path)
        return path


class ObjectStore(Store):
    """A bucket with conditional puts, through fsspec. Data objects pass through local files.

    A shard is written whole to a local file and uploaded afterwards, because closing an
    object-store stream after an exception publishes what was written so far. A reader downloads a
    shard once and keeps it until the process ends: the temporary folder must hold what is read.
    Raises InputError when the bucket cannot be reached (credentials, endpoint, network).
    """

    def __init__(self, url: str):
        import fsspec

        try:
            self._fs, self.root = fsspec.core.url_to_fs(url.rstrip("/"))
        except (ImportError, ValueError) as error:
            raise InputError(
                f"cannot open {url!r}: {error}. "
                "For s3:// install the extra, in Rekindle's checkout: pip install -e '.[s3]'"
            ) from None
        self.location = url.rstrip("/")
        self._process = os.getpid()
        self._scratch = download_folder(self)

    def __reduce__(self) -> tuple[type["ObjectStore"], tuple[str]]:
        """Open it anew in another process, with a client and a temporary folder of its own."""
        return ObjectStore, (self.location,)

    @property
    def fs(self) -> "AbstractFileSystem":
        """The client of this process: one that was made before a fork must not be used after."""
        if self._process != os.getpid():
            import fsspec

            self._fs, self._process = fsspec.core.url_to_fs(self.location)[0], os.getpid()
        return self._fs

    def _path(self, name: str) -> str:
        return f"{self.root}/{safe_name(name)}"

    @contextmanager
    def _reaching(self, name: str, *passed: type[Exception]) -> Iterator[str]:
        """The object's path. Errors but those of type ``passed`` become one message."""
        path = self._path(name)
        try:
            yield path
        except Exception as error:  # the clients' errors share no base: credentials, DNS, HTTP
            if isinstance(error, passed):
                raise
            raise InputError(
                f"cannot reach {self.location}/{name}: {error}. Check the address, the credentials "
                "and the network; what is there already stays, and the same command goes on"
            ) from error

    @property
    def bucket_missing(self) -> str | None:  # noqa: D102
        bucket = self.root.partition("/")[0]
        with self._reaching("bucket"):
            return None if not bucket or self.fs.exists(bucket) else bucket

    def read_bytes(self, name: str) -> bytes:  # noqa: D102
        with self._reaching(name, FileNotFoundError) as path:
            return bytes(self.fs.cat_file(path))

    def read_many(self, names: Sequence[str]) -> list[bytes]:  # noqa: D102
        with ThreadPoolExecutor(REQUESTS) as pool:  # a request takes long, and little work
            return list(pool.map(self.read_bytes, names))

    def _entries(self, folder: str, folders: bool) -> list[str]:
        kind = "directory" if folders else "file"
        try:
            with self._reaching(folder, FileNotFoundError) as path:
                entries = self.fs.ls(path, detail=True, refresh=True)
        except FileNotFoundError:
            return []
        names = (e["name"].rstrip("/").removeprefix(path) for e in entries if e["type"] == kind)
        # Consoles make "folders" by an empty object of the folder's own name: not an entry of it.
        return [n[1:] for n in names if n[:1] == "/" and n[1:2] != "."]

    def create(self, name: str, content: bytes) -> bool:  # noqa: D102
        with self._reaching(name) as path:
            for delay in (*CONFLICT_DELAYS, None):
                try:
                    self.fs.pipe_file(path, content, mode="create")
                    return True
                except FileExistsError:
                    return False
                except OSError as error:
                    if delay is None or not _is_conflict(error):
                        raise
                    time.sleep(delay)
        raise AssertionError  # the last conflict is raised

    def replace(self, name: str, content: bytes) -> None:  # noqa: D102
        with self._reaching(name) as path:
            self.fs.pipe_file(path, content)

    def _local(self, name: str) -> Path:
        return self._scratch / safe_name(name)

    def finish(self, name: str) -> None:  # noqa: D102
        with self._reaching(name) as path:
            self.fs.put_file(str(self._local(name)), path)
        self._local(name).unlink()  # a whole teacher may be more than the local disk holds

    def discard(self, name: str) -> None:  # noqa: D102
        self._local(name).unlink(missing_ok=True)
        with suppress(FileNotFoundError), self._reaching(name, FileNotFoundError) as path:
            self.fs.rm_file(path)

    def state(self, name: str) -> tuple[int, float]:  # noqa: D102
        with self._reaching(name, FileNotFoundError) as path:
            self.fs.invalidate_cache(path.rsplit("/", 1)[0])  # others write there, too
            found = self.fs.info(path)
        changed = found.get("LastModified") or found.get("mtime") or found.get("updated")
        seconds = changed.timestamp() if hasattr(changed, "timestamp") else float(changed or 0)
        return int(found["size"]), seconds

    def local_file(self, name: str) -> Path:  # noqa: D102
        path = self.begin(name)
        if not path.is_file():
            partial = path.with_name(f"{path.name}.{new_attempt()}")
            with self._reaching(name, FileNotFoundError) as remote:
                self.fs.get_file(remote, str(partial))
            os.replace(partial, path)
        return path


def _is_conflict(error: OSError) -> bool:
    """Whether two conditional puts met (S3's 409): this one did not win, and must ask again."""
    told = repr(error.__cause__ or error)
    return error.errno == errno.EBUSY or "ConditionalRequestConflict" in told
