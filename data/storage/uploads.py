"""Temporary folders for what is on its way into an object store; they go with their owner, or with
the process.
"""

import os
import shutil
import tempfile
import weakref
from pathlib import Path

_removals: list[weakref.finalize] = []


def upload_folder(owner: object) -> Path:
    """Return a new folder that is removed when ``owner`` goes."""
    folder = Path(tempfile.mkdtemp(prefix="rekindle-"))
    _removals.append(weakref.finalize(owner, _remove, folder, os.getpid()))
    return folder


def remove_uploads() -> None:
    """Remove them all: for a process that ends at once."""
    for remove in _removals:
        remove()


def _remove(folder: Path, process: int) -> None:
    """Remove what a process has written; a fork of it leaves that to it."""
    if process == os.getpid():
        shutil.rmtree(folder, ignore_errors=True)
