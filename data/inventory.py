"""All that a cache consists of, file by file: what is damaged, what ``pipeline gc`` removes.

Works on a cache that is damaged anywhere: nothing here needs another part of it to be sound.
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

NEEDED = {
    "corpus": {"corpus.json", "tokenizer.json"},
    "views": {"view.json"},
    "targets": {"teacher.json"},
}


def target_folders(store: Store) -> list[str]:
    """The folders of all teachers' targets, each followed by those of its extensions."""
    found = []
    for name in store.folders("targets"):
        base = f"targets/{name}"
        found.append(base)
        found += [f"{base}/extensions/{part}" for part in store.folders(f"{base}/extensions")]
    return found


def shard_sets(store: Store) -> list[ShardSet]:
    """Corpus, views and targets, in this order."""
    views = [f"views/{name}" for name in store.folders("views")]
    return [ShardSet(store, folder) for folder in ["corpus", *views, *target_folders(store)]]


def descriptions(store: Store) -> Iterator[str]:
    """The sealed files beside the shards, but the manifest."""
    for folder in [shards.folder for shards in shard_sets(store)]:
        yield from (f"{folder}/{n}" for n in store.names(folder) if n.endswith(".json"))


def damaged_descriptions(store: Store) -> dict[str, CacheFormatError]:
    """What is wrong with the small files: manifest, descriptions, tokenizer, output matrices.

    Raises CacheVersionError for a cache of a version that this code does not read.
    """
    damaged: dict[str, CacheFormatError] = {}

    def hold(name: str, read: Callable[[], object]) -> None:
        try:
            read()
        except FileNotFoundError:
            pass
        except CacheVersionError:
            raise
        except CacheFormatError as error:
            damaged[name] = error

    if store.exists(MANIFEST):
        hold(MANIFEST, partial(read_journal, store))
    for name in descriptions(store):
        if name != TOKENIZER_FILES:
            hold(name, partial(read_sealed, store, name))
    for folder in target_folders(store):
        # Without a sound head.json a matrix is unfinished, or cannot be judged.
        if {*HEAD_FILES} <= {*store.names(folder)} and f"{folder}/head.json" not in damaged:
            hold(f"{folder}/head.safetensors", partial(read_head, store, folder))
    return damaged | damaged_tokenizer_files(store)


def lost_descriptions(store: Store) -> dict[str, CacheFormatError]:
    """The small files that must stand beside the shards there are, and do not (from format 2)."""
    if read_manifest(store).get(VERSION) == 1:
        return {}
    lost: dict[str, CacheFormatError] = {}
    for shards in shard_sets(store):
        if not store.names(f"{shards.folder}/commits"):
            continue
        names = {*store.names(shards.folder)}
        wanted = NEEDED[shards.folder.partition("/")[0]]
        with_head = wanted | {*HEAD_FILES} if names & {*HEAD_FILES} else wanted
        for name in sorted(with_head - names):
            where = f"{shards.folder}/{name}"
            lost[where] = CacheFormatError(f"{store.location}/{where} is missing. {REPAIR}")
    return lost


def imported_teachers(store: Store) -> list[str]:
    """The teachers whose targets were made elsewhere: by their descriptions, or, where those are
    damaged, by what a sound shard says of itself.
    """
    return [name for name in store.folders("targets") if is_imported(store, name)]


def is_imported(store: Store, name: str) -> bool:
    """Whether that teacher is one of them, as far as anything sound says so."""
    with suppress(CacheError):
        return read_teacher(store, name).imported is not None
    stated = stated_by_shards(store, name)
    return stated is not None and stated.imported is not None


def stated_by_shards(store: Store, name: str) -> TeacherInfo | None:
    """Whose targets a sound shard in a teacher's folder says it has, if there is one."""
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
    """Data files that no commit record names: of attempts that were killed, or are under way.

    Raises CacheFormatError while a commit record is damaged: what it named cannot be told from what
    nobody named.
    """
    named = {commit.path.removeprefix("data/") for commit in shards.committed().records()}
    present = shards.store.names(f"{shards.folder}/data")
    return [f"{shards.folder}/data/{name}" for name in present if name not in named]


def collect_garbage(store: Store, older_than: float, dry_run: bool = False) -> dict[str, int]:
    """Remove what killed attempts left behind; name -> bytes. Files younger than ``older_than``
    seconds stay: their writers may be at work. Raises CacheFormatError as ``orphans`` does.
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
            except FileNotFoundError:  # its writer put it in its place meanwhile
                continue
            if modified <= limit:
                removed[name] = size
                if not dry_run:
                    store.discard(name)
    return removed
