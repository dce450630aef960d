"""The S3 server itself is killed while a cache is written to it, and started again."""

import threading
import time
from collections import Counter

import pytest
import s3fs

from rekindle.data.inventory import shard_sets
from rekindle.data.storage.store import open_store
from rekindle.pipeline.caching.cache_teachers import cache_teachers
from rekindle.pipeline.checks.verify import verify_cache
from testlib.caches import committed
from testlib.servers.faulty_s3 import faulty_server
from testlib.servers.s3 import S3Server, credentials

UNITS = 12


@pytest.mark.slow
def test_a_server_killed_in_mid_write_costs_nothing(tmp_path, configure, make_teacher, monkeypatch):
    """Twice: the command goes on by itself, and the cache is that of a local run."""
    teachers = [make_teacher("lm", "causal_lm", targets={"kind": "topk", "k": 8})]
    small = {"limit_sequences": UNITS}, {"sequences_per_shard": 1}
    cache_teachers(configure(tmp_path / "local", teachers, *small))
    recording = tmp_path / "recording"
    server = S3Server(recording)
    for name, value in credentials(server.url).items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem().mkdir("bucket")
    killed = Counter[str]()

    def kill_and_start() -> None:
        nonlocal server
        for reached in (b"corpus/commits/00003.json", b"targets/lm/commits/00005.json"):
            while reached not in recording.read_bytes():
                time.sleep(0.01)
            proxy.back_at = float("inf")  # nobody is answered, also while it comes back
            server.kill()
            killed[reached.decode()] += 1
            server = S3Server(recording)
            proxy.behind, proxy.back_at = server.url.removeprefix("http://"), 0.0

    with faulty_server(monkeypatch) as proxy:
        beside = threading.Thread(target=kill_and_start, daemon=True)
        beside.start()
        try:
            done = cache_teachers(configure("s3://bucket/cache", teachers, *small))
            beside.join(60)
            assert killed.total() == 2
            assert done.units_done == UNITS
            assert verify_cache("s3://bucket/cache").problems == []
            store = open_store("s3://bucket/cache")
            there = {
                f"{shards.folder}/{unit}": store.read_bytes(f"{shards.folder}/{commit.path}")
                for shards in shard_sets(store)
                for unit, commit in shards.committed().items()
            }
            assert there == committed(tmp_path / "local")
        finally:
            server.kill()
