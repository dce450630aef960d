"""Stage 1 in an object store: a real S3 server, as users have it, in a process of its own."""

import logging
import random
from typing import Any

import numpy as np
import pytest

from rekindle.data.cache import Cache
from rekindle.data.inventory import collect_garbage, shard_sets
from rekindle.data.storage.base import Store
from rekindle.data.storage.copies import FOLDER_VARIABLE, GIGABYTES_VARIABLE
from rekindle.data.storage.object_store import ObjectStore
from rekindle.data.storage.shard_bytes import MappedBytes, RequestedBytes
from rekindle.data.storage.store import open_store
from rekindle.pipeline.caching.cache_teachers import cache_teachers
from rekindle.pipeline.checks.verify import verify_cache
from testlib.servers.faulty_s3 import faulty_server


@pytest.fixture(scope="module")
def teachers(make_teacher) -> list[dict[str, Any]]:
    return [
        make_teacher("lm", "masked_lm", targets={"kind": "topk", "k": 5}),
        make_teacher("states", "causal_lm", targets={"kind": "hidden"}),
    ]


def contents(store: Store) -> dict[tuple[str, str], str]:
    """The sha256 of every committed unit."""
    return {
        (shards.folder, unit): commit.sha256
        for shards in shard_sets(store)
        for unit, commit in shards.survey()[0].items()
    }


def same_examples(here: Cache, there: Cache) -> None:
    assert len(there) == len(here) == 13
    for index in (0, 11, len(here) - 1):
        ours, theirs = here.example(index), there.example(index)
        for name, targets in ours.targets.items():
            for a, b in zip(targets, theirs.targets[name], strict=True):
                a, b = vars(a), vars(b)
                assert a.keys() == b.keys()
                for key, value in a.items():
                    if isinstance(value, np.ndarray):
                        assert (value == b[key]).all(), (name, key)


def test_a_cache_on_s3_is_made_extended_repaired_and_cleaned_as_a_local_one(
    s3, tmp_path, configure, teachers, monkeypatch, caplog
):
    url = f"{s3}/stage-one"
    later = [
        teachers[0] | {"targets": {"kind": "topk", "k": 5, "temperatures": [1.0, 3.0]}},
        *teachers[1:],
    ]
    # Two shards, of which the second one grows: all that is done takes requests, which cost.
    once, twice = ({"replicas": n, "mask": {}, "sequences_per_shard": 8} for n in (1, 2))
    for where in (tmp_path / "cache", url):
        cache_teachers(configure(where, teachers, cache=once))
        cache_teachers(configure(where, later, corpus={"limit_sequences": 13}, cache=twice))
    local, remote = open_store(tmp_path / "cache"), open_store(url)
    assert contents(remote) == contents(local)
    here, there = Cache.open(tmp_path / "cache"), Cache.open(url)
    same_examples(here, there)
    assert isinstance(there.corpus.shard(0).source, MappedBytes)
    with caplog.at_level(logging.WARNING, "rekindle"):
        monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "copies"))
        monkeypatch.setenv(GIGABYTES_VARIABLE, "0")  # no room for copies: read piece by piece
        without = Cache.open(url)
        same_examples(here, without)
    assert isinstance(without.corpus.shard(0).source, RequestedBytes)
    assert any("no room for local copies" in text for text in caplog.messages)
    monkeypatch.undo()

    damaged = f"targets/lm/{there.teachers['lm'].commits['00001-r000'].path}"
    content = bytearray(remote.read_bytes(damaged))
    content[len(content) // 2] ^= 1
    remote.replace(damaged, bytes(content))
    (problem,) = verify_cache(url).problems
    assert damaged.split("/")[-1] in problem
    config = configure(url, later, corpus={"limit_sequences": 13}, cache=twice)
    assert cache_teachers(config).repaired == 0  # all of it would have to be fetched
    again = cache_teachers(config, check=True)
    assert (again.units_done, again.repaired) == (1, 1)
    assert contents(open_store(url)) == contents(local)
    assert verify_cache(url).problems == []

    remote.replace("targets/lm/data/00000-r000-0badbeef.arrow", b"left by a killed process")
    assert verify_cache(url).orphans == 1
    assert [*collect_garbage(remote, 0.0)] == ["targets/lm/data/00000-r000-0badbeef.arrow"]


def test_a_server_at_fault_changes_no_byte(s3, tmp_path, configure, teachers, monkeypatch):
    """One request in eight is refused, dropped, cut short or done unheard, and for a second the
    server is not there, in the middle of a unit.
    """
    rng = random.Random(0)
    faults = [rng.choice(["503", "500", "drop", "unheard", "cut"]) for _ in range(10_000)]
    small = {"limit_sequences": 8}, {"sequences_per_shard": 4, "replicas": 1, "mask": {}}
    cache_teachers(configure(tmp_path / "cache", teachers, *small))
    with faulty_server(monkeypatch) as server:
        cache_teachers(configure(f"{s3}/first-answer", []))
        server.faults = [fault if rng.random() < 0.125 else "" for fault in faults]
        finish, finished = ObjectStore.finish, list[str]()

        def finish_without_a_server(store: ObjectStore, name: str) -> None:
            if name.startswith("targets/"):
                finished.append(name)
            if len(finished) == 2:
                server.away(1.0)
            finish(store, name)

        monkeypatch.setattr(ObjectStore, "finish", finish_without_a_server)
        cache_teachers(configure(f"{s3}/faults", teachers, *small))
        there = Cache.open(f"{s3}/faults")
        here = Cache.open(tmp_path / "cache")
        assert contents(there.store) == contents(here.store)
        assert verify_cache(f"{s3}/faults").problems == []
        assert server.seen > 80
