"""A change that is killed goes on with the same command, and ends in the same bytes; meanwhile the
cache is what it was before, or what it is after.
"""

import shutil

import pytest

from rekindle.data.changes.carry_out import finish_interrupted
from rekindle.data.errors import InputError
from rekindle.data.inventory import shard_sets
from rekindle.data.storage.object_store import ObjectStore
from rekindle.data.storage.store import open_store
from testlib.caches import committed, problems
from testlib.changes.changing import change, killed_before, listed, said, same, writes_of

ASKED = [("rename", "a", "b"), ("transcode", "a", "compact"), ("remove", "a")]


@pytest.fixture(scope="module")
def after(plain, tmp_path_factory):
    """after(asked): a copy of the cache, changed at one go."""
    made = {}

    def of(asked):
        if asked not in made:
            made[asked] = tmp_path_factory.mktemp("after") / "cache"
            shutil.copytree(plain, made[asked])
            change(made[asked], asked)
        return made[asked]

    return of


def assert_goes_on(cache, plain, whole, asked, at):
    shutil.copytree(plain, cache)
    killed_before(cache, asked, at)
    found = said(cache)  # whatever lies there is a cache
    assert same(found, said(plain)) or same(found, said(whole))
    assert problems(cache) == []
    change(cache, asked)
    assert listed(cache) == listed(whole)
    assert committed(cache) == committed(whole)
    assert (cache / "cache.json").read_bytes() == (whole / "cache.json").read_bytes()
    assert problems(cache) == []
    shutil.rmtree(cache)


@pytest.mark.parametrize("asked", ASKED, ids=lambda asked: asked[0])
def test_killed_where_a_phase_begins_or_ends(plain, after, tmp_path, asked):
    """Before each write of ``cache.json``, and in the middle of what comes between."""
    whole, writes = after(asked), writes_of(plain, asked, tmp_path)
    notes = [n for n, (name, before) in enumerate(zip(writes[1:], writes, strict=False), 1)]
    ends = [
        n for n in notes if "replace" in (writes[n], writes[n - 1]) and writes[n] != writes[n - 1]
    ]
    for at in sorted({0, len(writes) // 2, *ends, len(writes) - 1}):
        assert_goes_on(tmp_path / "cache", plain, whole, asked, at)


@pytest.mark.slow
@pytest.mark.parametrize("asked", ASKED, ids=lambda asked: asked[0])
def test_killed_before_each_write(plain, after, tmp_path, asked):
    whole = after(asked)
    for at in range(len(writes_of(plain, asked, tmp_path))):
        assert_goes_on(tmp_path / "cache", plain, whole, asked, at)


@pytest.mark.parametrize("asked", ASKED[:2], ids=lambda asked: asked[0])
def test_meanwhile_nothing_else_is_changed_and_it_can_be_given_up(plain, cache, asked):
    killed_before(cache, asked, 6)
    with pytest.raises(
        InputError, match=rf"is being {asked[0]}d? .*Run `pipeline teachers .*first"
    ):
        change(cache, ("remove", "expert"))
    finish_interrupted(open_store(cache))
    assert listed(cache) == listed(plain)
    assert (cache / "cache.json").read_bytes() == (plain / "cache.json").read_bytes()
    assert change(cache, ("remove", "expert"))


@pytest.mark.parametrize(
    "asked", [ASKED[0], *(pytest.param(one, marks=pytest.mark.slow) for one in ASKED[1:])]
)
def test_in_an_object_store_it_ends_in_the_bytes_of_a_local_one(plain, after, s3, asked):
    """A real S3 server; killed on the way, and before the old files are removed."""
    url, whole = f"{s3}/{asked[0]}", after(asked)
    store = open_store(url)
    for path in plain.rglob("*"):
        if path.is_file():
            store.replace(str(path.relative_to(plain)), path.read_bytes())
    for at in (2, 1) if asked[0] == "remove" else (7, 24):
        killed_before(url, asked, at, ObjectStore)
        assert same(said(url), said(plain)) or same(said(url), said(whole))
    change(url, asked)
    assert store.read_bytes("cache.json") == (whole / "cache.json").read_bytes()
    assert same(said(url), said(whole))
    found = {
        f"{shards.folder}/{unit}": store.read_bytes(f"{shards.folder}/{commit.path}")
        for shards in shard_sets(store)
        for unit, commit in shards.committed().items()
    }
    assert found == committed(whole)
    there = store.fs.find(store.root)
    assert len(there) == sum(path.is_file() for path in whole.rglob("*"))
