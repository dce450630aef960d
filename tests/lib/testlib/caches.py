"""Read a cache's content, and list its problems."""

from collections.abc import Iterator
from pathlib import Path

from rekindle.data.cache import Cache
from rekindle.data.errors import CacheError
from rekindle.data.example import Example
from rekindle.data.inventory import shard_sets
from rekindle.data.storage.store import open_store
from rekindle.pipeline.checks.verify import verify_cache


def examples(cache: Cache) -> Iterator[Example]:
    return (cache.example(index) for index in range(len(cache)))


def committed(path: Path, *folders: str) -> dict[str, bytes]:
    """Return the bytes of every committed shard below ``folders``, by set and unit."""
    return {
        f"{shards.folder}/{unit}": (path / shards.folder / commit.path).read_bytes()
        for shards in shard_sets(open_store(path))
        if not folders or shards.folder.startswith(folders)
        for unit, commit in shards.committed().items()
    }


def problems(path: Path) -> list[str]:
    """Return the problems from the report, or the error if the cache cannot be opened."""
    try:
        return verify_cache(str(path)).problems
    except CacheError as error:
        return [str(error)]
