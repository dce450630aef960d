"""The sha256 of files that others wrote; they may be large, and are asked about several times."""

import hashlib
from functools import lru_cache
from pathlib import Path


def digest_of(file: Path) -> bytes:
    """The sha256 of what the file holds now; of an unchanged one it is read once in a process."""
    about = file.stat()
    return _digest(file.resolve(), about.st_size, about.st_mtime_ns)


@lru_cache(1000)
def _digest(file: Path, size: int, changed: int) -> bytes:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").digest()
