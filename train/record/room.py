"""Check whether a disk has room for what is still to be written."""

import logging
import shutil
from pathlib import Path

from rekindle.data.counted import shown_bytes

log = logging.getLogger("rekindle")


def free_near(path: Path) -> tuple[Path, int]:
    """Return the nearest existing folder to ``path``, and the free bytes there."""
    absolute = path.absolute()
    nearest = next(folder for folder in (absolute, *absolute.parents) if folder.is_dir())
    return nearest, shutil.disk_usage(nearest).free


def size_of(folder: Path) -> int:
    """Return the bytes of the files in a folder; 0 if it does not exist."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


class Room:
    """Warns once if the disk of ``folder`` lacks room for what a run keeps writing there, judged by
    the size of the last ``what``. Not for a store: its room is unknown.

    ``left``: how many are still to be written and kept; without it each replaces an older one, once
    it is written.
    """

    def __init__(self, folder: Path | None, what: str, left: int | None = None):
        self.folder, self.what, self.left = folder, what, left

    def after(self, took: int) -> None:
        """Note that one of ``took`` bytes was written."""
        if self.left is not None:
            self.left -= 1
        to_come = 1 if self.left is None else self.left
        if self.folder is None or took * to_come <= 0:
            return
        where, free = free_near(self.folder)
        if free >= took * to_come:
            return
        most = free // took
        log.warning(
            "%s: %s are free, and the last %s took %s: there is no room for %s. Make room now: a "
            "full disk ends the run, which can then continue from what is written",
            *(where, shown_bytes(free), self.what, shown_bytes(took)),
            f"more than {most:,} of the {to_come:,} to come" if most else "another one",
        )
        self.folder = None  # warned once
