"""Cleaning up takes what no commit record names and is old enough, and nothing else."""

import os
import time

import pyarrow as pa
import pytest

from rekindle.data.errors import CacheFormatError
from rekindle.data.inventory import (
    collect_garbage,
    damaged_descriptions,
    descriptions,
    orphans,
    shard_sets,
    target_folders,
)
from rekindle.data.storage.base import Store
from rekindle.data.storage.manifest import MANIFEST, begin_manifest
from rekindle.data.storage.seal import seal
from rekindle.data.storage.shards import ShardSet
from rekindle.data.storage.store import LocalStore

SETS = [
    "corpus",
    "views/masked-0",
    "views/pairs-adjacent-0",
    "targets/a",
    "targets/a/extensions/k9",
    "targets/a/extensions/k9-tau-4",
    "targets/b",
]
HOUR = 3600.0


def write(store: Store, folder: str, unit: str) -> str:
    """A committed shard; the name of its data file."""
    schema = pa.schema([pa.field("x", pa.int64())], metadata={"rekindle": "{}"})
    batch = pa.record_batch([pa.array(range(3), pa.int64())], schema=schema)
    commit = ShardSet(store, folder).write(unit, schema, [batch])
    return f"{folder}/{commit.path}"


@pytest.fixture
def store(tmp_path) -> LocalStore:
    """Two committed shards in a set of each sort, with the small files beside them."""
    made = LocalStore(tmp_path)
    begin_manifest(made)
    for folder in SETS:
        for unit in ("00000", "00001"):
            write(made, folder, unit)
        name = {"corpus": "corpus", "views": "view", "targets": "teacher"}[folder.split("/")[0]]
        made.create(f"{folder}/{name}.json", seal({"of": folder}))
    made.create("corpus/complete.json", seal({"shards": 2}))
    made.create("corpus/growth-001.json", seal({"config": {}}))
    made.create("corpus/tokenizer/vocab.txt", b"a\nb\n")
    return made


def everything(store: LocalStore) -> dict[str, bytes]:
    found = [p for p in store.root.rglob("*") if p.is_file()]
    return {p.relative_to(store.root).as_posix(): p.read_bytes() for p in found}


def leave(store: LocalStore, name: str, age: float, content: bytes = b"half") -> str:
    """What a killed process leaves, ``age`` seconds ago."""
    path = store.root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    then = time.time() - age
    os.utime(path, (then, then))
    return name


def left_behind(age: float) -> list[tuple[str, float]]:
    names = []
    for folder in SETS:
        names += [
            (f"{folder}/data/00001-0badbeef.arrow", age),  # lost to another attempt
            (f"{folder}/data/00002-0badbeef.arrow", age),  # never committed
            (f"{folder}/commits/.00002.json.0badbeef.tmp", age),
            (f"{folder}/.teacher.json.0badbeef.tmp", age),
        ]
    return names


# --- what a cache consists of ---------------------------------------------------------------------


def test_all_sets_are_found(store):
    assert [shards.folder for shards in shard_sets(store)] == SETS
    assert target_folders(store) == SETS[3:]


def test_all_descriptions_are_found(store):
    expected = {"corpus/corpus.json", "corpus/complete.json", "corpus/growth-001.json"}
    expected |= {f"{folder}/view.json" for folder in SETS[1:3]}
    expected |= {f"{folder}/teacher.json" for folder in SETS[3:]}
    assert sorted(descriptions(store)) == sorted(expected)


def test_every_damaged_description_is_named(store):
    assert damaged_descriptions(store) == {}
    names = [*descriptions(store), MANIFEST]
    for name in names:
        content = store.read_bytes(name)
        for place in range(0, len(content), 7):
            damaged = bytearray(content)
            damaged[place] ^= 1
            store.replace(name, bytes(damaged))
            found = damaged_descriptions(store)
            assert list(found) == [name]
            assert name in str(found[name])
        store.replace(name, content)
    for name in names:
        store.replace(name, b"{")
    assert sorted(damaged_descriptions(store)) == sorted(names)


def test_an_empty_store_holds_nothing(tmp_path):
    store = LocalStore(tmp_path / "none")
    assert damaged_descriptions(store) == {}
    assert collect_garbage(store, 0) == {}
    assert list(descriptions(store)) == []
    assert [shards.folder for shards in shard_sets(store)] == ["corpus"]


# --- cleaning up ----------------------------------------------------------------------------------


def test_a_cache_with_nothing_left_behind_keeps_everything(store):
    before = everything(store)
    assert collect_garbage(store, 0) == {}
    assert everything(store) == before


def test_orphans_and_temporary_files_go_and_the_rest_stays(store):
    before = everything(store)
    sizes = {}
    for number, (name, age) in enumerate(left_behind(2 * HOUR)):
        sizes[leave(store, name, age, b"x" * number)] = number
    assert collect_garbage(store, HOUR) == sizes
    assert everything(store) == before
    assert collect_garbage(store, 0) == {}


def test_young_files_stay_their_writers_may_be_at_work(store):
    before = everything(store)
    for name, age in left_behind(HOUR - 60):
        leave(store, name, age)
    old = leave(store, "targets/b/data/00007-0badbeef.arrow", HOUR + 60)
    assert list(collect_garbage(store, HOUR)) == [old]
    after = everything(store)
    assert after.keys() == before.keys() | {name for name, _ in left_behind(0)}
    assert {name: after[name] for name in before} == before


def test_a_dry_run_says_what_would_go_and_takes_nothing(store):
    for name, age in left_behind(2 * HOUR):
        leave(store, name, age)
    before = everything(store)
    said = collect_garbage(store, HOUR, dry_run=True)
    assert sorted(said) == sorted(name for name, _ in left_behind(0))
    assert everything(store) == before
    assert collect_garbage(store, HOUR) == said


def test_old_committed_files_stay_however_old(store):
    before = everything(store)
    for name in before:
        os.utime(store.root / name, (1, 1))
    assert collect_garbage(store, 0) == {}
    assert everything(store) == before


def test_temporary_files_of_every_folder_that_small_files_are_written_to(store):
    """The manifest lies at the root and is replaced by every run; the tokenizer's files, too."""
    before = everything(store)
    names = [".cache.json.0badbeef.tmp", "corpus/tokenizer/.vocab.txt.0badbeef.tmp"]
    for name in names:
        leave(store, name, 2 * HOUR)
    assert sorted(collect_garbage(store, HOUR)) == sorted(names)
    assert everything(store) == before


def test_a_teacher_that_was_never_described_is_cleaned_up_as_well(store):
    """A first writer that was killed before any commit."""
    name = leave(store, "targets/c/data/00000-0badbeef.arrow", 2 * HOUR)
    assert list(collect_garbage(store, HOUR)) == [name]


def test_nothing_goes_while_a_record_is_damaged(store):
    """What it named cannot be told from what nobody named."""
    for name, age in left_behind(2 * HOUR):
        leave(store, name, age)
    record = "targets/b/commits/00001.json"
    content = bytearray(store.read_bytes(record))
    path = store.read_json(record)["path"]
    content[len(content) // 2] ^= 1
    store.replace(record, bytes(content))
    before = everything(store)
    with pytest.raises(CacheFormatError, match=r"targets/b/commits/00001\.json"):
        collect_garbage(store, HOUR)
    after = everything(store)
    committed = {n for n in before if "0badbeef" not in n}
    assert {n: after[n] for n in committed} == {n: before[n] for n in committed}
    assert f"targets/b/{path}" in after
    with pytest.raises(CacheFormatError, match="damaged"):
        orphans(ShardSet(store, "targets/b"))


def test_a_file_that_is_gone_meanwhile_is_nobodys_concern(store, monkeypatch):
    """A writer at work puts its temporary file in its place between the listing and the look."""
    old = leave(store, "targets/b/data/00007-0badbeef.arrow", 2 * HOUR)
    listed = store.temporary

    def with_one_gone(folder: str) -> list[str]:
        return [*listed(folder), *(["corpus/.x.tmp"] if folder == "corpus" else [])]

    monkeypatch.setattr(store, "temporary", with_one_gone)
    assert list(collect_garbage(store, HOUR)) == [old]


def test_what_people_put_beside_the_cache_is_not_ours(store):
    before = everything(store)
    names = ["notes.txt", "targets/a/README.md", "backup/data/00009-0badbeef.arrow"]
    for name in names:
        leave(store, name, 2 * HOUR)
    assert collect_garbage(store, HOUR) == {}
    assert everything(store).keys() == before.keys() | set(names)


def test_orphans_are_data_files_that_no_record_names(store):
    shards = ShardSet(store, "targets/a")
    assert orphans(shards) == []
    names = [leave(store, f"targets/a/data/0000{n}-0badbeef.arrow", 0) for n in range(3)]
    assert orphans(shards) == names
    taken_back = f"targets/a/{shards.read_record('00001').path}"
    store.discard("targets/a/commits/00001.json")
    assert orphans(shards) == sorted([*names, taken_back])
