"""The bytes of a committed file, mapped or requested piece by piece from a store. Checks
nothing.
"""

import io
import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

KEPT_BYTES = 256 << 20  # of recently requested pieces, per process

Region = tuple[int, int, str]  # offset, length, xxh3_64
Piece = tuple[str, int]  # a file, and the first byte in it


class ShardBytes(ABC):
    """The bytes of a file: ``name`` for messages, ``size`` in bytes."""

    name: str
    size: int
    kept = True  # whether regions take no memory of their own

    @abstractmethod
    def region(self, offset: int, length: int) -> pa.Buffer:
        """Return one of the regions of its commit record."""

    @abstractmethod
    def file(self) -> Any:
        """Return what Arrow can open."""


class Mapped(ShardBytes):
    """A local file, mapped and not held open: a process reads thousands of shards at a time."""

    def __init__(self, path: Path, name: str | None = None):
        self.name, self.path = name or str(path), path
        with pa.memory_map(str(path)) as file:
            self._buffer = file.read_buffer()  # the mapping outlives the file's descriptor
        self.size = self._buffer.size

    def region(self, offset: int, length: int) -> pa.Buffer:  # noqa: D102
        return self._buffer.slice(offset, length)

    def file(self) -> Any:  # noqa: D102
        return self._buffer


class _Pieces:
    """Recently requested pieces."""

    def __init__(self) -> None:
        self._kept: OrderedDict[Piece, bytes] = OrderedDict()
        self._bytes = 0
        self._mutex = threading.Lock()

    def get(self, piece: Piece, read: Callable[[], bytes]) -> bytes:
        with self._mutex:
            if (found := self._kept.get(piece)) is not None:
                self._kept.move_to_end(piece)
                return found
        found = read()
        with self._mutex:
            if piece not in self._kept:
                self._kept[piece] = found
                self._bytes += len(found)
            while self._bytes > KEPT_BYTES and len(self._kept) > 1:
                self._bytes -= len(self._kept.popitem(last=False)[1])
        return found


_PIECES = _Pieces()


class Asked(ShardBytes):
    """An object in a store; each region is requested when it is used.

    ``read(begin, end)`` returns bytes of it. Recent regions of all such files are kept, up to
    KEPT_BYTES; ``anew``: this file uses none that was requested before.
    """

    kept = False

    def __init__(
        self,
        name: str,
        size: int,
        regions: Sequence[Region],
        read: Callable[[int, int], bytes],
        anew: bool = False,
    ):
        self.name, self.size = name, size
        self.regions, self._read = regions, read
        self._pieces = _Pieces() if anew else _PIECES

    def region(self, offset: int, length: int) -> pa.Buffer:  # noqa: D102
        return pa.py_buffer(
            self._pieces.get((self.name, offset), lambda: self._read(offset, offset + length))
        )

    def file(self) -> Any:  # noqa: D102
        return pa.PythonFile(io.BufferedReader(_Regions(self)), mode="r")


class _Regions(io.RawIOBase):
    """The regions one after another, as a file."""

    def __init__(self, source: Asked):
        self._source, self._at = source, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._source.size}[whence]
        self._at = start + offset
        return self._at

    def readinto(self, buffer: Any, /) -> int:
        for offset, length, _ in self._source.regions:
            if offset <= self._at < offset + length:
                begin = self._at - offset
                region = memoryview(self._source.region(offset, length)).cast("B")
                content = region[begin : begin + len(buffer)]
                buffer[: len(content)] = content
                self._at += len(content)
                return len(content)
        return 0
