"""Where a cache lives: named bytes below one root. Knows names and bytes, not their meaning.

Two operations make a cache safe to write from many processes: data objects get names that no one
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


NEXT = ".next"  # the folder in a set of shards with what is to take the place of these
REPLACED = ("commits", "teacher.json", "records.arrow", "records.json")


@dataclass(frozen=True)
class Seen:
    """What of a store is seen otherwise while it is changed."""

    hidden: str = ""  # a folder that is not listed
    replaced: tuple[str, ...] = ()  # sets whose REPLACED files are those in their folder NEXT

    def place(self, name: str) -> str:
        """Where the object that is called ``name`` lies."""
        for folder in self.replaced:
            rest = name.removeprefix(f"{folder}/")
            if rest != name and rest.partition("/")[0] in REPLACED:
                return f"{folder}/{NEXT}/{rest}"
        return name


class Store(ABC):
    """Named bytes below one root."""

    location: str
    seen = Seen()

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
        names = self._entries(folder, folders=True)
        return sorted(name for name in names if f"{folder}/{name}" != self.seen.hidden)

    def listing(self, folder: str) -> dict[str, str]:
        """The names of the objects directly in ``folder``, each with its state: what differs when
        another object takes its name, as far as a listing tells; "" where it does not.
        """
        return dict.fromkeys(self._entries(folder, folders=False), "")

    def folder_state(self, folder: str) -> str:
        """What differs when an object comes into ``folder`` or leaves it; "" where that cannot be
        told without a listing.
        """
        return ""

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

    @abstractmethod
    def remove_folder(self, folder: str) -> None:
        """Remove a folder with all that is in it, hidden names too; no error when it is gone."""

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
    def open_bytes(
        self, name: str, size: int, sha256: str, regions: Sequence[Region], direct: bool = False
    ) -> ShardBytes:
        """The bytes of a data object that was committed with that size, sha256 and ``regions``;
        FileNotFoundError where it is gone. ``direct``: those of the store itself, no local copy's.
        """

    @abstractmethod
    def state(self, name: str) -> tuple[int, float]:
        """Bytes and time of the last change (seconds since 1970); FileNotFoundError without one."""

    @contextmanager
    def working(self) -> Iterator[bool | None]:
        """While a process writes: whether no other one does; None where that cannot be told.

        InputError while another one is ``changing`` what is there.
        """
        yield None

    @contextmanager
    def reading(self) -> Iterator[None]:
        """While a process needs what is there; InputError while another one is ``changing`` it."""
        yield

    @contextmanager
    def changing(self) -> Iterator[None]:
        """While what is there is changed; InputError while others write, or need what is there."""
        yield

    @property
    def free(self) -> int | None:
        """Bytes that there is room for; None where that cannot be told."""
        return None

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

    def view(self, name: str) -> bytes | memoryview:
        """The object's bytes, mapped where that goes: of one that is replaced as a whole."""
        return self.read_bytes(name)

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
