"""Open a store: a local folder, or a bucket."""

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from mmap import ACCESS_READ, mmap
from pathlib import Path

from rekindle.data.errors import InputError
from rekindle.data.storage.atomic import sync, write_bytes
from rekindle.data.storage.base import Store, safe_name
from rekindle.data.storage.object_store import ObjectStore
from rekindle.data.storage.shard_bytes import MappedBytes, Region, ShardBytes

LOCK_FOLDER = "corpus"  # a folder of every cache; processes that need its content hold its lock
NO_HARD_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)


def open_store(location: str | os.PathLike[str]) -> "Store":
    """Return the store at a local path or an fsspec URL (``s3://``, ``gs://``, …)."""
    text = os.fspath(location)
    local = text.removeprefix("file://")
    return ObjectStore(text) if "://" in local else LocalStore(Path(local).expanduser())


class LocalStore(Store):
    """A folder on a local or shared file system with hard links."""

    def __init__(self, root: Path):
        self.root = root
        self.location = str(root)

    def _local(self, name: str) -> Path:
        return self.root / safe_name(self.overlay.place(name))

    def read_bytes(self, name: str) -> bytes:  # noqa: D102
        return self._local(name).read_bytes()

    def view(self, name: str) -> bytes | memoryview:  # noqa: D102
        with open(self._local(name), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            return memoryview(mmap(file.fileno(), size, access=ACCESS_READ)) if size else b""

    def listing(self, folder: str) -> dict[str, str]:  # noqa: D102
        path = self._local(folder)  # there may be a million names: no call for each
        found = os.listdir(path) if path.is_dir() else ()
        return dict.fromkeys((name for name in found if name[0] != "."), "")

    def folder_state(self, folder: str) -> str:  # noqa: D102
        path = self._local(folder)
        return str(path.stat().st_mtime_ns) if path.is_dir() else ""

    def _entries(self, folder: str, folders: bool) -> list[str]:
        path = self._local(folder)
        if not path.is_dir():
            return []
        with os.scandir(path) as entries:
            visible = (e for e in entries if e.name[0] != ".")
            return [e.name for e in visible if (e.is_dir() if folders else e.is_file())]

    def create(self, name: str, content: bytes) -> bool:  # noqa: D102
        path = self._local(name)
        if path.exists():  # a finished cache on a read-only file system is checked again
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
        with suppress(IsADirectoryError):  # a folder: not a data object, so not ours
            self._local(name).unlink(missing_ok=True)

    def remove_folder(self, folder: str) -> None:  # noqa: D102
        path = self._local(folder)
        with self.writing(folder), suppress(FileNotFoundError):
            if path.is_symlink():  # its target is not ours
                path.unlink()
            else:
                shutil.rmtree(path)

    @contextmanager
    def _locked(self, folder: Path, mode: int) -> Iterator[bool | None]:
        """Hold a lock of a folder. Yield whether it was granted; None if locks are not
        supported.
        """
        try:
            descriptor = os.open(folder, os.O_RDONLY)
        except OSError:  # an older process may be seen a moment after it began
            yield None
            return
        try:
            # A killed process releases the lock.
            fcntl.flock(descriptor, mode | fcntl.LOCK_NB)
            is_granted: bool | None = True
        except BlockingIOError:
            is_granted = False
        except OSError:  # not supported on this file system
            is_granted = None
        try:
            yield is_granted
        finally:
            os.close(descriptor)

    @contextmanager
    def working(self) -> Iterator[bool | None]:  # noqa: D102
        (self.root / LOCK_FOLDER).mkdir(parents=True, exist_ok=True)
        with self.reading(), self._locked(self.root, fcntl.LOCK_EX) as is_alone:
            yield is_alone

    @contextmanager
    def reading(self) -> Iterator[None]:  # noqa: D102
        with self._locked(self.root / LOCK_FOLDER, fcntl.LOCK_SH) as is_granted:
            if is_granted is False:
                raise InputError(
                    f"`pipeline teachers` is changing {self.location} in another process; run the "
                    "same command again when that has ended"
                )
            yield

    @contextmanager
    def changing(self) -> Iterator[None]:  # noqa: D102
        with (
            self._locked(self.root, fcntl.LOCK_EX) as is_alone,
            self._locked(self.root / LOCK_FOLDER, fcntl.LOCK_EX) as is_unused,
        ):
            if is_alone is False or is_unused is False:
                activity = "writes to" if is_alone is False else "reads"
                raise InputError(
                    f"another process {activity} {self.location} (cache-teachers, import-targets, "
                    "train-student, verify, export-targets or teachers): nothing was changed; run "
                    "the same command again when that has ended"
                )
            yield

    @property
    def free_bytes(self) -> int | None:  # noqa: D102
        return shutil.disk_usage(self.root).free

    @property
    def writable(self) -> bool:  # noqa: D102
        return os.access(self.root, os.W_OK)

    def state(self, name: str) -> tuple[int, float]:  # noqa: D102
        found = self._local(name).stat()
        return found.st_size, found.st_mtime

    def temporary(self, folder: str) -> list[str]:  # noqa: D102
        path = self._local(folder) if folder else self.root
        leftovers = path.glob(".*.tmp") if path.is_dir() else ()
        return sorted(entry.relative_to(self.root).as_posix() for entry in leftovers)

    def open_bytes(  # noqa: D102
        self, name: str, size: int, sha256: str, regions: Sequence[Region], direct: bool = False
    ) -> ShardBytes:
        path = self._local(name)
        if path.is_dir():  # Arrow has no code for that error
            raise FileNotFoundError(name)
        return MappedBytes(path)
