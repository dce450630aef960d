"""Sets of many units with commit records but no data; a store that counts accesses."""

import hashlib
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from rekindle.data.storage.commits import Commit
from rekindle.data.storage.store import LocalStore
from rekindle.data.storage.units import place_of

ROWS = 8


def simulated_commit(unit: str, seed: str = "", **facts: object) -> Commit:
    """Return a record as a writer would leave it, for a file that need not exist."""
    digest = hashlib.sha256(f"{unit} {seed}".encode()).hexdigest()
    shard, replica = place_of(unit) or (0, None)
    size = 4_000 + shard % 97
    about = {"tokens": 100 + shard % 11, "shard": shard, "replica": replica, **facts}
    regions = ((0, 1000, digest[:16]), (1000, 2000, digest[16:32]), (3000, size - 3000, digest[:9]))
    path = f"data/{unit}-{digest[:8]}.arrow"
    return Commit(unit, path, ROWS, size, digest, regions, about)


def write_records(folder: Path, commits: Iterable[Commit]) -> None:
    """Write the records of ``commits`` to a set's folder, quickly, without syncing."""
    (folder / "commits").mkdir(parents=True, exist_ok=True)
    for commit in commits:
        descriptor = os.open(
            folder / "commits" / f"{commit.unit}.json", os.O_CREAT | os.O_WRONLY | os.O_TRUNC
        )
        os.write(descriptor, commit.to_bytes())
        os.close(descriptor)


class CountingStore(LocalStore):
    """Counts listings, and objects that are read."""

    def __init__(self, root: Path):
        super().__init__(root)
        self.asked: Counter[str] = Counter()

    def read_bytes(self, name: str) -> bytes:
        self.asked["records" if "/commits/" in name else "others"] += 1
        return super().read_bytes(name)

    def view(self, name: str) -> bytes | memoryview:
        self.asked["others"] += 1
        return super().view(name)

    def listing(self, folder: str) -> dict[str, str]:
        self.asked["listings"] += 1
        return super().listing(folder)

    def _entries(self, folder: str, folders: bool) -> list[str]:
        self.asked["listings"] += 1
        return super()._entries(folder, folders)


class CountingBucket(CountingStore):
    """Behaves like an object store: a listing gives each object's version, a folder has no
    state.
    """

    def listing(self, folder: str) -> dict[str, str]:
        return {
            name: hashlib.md5((self._local(folder) / name).read_bytes()).hexdigest()
            for name in super().listing(folder)
        }

    def folder_state(self, folder: str) -> str:
        return ""
