"""Where a cache lives: a local folder or an object store. Knows names and bytes, nothing of what they mean.

Two operations make a cache safe to write from many processes: data objects get names that no one else
uses and are never overwritten, and a small record is created *exclusively*, which is the commit point.
"""

import json
import os
import shutil
import tempfile
import uuid
from abc import ABC, abstractmethod
from pathlib import Path, PurePosixPath
from typing import Any

from rekindle.data.errors import CacheFormatError, InputError


def open_store(location: str | os.PathLike[str]) -> "Store":
    """The store at a local path or an fsspec URL (``s3://``, ``gs://``, …)."""
    text = os.fspath(location)
    if "://" not in text:
        return LocalStore(Path(text))
    if text.startswith("file://"):
        return LocalStore(Path(text.removeprefix("file://")))
    return ObjectStore(text)


def safe_name(name: str) -> str:
    """``name`` if it stays inside the store, else CacheFormatError (records may come from strangers)."""
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts or "\\" in name or "\0" in name:
        raise CacheFormatError(
            f"the name {name!r} in a cache record leaves the cache's folder; the record is not ours"
        )
    return name


def new_attempt() -> str:
    """Eight hexadecimal digits that make a data object's name unique to one attempt."""
    return uuid.uuid4().hex[:8]


class Store(ABC):
    """Named bytes below one root."""

    location: str

    @abstractmethod
    def read_bytes(self, name: str) -> bytes:
        """The object's bytes; FileNotFoundError when there is none."""

    @abstractmethod
    def names(self, folder: str) -> list[str]:
        """The names of the objects directly in ``folder``, sorted; empty when it does not exist."""

    @abstractmethod
    def folders(self, folder: str) -> list[str]:
        """The names of the folders directly in ``folder``, sorted."""

    @abstractmethod
    def create(self, name: str, content: bytes) -> bool:
        """Write a small object, whole and durable, only if the name is free. False: it was taken."""

    @abstractmethod
    def replace(self, name: str, content: bytes) -> None:
        """Write a small object, whole, over whatever was there (only for what can be rebuilt)."""

    @abstractmethod
    def begin(self, name: str) -> Path:
        """A local file to write a new data object into; ``finish`` or ``discard`` must follow."""

    @abstractmethod
    def finish(self, name: str) -> None:
        """Make the data object begun under ``name`` durable and visible."""

    @abstractmethod
    def discard(self, name: str) -> None:
        """Remove a data object, finished or not; no error when it is gone."""

    @abstractmethod
    def local_file(self, name: str) -> Path:
        """A local file holding the object, fit for a memory map; FileNotFoundError when there is none."""

    def read_json(self, name: str) -> Any:
        """The object parsed as JSON; CacheFormatError when it is not."""
        content = self.read_bytes(name)
        try:
            return json.loads(content)
        except ValueError:
            raise CacheFormatError(
                f"{self.location}/{name} is damaged: it is not valid JSON. "
                "Run `pipeline verify` on the cache; delete the file to have its part made again"
            ) from None


class LocalStore(Store):
    """A folder on a local or shared file system that has hard links."""

    def __init__(self, root: Path):
        self.root = root
        self.location = str(root)

    def _path(self, name: str) -> Path:
        return self.root / safe_name(name)

    def read_bytes(self, name: str) -> bytes:  # noqa: D102
        return self._path(name).read_bytes()

    def names(self, folder: str) -> list[str]:  # noqa: D102
        path = self._path(folder)
        return sorted(entry.name for entry in path.iterdir() if entry.is_file()) if path.is_dir() else []

    def folders(self, folder: str) -> list[str]:  # noqa: D102
        path = self._path(folder)
        return sorted(entry.name for entry in path.iterdir() if entry.is_dir()) if path.is_dir() else []

    def create(self, name: str, content: bytes) -> bool:  # noqa: D102
        path = self._path(name)
        temporary = self._write_temporary(path, content)
        try:
            os.link(temporary, path)  # fails if the name exists: the only race-free create
        except FileExistsError:
            return False
        finally:
            temporary.unlink()
        _sync_folder(path.parent)
        return True

    def replace(self, name: str, content: bytes) -> None:  # noqa: D102
        path = self._path(name)
        os.replace(self._write_temporary(path, content), path)
        _sync_folder(path.parent)

    def _write_temporary(self, path: Path, content: bytes) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        # A leading dot: listings of the folder's records never take an unfinished one for real.
        temporary = path.parent / f".{path.name}.{new_attempt()}.tmp"
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        return temporary

    def begin(self, name: str) -> Path:  # noqa: D102
        path = self._path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def finish(self, name: str) -> None:  # noqa: D102
        path = self._path(name)
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        _sync_folder(path.parent)

    def discard(self, name: str) -> None:  # noqa: D102
        self._path(name).unlink(missing_ok=True)

    def local_file(self, name: str) -> Path:  # noqa: D102
        path = self._path(name)
        if not path.is_file():
            raise FileNotFoundError(path)
        return path


class ObjectStore(Store):
    """A bucket with conditional puts, through fsspec. Data objects pass through local files.

    A shard is written whole to a local file and uploaded afterwards, because closing an object-store
    stream after an exception publishes what was written so far. Readers download a shard once.
    """

    def __init__(self, url: str):
        import fsspec

        try:
            self.fs, self.root = fsspec.core.url_to_fs(url.rstrip("/"))
        except (ImportError, ValueError) as error:
            raise InputError(
                f"cannot open {url!r}: {error}. For s3:// install the extra: pip install 'rekindle[s3]'"
            ) from None
        self.location = url.rstrip("/")
        self._scratch = Path(tempfile.mkdtemp(prefix="rekindle-"))

    def __del__(self) -> None:
        shutil.rmtree(getattr(self, "_scratch", ""), ignore_errors=True)

    def _path(self, name: str) -> str:
        return f"{self.root}/{safe_name(name)}"

    def read_bytes(self, name: str) -> bytes:  # noqa: D102
        return bytes(self.fs.cat_file(self._path(name)))

    def names(self, folder: str) -> list[str]:  # noqa: D102
        return self._entries(folder, "file")

    def folders(self, folder: str) -> list[str]:  # noqa: D102
        return self._entries(folder, "directory")

    def _entries(self, folder: str, kind: str) -> list[str]:
        try:
            entries = self.fs.ls(self._path(folder), detail=True, refresh=True)
        except FileNotFoundError:
            return []
        return sorted(e["name"].rsplit("/", 1)[-1] for e in entries if e["type"] == kind)

    def create(self, name: str, content: bytes) -> bool:  # noqa: D102
        try:
            self.fs.pipe_file(self._path(name), content, mode="create")
        except FileExistsError:
            return False
        return True

    def replace(self, name: str, content: bytes) -> None:  # noqa: D102
        self.fs.pipe_file(self._path(name), content)

    def _scratch_file(self, name: str) -> Path:
        path = self._scratch / safe_name(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def begin(self, name: str) -> Path:  # noqa: D102
        return self._scratch_file(name)

    def finish(self, name: str) -> None:  # noqa: D102
        self.fs.put_file(str(self._scratch_file(name)), self._path(name))

    def discard(self, name: str) -> None:  # noqa: D102
        self._scratch_file(name).unlink(missing_ok=True)
        if self.fs.exists(self._path(name)):
            self.fs.rm_file(self._path(name))

    def local_file(self, name: str) -> Path:  # noqa: D102
        path = self._scratch_file(name)
        if not path.is_file():
            partial = path.with_name(f"{path.name}.{new_attempt()}")
            self.fs.get_file(self._path(name), str(partial))
            os.replace(partial, path)
        return path


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
