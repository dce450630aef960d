"""List all files of a cache: find damaged ones, and what ``pipeline gc`` removes.

Works on a cache that is damaged anywhere: no function here needs another part to be sound.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial

from rekindle.data.corpus.stored_tokenizer import (
    TOKENIZER,
    TOKENIZER_FILES,
    damaged_tokenizer_files,
)
from rekindle.data.errors import CacheError, CacheFormatError, CacheVersionError, InputError
from rekindle.data.journal import read_journal
from rekindle.data.settings import parse_settings
from rekindle.data.storage.base import Store
from rekindle.data.storage.manifest import MANIFEST, read_manifest
from rekindle.data.storage.seal import REPAIR, VERSION, read_sealed
from rekindle.data.storage.shards import ShardSet
from rekindle.data.targets.head import HEAD_FILES, read_head
from rekindle.data.targets.reading.files import read_teacher
from rekindle.data.targets.schema import TeacherInfo

REQUIRED_FILES = {
    "corpus": {"corpus.json", "tokenizer.json"},
    "views": {"view.json"},
    "targets": {"teacher.json"},
}


def target_folders(store: Store) -> list[str]:
    """Return the folders of all teachers' targets, each followed by those of its extensions."""
    found = []
    for name in store.folders("targets"):
        base = f"targets/{name}"
        found.append(base)
        found += [f"{base}/extensions/{part}" for part in store.folders(f"{base}/extensions")]
    return found


def shard_sets(store: Store) -> list[ShardSet]:
    """Return corpus, views and targets, in this order."""
    views = [f"views/{name}" for name in store.folders("views")]
    return [ShardSet(store, folder) for folder in ["corpus", *views, *target_folders(store)]]


def descriptions(store: Store) -> Iterator[str]:
    """Yield the sealed files beside the shards, except the manifest."""
    for folder in [shards.folder for shards in shard_sets(store)]:
        yield from (f"{folder}/{n}" for n in store.names(folder) if n.endswith(".json"))


def damaged_descriptions(store: Store) -> dict[str, CacheFormatError]:
    """Return what is wrong with the small files: manifest, descriptions, tokenizer, output
    matrices.

    Raises CacheVersionError for a cache version that this code cannot read.
    """
    damaged: dict[str, CacheFormatError] = {}

    def check(name: str, read: Callable[[], object]) -> None:
        try:
            read()
        except FileNotFoundError:
            pass
        except CacheVersionError:
            raise
        except CacheFormatError as error:
            damaged[name] = error

    if store.exists(MANIFEST):
        check(MANIFEST, partial(read_journal, store))
    for name in descriptions(store):
        if name != TOKENIZER_FILES:
            check(name, partial(read_sealed, store, name))
    for folder in target_folders(store):
        # Without a sound head.json a matrix is unfinished, or cannot be judged.
        if {*HEAD_FILES} <= {*store.names(folder)} and f"{folder}/head.json" not in damaged:
            check(f"{folder}/head.safetensors", partial(read_head, store, folder))
    return damaged | damaged_tokenizer_files(store)


def lost_descriptions(store: Store) -> dict[str, CacheFormatError]:
    """Return the small files that the existing shards require and that are missing (from
    format 2).
    """
    if read_manifest(store).get(VERSION) == 1:
        return {}
    lost: dict[str, CacheFormatError] = {}
    for shards in shard_sets(store):
        if not store.names(f"{shards.folder}/commits"):
            continue
        names = {*store.names(shards.folder)}
        required = REQUIRED_FILES[shards.folder.partition("/")[0]]
        with_head = required | {*HEAD_FILES} if names & {*HEAD_FILES} else required
        for name in sorted(with_head - names):
            path = f"{shards.folder}/{name}"
            lost[path] = CacheFormatError(f"{store.location}/{path} is missing. {REPAIR}")
    return lost


def imported_teachers(store: Store) -> list[str]:
    """Return the teachers whose targets were made elsewhere: by their descriptions or, if those are
    damaged, by what a sound shard records.
    """
    return [name for name in store.folders("targets") if is_imported(store, name)]


def is_imported(store: Store, name: str) -> bool:
    """Return whether the teacher is imported, as far as anything sound says so."""
    with suppress(CacheError):
        return read_teacher(store, name).imported is not None
    info = info_from_shards(store, name)
    return info is not None and info.imported is not None


def info_from_shards(store: Store, name: str) -> TeacherInfo | None:
    """Return the teacher recorded in a sound shard of a teacher's folder, if there is one."""
    shards = ShardSet(store, f"targets/{name}")
    for commit in shards.survey()[0].records():
        with suppress(CacheError, InputError):
            shard = shards.open(commit)
            return parse_settings(TeacherInfo, shard.metadata.get("teacher"), shard.name)
    return None


def roll_up_records(store: Store) -> None:
    """Bring the roll-ups of the large sets' commit records up to date."""
    for shards in shard_sets(store):
        shards.records.roll_up()


def orphans(shards: ShardSet) -> list[str]:
    """Return data files that no commit record names: from attempts killed or under way.

    Raises CacheFormatError while a commit record is damaged: the files it named would look like
    orphans.
    """
    recorded = {commit.path.removeprefix("data/") for commit in shards.committed().records()}
    present = shards.store.names(f"{shards.folder}/data")
    return [f"{shards.folder}/data/{name}" for name in present if name not in recorded]


def collect_garbage(store: Store, older_than: float, dry_run: bool = False) -> dict[str, int]:
    """Remove what killed attempts left behind; return name -> bytes. Files younger than
    ``older_than`` seconds stay: their writers may be at work. Raises CacheFormatError as
    ``orphans`` does.
    """
    removed: dict[str, int] = {}
    limit = time.time() - older_than
    for shards in shard_sets(store):
        folders = ["", TOKENIZER] if shards.folder == "corpus" else []
        folders += [shards.folder, f"{shards.folder}/commits", f"{shards.folder}/data"]
        names = orphans(shards)
        names += [name for folder in folders for name in store.temporary(folder)]
        for name in names:
            try:
                size, modified = store.state(name)
            except FileNotFoundError:  # its writer has renamed it meanwhile
                continue
            if modified <= limit:
                removed[name] = size
                if not dry_run:
                    store.discard(name)
    return removed
