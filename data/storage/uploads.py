"""Temporary folders for data being uploaded to an object store, removed with their owner or the
process.
"""

import os
import shutil
import tempfile
import weakref
from pathlib import Path

_removals: list[weakref.finalize] = []


def upload_folder(owner: object) -> Path:
    """Return a new folder that is removed together with ``owner``."""
    folder = Path(tempfile.mkdtemp(prefix="rekindle-"))
    _removals.append(weakref.finalize(owner, _remove, folder, os.getpid()))
    return folder


def remove_uploads() -> None:
    """Remove all of them, for a process that exits at once."""
    for remove in _removals:
        remove()


def _remove(folder: Path, process: int) -> None:
    """Remove what this process has written; a fork leaves it to its parent."""
    if process == os.getpid():
        shutil.rmtree(folder, ignore_errors=True)
