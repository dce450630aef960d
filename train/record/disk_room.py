"""Check whether a disk has room for what is still to be written."""

import logging
import shutil
from pathlib import Path

from rekindle.data.counted import shown_bytes

log = logging.getLogger("rekindle")


def free_bytes_near(path: Path) -> tuple[Path, int]:
    """Return the nearest existing folder to ``path``, and the free bytes there."""
    absolute = path.absolute()
    nearest = next(folder for folder in (absolute, *absolute.parents) if folder.is_dir())
    return nearest, shutil.disk_usage(nearest).free


def folder_size(folder: Path) -> int:
    """Return the bytes of the files in a folder; 0 if it does not exist."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


class DiskRoom:
    """Warns once if the disk of ``folder`` lacks room for what a run keeps writing there, judged by
    the size of the last ``item``. Not for a store: its room is unknown.

    ``remaining``: how many are still to be written and kept; without it each replaces an older one,
    once it is written.
    """

    def __init__(self, folder: Path | None, item: str, remaining: int | None = None):
        self.folder, self.item, self.remaining = folder, item, remaining

    def after(self, size: int) -> None:
        """Note that an item of ``size`` bytes was written."""
        if self.remaining is not None:
            self.remaining -= 1
        remaining = 1 if self.remaining is None else self.remaining
        if self.folder is None or size * remaining <= 0:
            return
        folder, free = free_bytes_near(self.folder)
        if free >= size * remaining:
            return
        most = free // size
        log.warning(
            "%s: %s are free, and the last %s took %s: there is no room for %s. Make room now: a "
            "full disk ends the run, which can then continue from what is written",
            *(folder, shown_bytes(free), self.item, shown_bytes(size)),
            f"more than {most:,} of the {remaining:,} to come" if most else "another one",
        )
        self.folder = None  # warned once
