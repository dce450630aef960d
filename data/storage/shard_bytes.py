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

CACHE_BYTES = 256 << 20  # of recently requested pieces, per process

Region = tuple[int, int, str]  # offset, length, xxh3_64
Piece = tuple[str, int]  # a file, and the first byte in it


class ShardBytes(ABC):
    """The bytes of a file: ``name`` for messages, ``size`` in bytes."""

    name: str
    size: int
    is_mapped = True  # whether regions take no memory of their own

    @abstractmethod
    def region(self, offset: int, length: int) -> pa.Buffer:
        """Return one of the regions of its commit record."""

    @abstractmethod
    def file(self) -> Any:
        """Return what Arrow can open."""


class MappedBytes(ShardBytes):
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


class _PieceCache:
    """Recently requested pieces."""

    def __init__(self) -> None:
        self._cached: OrderedDict[Piece, bytes] = OrderedDict()
        self._bytes = 0
        self._mutex = threading.Lock()

    def get(self, piece: Piece, read: Callable[[], bytes]) -> bytes:
        with self._mutex:
            if (content := self._cached.get(piece)) is not None:
                self._cached.move_to_end(piece)
                return content
        content = read()
        with self._mutex:
            if piece not in self._cached:
                self._cached[piece] = content
                self._bytes += len(content)
            while self._bytes > CACHE_BYTES and len(self._cached) > 1:
                self._bytes -= len(self._cached.popitem(last=False)[1])
        return content


_SHARED_CACHE = _PieceCache()


class RequestedBytes(ShardBytes):
    """An object in a store; each region is requested when it is used.

    ``read(begin, end)`` returns bytes of it. Recent regions of all such files are kept, up to
    CACHE_BYTES; ``own_cache``: this file uses none that was requested before.
    """

    is_mapped = False

    def __init__(
        self,
        name: str,
        size: int,
        regions: Sequence[Region],
        read: Callable[[int, int], bytes],
        own_cache: bool = False,
    ):
        self.name, self.size = name, size
        self.regions, self._read = regions, read
        self._cache = _PieceCache() if own_cache else _SHARED_CACHE

    def region(self, offset: int, length: int) -> pa.Buffer:  # noqa: D102
        return pa.py_buffer(
            self._cache.get((self.name, offset), lambda: self._read(offset, offset + length))
        )

    def file(self) -> Any:  # noqa: D102
        return pa.PythonFile(io.BufferedReader(_Regions(self)), mode="r")


class _Regions(io.RawIOBase):
    """The regions one after another, as a file."""

    def __init__(self, source: RequestedBytes):
        self._source, self._position = source, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        starts = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._source.size}
        self._position = starts[whence] + offset
        return self._position

    def readinto(self, buffer: Any, /) -> int:
        for offset, length, _ in self._source.regions:
            if offset <= self._position < offset + length:
                begin = self._position - offset
                region = memoryview(self._source.region(offset, length)).cast("B")
                content = region[begin : begin + len(buffer)]
                buffer[: len(content)] = content
                self._position += len(content)
                return len(content)
        return 0
