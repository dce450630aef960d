"""Where a cache lives: named bytes below one root. Knows names and bytes, not their meaning.

Two operations make a cache safe to write from many processes: data objects get names that nobody
else uses and are never overwritten, and a small record is created *exclusively*, which is the
commit point.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from rekindle.data.errors import CacheFormatError, InputError, unusable
from rekindle.data.storage.shard_bytes import Region, ShardBytes

LONGEST_PART, LONGEST_NAME = 240, 900  # bytes; file systems allow 255, S3's keys have 1,024


def safe_name(name: str) -> str:
    """Return ``name`` if it stays inside the store, else raise CacheFormatError: records may come
    from strangers.
    """
    parts = PurePosixPath(name).parts
    leaves = not parts or name.startswith("/") or ".." in parts or "\\" in name or "\0" in name
    # The operating system treats lone surrogates and long names as errors, each differently.
    sizes = [len(part.encode("utf-8", "replace")) for part in parts]
    has_surrogate = any("\ud800" <= character <= "\udfff" for character in name)
    if leaves or has_surrogate or max(sizes) > LONGEST_PART or sum(sizes) > LONGEST_NAME:
        raise CacheFormatError(
            f"the name {name!r} in a cache record leaves the cache's folder; the record is not ours"
        )
    return name


NEXT_FOLDER = (
    ".next"  # a folder in a set of shards, with the files that will replace REPLACED_FILES
)
REPLACED_FILES = ("commits", "teacher.json", "records.arrow", "records.json")


@dataclass(frozen=True)
class Overlay:
    """What readers see differently in a store during a change."""

    hidden: str = ""  # a folder that is not listed
    replaced: tuple[str, ...] = ()  # sets whose REPLACED_FILES are those in their NEXT_FOLDER

    def place(self, name: str) -> str:
        """Return the location of the object called ``name``."""
        for folder in self.replaced:
            inside = name.removeprefix(f"{folder}/")
            if inside != name and inside.partition("/")[0] in REPLACED_FILES:
                return f"{folder}/{NEXT_FOLDER}/{inside}"
        return name


class Store(ABC):
    """Named bytes below one root."""

    location: str
    overlay = Overlay()

    @abstractmethod
    def read_bytes(self, name: str) -> bytes:
        """Return the object's bytes; raise FileNotFoundError without one."""

    def names(self, folder: str) -> list[str]:
        """Return the names of the objects directly in ``folder``, sorted; empty if it does not
        exist.

        Names with a leading dot are left out: leftovers of killed processes, and files of desktops.
        """
        return sorted(self._entries(folder, folders=False))

    def folders(self, folder: str) -> list[str]:
        """Return the names of the folders directly in ``folder``, sorted."""
        names = self._entries(folder, folders=True)
        return sorted(name for name in names if f"{folder}/{name}" != self.overlay.hidden)

    def listing(self, folder: str) -> dict[str, str]:
        """Return the names of the objects directly in ``folder``, each with its state.

        The state changes when another object takes the name, as far as a listing shows it; "" if
        not.
        """
        return dict.fromkeys(self._entries(folder, folders=False), "")

    def folder_state(self, folder: str) -> str:
        """Return a value that changes when an object is added to or removed from ``folder``; "" if
        that is unknown without a listing.
        """
        return ""

    @abstractmethod
    def _entries(self, folder: str, folders: bool) -> list[str]: ...

    @abstractmethod
    def create(self, name: str, content: bytes) -> bool:
        """Write a small object, whole and durable, only if its name is free. False: it was taken.

        After a lost answer a client may retry, and be told that the name is taken by what it wrote
        itself; to know the winner, read the object.
        """

    @abstractmethod
    def replace(self, name: str, content: bytes) -> None:
        """Write a whole small object over what exists (only for what can be rebuilt)."""

    def begin(self, name: str) -> Path:
        """Return a local file for a new data object; ``finish`` or ``discard`` must follow."""
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
        """Remove a data object, finished or not; no error if it is gone."""

    @abstractmethod
    def remove_folder(self, folder: str) -> None:
        """Remove a folder with all its content, including hidden names; no error if it is gone."""

    @contextmanager
    def writing(self, name: str) -> Iterator[None]:
        """Turn a full disk, a lost permission and the like into one message."""
        try:
            yield
        except OSError as error:
            raise InputError(
                f"cannot write {self.location}/{name}: {error.strerror or error}. What is "
                "there already stays: make room or restore the permission, then run the same "
                "command again"
            ) from error

    @abstractmethod
    def open_bytes(
        self, name: str, size: int, sha256: str, regions: Sequence[Region], direct: bool = False
    ) -> ShardBytes:
        """Return the bytes of a data object committed with that size, sha256 and ``regions``; raise
        FileNotFoundError if it is gone. ``direct``: from the store itself, not from a local copy.
        """

    @abstractmethod
    def state(self, name: str) -> tuple[int, float]:
        """Return bytes and modification time (seconds since 1970); raise FileNotFoundError without
        one.
        """

    @contextmanager
    def working(self) -> Iterator[bool | None]:
        """Mark this process as writing. Yield whether no other one writes; None if unknown. Raise
        InputError while another process is ``changing`` the content.
        """
        yield None

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Mark this process as reading; raise InputError while another one is ``changing`` the
        content.
        """
        yield

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Change existing content; raise InputError while others write or read."""
        yield

    @property
    def free_bytes(self) -> int | None:
        """Free bytes; None if unknown."""
        return None

    @property
    def writable(self) -> bool:
        """Whether it can be written to, as far as known; a mount may be read-only."""
        return True

    @property
    def bucket_missing(self) -> str | None:
        """The name of its bucket, if no such bucket is visible; else None."""
        return None

    def exists(self, name: str) -> bool:
        """Return whether there is an object of that name."""
        try:
            self.state(name)
        except FileNotFoundError:
            return False
        return True

    def temporary(self, folder: str) -> list[str]:
        """Return the names of half-written small objects that a killed process left in
        ``folder``.
        """
        return []

    def view(self, name: str) -> bytes | memoryview:
        """Return the object's bytes, mapped if possible, for an object that is only
        replaced whole.
        """
        return self.read_bytes(name)

    def read_many(self, names: Sequence[str]) -> list[bytes]:
        """Return the bytes of several small objects in order; raise FileNotFoundError if one is
        gone.
        """
        return [self.read_bytes(name) for name in names]

    def read_json(self, name: str) -> Any:
        """Return the object parsed as JSON; raise CacheFormatError if it is not JSON."""
        return self.parse_json(name, self.read_bytes(name))

    def parse_json(self, name: str, content: bytes) -> Any:
        """Return the bytes of the object ``name`` parsed as JSON; raise CacheFormatError if they
        are not.
        """
        advice = ". Run `pipeline verify` on the cache; delete the file to have its part made again"
        message = f"{self.location}/{name} is damaged: it is not valid JSON"
        with unusable(message, ValueError, RecursionError, advice=advice):
            return json.loads(content)
