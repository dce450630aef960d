"""The sha256 of files that others wrote; they may be large, and are needed several times."""

import hashlib
from functools import lru_cache
from pathlib import Path


def digest_of(file: Path) -> bytes:
    """Return the sha256 of the file's current content; an unchanged file is read once per
    process.
    """
    status = file.stat()
    return _digest(file.resolve(), status.st_size, status.st_mtime_ns)


@lru_cache(1000)
def _digest(file: Path, size: int, changed: int) -> bytes:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").digest()
