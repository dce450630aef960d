"""An import that is killed goes on with the same rows, and ends in the same bytes."""

import os
import shutil
import signal

import pytest

from rekindle.data.cache import Cache
from rekindle.data.inventory import collect_garbage, shard_sets
from rekindle.data.storage.object_store import ObjectStore
from rekindle.data.storage.store import LocalStore, open_store
from rekindle.pipeline.checks.verify import verify_cache
from testlib.caches import committed, problems
from testlib.elsewhere import PROVENANCE, rows_of
from testlib.processes import Child, before_call


def die():
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(scope="module")
def whole(bare, tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "cache"
    shutil.copytree(bare, path)
    Cache.open(path).import_targets("there", rows_of(Cache.open(path)), PROVENANCE)
    return path


# Of LocalStore: what is done to the disk before a unit is committed, and with it.
STEPS = [("replace", 1), ("create", 1), ("finish", 1), ("create", 2), ("create", 4), ("create", 6)]
STEPS += [("replace", 2), ("replace", 3)]  # cache.json, when all units are there


@pytest.mark.parametrize("step", STEPS, ids=lambda step: "-".join(map(str, step)))
def test_killed_at_any_step_it_goes_on(whole, empty, step):
    rows = rows_of(Cache.open(empty))

    def work():
        before_call(LocalStore, *step, die)
        Cache.open(empty).import_targets("there", rows, PROVENANCE)

    child = Child(work)
    assert child.wait() == -signal.SIGKILL, child.errors
    before = committed(empty, "targets")
    cache = Cache.open(empty)  # whatever lies there is a cache
    cache.import_targets("there", rows, PROVENANCE)
    found = committed(empty, "targets")
    assert found == committed(whole, "targets")
    assert before.items() <= found.items()
    assert (empty / "cache.json").read_text() == (whole / "cache.json").read_text()
    assert problems(empty) == []
    collect_garbage(cache.store, 0)
    assert [path.name for path in empty.rglob("*.tmp")] == []
    assert len([*(empty / "targets/there/data").iterdir()]) == 3
    Cache.open(empty).example(0)


def test_in_an_object_store_it_ends_in_the_bytes_of_a_local_one(whole, bare, s3):
    """A real S3 server; killed before the second of three units is committed."""
    url, rows = f"{s3}/imported", rows_of(Cache.open(bare))
    store = open_store(url)
    for path in bare.rglob("*"):
        if path.is_file():
            store.replace(str(path.relative_to(bare)), path.read_bytes())

    def work():
        before_call(ObjectStore, "create", 4, die)
        Cache.open(url).import_targets("there", rows, PROVENANCE)

    child = Child(work)
    assert child.wait() == -signal.SIGKILL, child.errors
    done = Cache.open(url).import_targets("there", rows, PROVENANCE)
    assert (done.units_present, done.units_done) == (1, 2)
    (shards,) = (one for one in shard_sets(store) if one.folder == "targets/there")
    found = {
        f"targets/there/{unit}": store.read_bytes(f"targets/there/{commit.path}")
        for unit, commit in shards.committed().items()
    }
    assert found == committed(whole, "targets")
    assert store.read_bytes("cache.json") == (whole / "cache.json").read_bytes()
    report = verify_cache(url)
    assert (report.problems, report.orphans) == ([], 1)
    collect_garbage(store, 0)
    assert verify_cache(url).orphans == 0
