"""The roll-up of commit records: it saves reading them, and says nothing that they do not say."""

import hashlib
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import count

import numpy as np
import pytest

from rekindle.data.errors import CacheFormatError, InputError
from rekindle.data.storage import records
from rekindle.data.storage.manifest import MANIFEST, begin_manifest, read_manifest
from rekindle.data.storage.object_store import ObjectStore
from rekindle.data.storage.records import ROLL_UP_ABOUT, ROLL_UP_TABLE, SAMPLE_COUNT
from rekindle.data.storage.seal import seal
from rekindle.data.storage.shards import ShardSet
from rekindle.data.storage.store import open_store
from rekindle.data.storage.units import sort_key, unit_of
from testlib.records.simulated import CountingBucket, CountingStore, simulated_commit, write_records

SHARDS, REPLICAS = 150, 2
UNITS = 256  # here: of smaller sets there is no roll-up
GONE = (3, 1)  # a unit that is not there


def facts_of(shard, replica):
    facts = {"domains": {"a": shard % 3, "b": 1}, "next": [shard, 0], "positions": 5 * shard}
    if shard % 7:
        facts["seconds"] = shard / 8
    if shard == 5:
        facts["cut"] = {"texts": 1, "cut": 0, "tokens": 4, "lost": 0}
    return facts


@pytest.fixture(scope="module")
def commits():
    places = [(s, r) for s in range(SHARDS) for r in range(REPLICAS) if (s, r) != GONE]
    return {unit_of(*p): simulated_commit(unit_of(*p), **facts_of(*p)) for p in places}


@pytest.fixture(autouse=True)
def smaller_and_sooner(monkeypatch):
    monkeypatch.setattr(records, "MIN_UNITS", UNITS)
    monkeypatch.setattr(records, "SETTLE_SECONDS", 0.05)


@pytest.fixture(params=[CountingStore, CountingBucket])
def shards(tmp_path, commits, request):
    write_records(tmp_path / "set", commits.values())
    return ShardSet(request.param(tmp_path), "set")


@pytest.fixture
def rolled(shards):
    shards.records.roll_up()
    assert {ROLL_UP_ABOUT, ROLL_UP_TABLE} <= {*shards.store.names("set")}
    return shards


def said(found):
    """All that columns tell."""
    return {
        "units": list(found),
        "rows": found.rows.tolist(),
        "bytes": found.bytes,
        "sha256s": found.sha256s,
        "fingerprint": found.fingerprint(len(found)),
        "tokens": found.count_facts("tokens").tolist(),
        "seconds": np.nan_to_num(found.number_facts("seconds"), nan=-1).tolist(),
        "domains": list(found.counts_by_name("domains")),
        "cut": list(found.counts_by_name("cut")),
        "lacking": found.missing_units(SHARDS + 2, range(REPLICAS)),
    }


def truth(commits):
    """The same by the records themselves."""
    expected = [commits[unit] for unit in sorted(commits, key=sort_key)]
    planned = [(s, r) for r in range(REPLICAS) for s in range(SHARDS + 2)]
    digests = "".join(one.sha256 for one in expected)
    return {
        "units": [one.unit for one in expected],
        "rows": [one.rows for one in expected],
        "bytes": sum(one.bytes for one in expected),
        "sha256s": [one.sha256 for one in expected],
        "fingerprint": hashlib.sha256(digests.encode()).hexdigest(),
        "tokens": [one.facts["tokens"] for one in expected],
        "seconds": [one.facts.get("seconds", -1) for one in expected],
        "domains": [one.facts.get("domains") for one in expected],
        "cut": [one.facts.get("cut") for one in expected],
        "lacking": [place for place in planned if unit_of(*place) not in commits],
    }


def test_with_and_without_a_roll_up_the_same_is_said(shards, commits):
    assert len(commits) > UNITS > SAMPLE_COUNT
    without = shards.committed()
    shards.records.roll_up()
    within = shards.committed()
    assert said(within) == said(without) == truth(commits)
    assert dict(within) == dict(without) == commits
    assert list(within.records()) == [commits[unit] for unit in within]
    assert "notes" not in within
    assert within.get("00003-r001") is None


def test_opening_takes_a_listing_and_a_few_reads(rolled, commits):
    rolled.store.asked.clear()
    found = rolled.committed()
    said(found)
    listings = 1 if isinstance(rolled.store, CountingBucket) else 0
    assert rolled.store.asked == {"records": SAMPLE_COUNT, "others": 2} | (
        {"listings": listings} if listings else {}
    )
    rolled.store.asked.clear()
    for unit in ("00000-r000", "00070-r001", "00070-r001"):  # what a process opens, once each
        assert found[unit] == commits[unit]
    assert rolled.store.asked == {"records": 2}


def test_a_listing_says_what_is_new_and_only_that_is_read(rolled, commits, tmp_path):
    more = {unit_of(SHARDS, r): simulated_commit(unit_of(SHARDS, r)) for r in range(3)}
    write_records(tmp_path / "set", more.values())
    rolled.store.asked.clear()
    found = rolled.committed()
    assert rolled.store.asked == {"records": SAMPLE_COUNT + 3, "others": 2, "listings": 1}
    assert {*found} == {*commits, *more}
    (tmp_path / "set/commits/00002-r000.json").unlink()
    assert {*rolled.committed()} == {*commits, *more} - {"00002-r000"}
    rolled.records.roll_up()
    rolled.store.asked.clear()
    assert {*rolled.committed()} == {*commits, *more} - {"00002-r000"}
    assert rolled.store.asked["records"] == SAMPLE_COUNT


def test_small_sets_have_none(tmp_path, commits):
    write_records(tmp_path / "set", [*commits.values()][: UNITS - 1])
    shards = ShardSet(CountingStore(tmp_path), "set")
    shards.records.roll_up()
    assert shards.store.names("set") == []


# --- never believed -------------------------------------------------------------------------------


def test_a_damaged_roll_up_is_not_believed(rolled, commits, tmp_path):
    """Byte after byte in its beginning and end, and here and there; cut anywhere; gone."""
    expected = list(commits.values())
    for name in (ROLL_UP_TABLE, ROLL_UP_ABOUT):
        path = tmp_path / "set" / name
        content = path.read_bytes()
        places = {*range(0, len(content), len(content) // 5), len(content) - 1}
        versions = [content[:place] for place in places]
        for place in places:
            changed = bytearray(content)
            changed[place] ^= 1
            versions.append(bytes(changed))
        for version in versions:
            path.write_bytes(version)
            assert rolled.committed().sha256s == [one.sha256 for one in expected]
        path.unlink()
        assert rolled.committed().sha256s == [one.sha256 for one in expected]
        path.write_bytes(content)


def test_the_roll_up_of_another_set_is_not_believed(rolled, commits, tmp_path):
    """Its units have the same names."""
    others = [simulated_commit(unit, "other") for unit in commits]
    write_records(tmp_path / "other", others)
    other = ShardSet(type(rolled.store)(tmp_path), "other")
    other.records.roll_up()
    for name in (ROLL_UP_TABLE, ROLL_UP_ABOUT):
        (tmp_path / "set" / name).write_bytes((tmp_path / "other" / name).read_bytes())
    assert said(rolled.committed()) == truth(commits)


def test_the_checksum_of_another_roll_up_does_not_pass(rolled, commits, tmp_path):
    """A process that was killed between the two files leaves an old one beside a new one."""
    old = (tmp_path / "set" / ROLL_UP_ABOUT).read_bytes()
    more = simulated_commit(unit_of(SHARDS, 0))
    write_records(tmp_path / "set", [more])
    rolled.records.roll_up()
    (tmp_path / "set" / ROLL_UP_ABOUT).write_bytes(old)
    assert {*rolled.committed()} == {*commits, more.unit}


def test_a_unit_that_is_made_again_is_not_what_it_was(rolled, commits, tmp_path):
    unit = "00070-r001"
    rolled.forget(unit)
    assert unit not in rolled.committed()
    again = simulated_commit(unit, "again")
    write_records(tmp_path / "set", [again])
    assert rolled.committed()[unit] == again
    assert again.sha256 in rolled.committed().sha256s
    rolled.records.roll_up()
    assert again.sha256 in rolled.committed().sha256s


def test_whoever_opens_a_unit_reads_its_record(rolled, tmp_path):
    """Also where hands have put another in its place, which a local listing cannot tell."""
    again = simulated_commit("00070-r001", "again")
    write_records(tmp_path / "set", [again])
    found = rolled.committed()
    if isinstance(rolled.store, CountingBucket):  # where it can
        assert found["00070-r001"] == again
        return
    with pytest.raises(CacheFormatError, match=r"differ in sha256.* --check"):
        found["00070-r001"]
    sound, damaged = rolled.survey(lambda commit: None)
    assert not damaged
    assert "does not repeat" in str(rolled.records.roll_up_error(sound))
    rolled.records.forget_roll_up()
    assert rolled.committed()["00070-r001"] == again


def test_a_damaged_record_is_named_and_not_rolled_up(rolled, tmp_path):
    (tmp_path / "set/commits/00149-r000.json").write_bytes(b"{}")
    rolled.store.replace(f"set/{ROLL_UP_ABOUT}", seal({}))
    with pytest.raises(CacheFormatError, match="00149-r000"):
        rolled.committed()
    rolled.records.roll_up()
    with pytest.raises(CacheFormatError, match="00149-r000"):
        rolled.committed()


def test_names_of_no_unit_are_not_missed(rolled, tmp_path):
    write_records(tmp_path / "set", [simulated_commit("notes")])
    rolled.records.roll_up()
    assert [*rolled.committed()][-1] == "notes"


# --- beside the rest ------------------------------------------------------------------------------


def test_the_version_is_raised_before(shards, tmp_path):
    begin_manifest(shards.store)
    assert read_manifest(shards.store)["format_version"] == 3
    shards.records.roll_up()
    assert read_manifest(shards.store)["format_version"] == 5
    assert (tmp_path / MANIFEST).is_file()


def test_what_cannot_be_written_stays_as_it_is(shards, commits, monkeypatch):
    def refuse(name, content):
        raise InputError("full")

    monkeypatch.setattr(shards.store, "replace", refuse)
    shards.records.roll_up()
    assert said(shards.committed()) == truth(commits)


def test_it_goes_to_another_process(rolled, commits):
    found = pickle.loads(pickle.dumps(rolled.committed()))
    assert said(found) == truth(commits)
    assert found["00070-r001"] == commits["00070-r001"]


def roll_up_for_ever(root, first):
    """One more unit each time: in a process that is killed."""
    try:
        shards = ShardSet(CountingStore(root), "set")
        for number in count(first):
            write_records(root / "set", [simulated_commit(unit_of(number))])
            shards.records.roll_up()
    finally:
        os._exit(1)


def test_a_process_may_be_killed_while_it_writes(tmp_path, monkeypatch):
    """Twenty times: what is said then is what the records say."""
    monkeypatch.setattr(records, "MIN_UNITS", 8)
    monkeypatch.setattr(records, "SETTLE_SECONDS", 0.0)
    draw, shards = random.Random(0), ShardSet(CountingStore(tmp_path), "set")
    write_records(tmp_path / "set", [simulated_commit(unit_of(n)) for n in range(8)])
    for kill in range(20):
        child = os.fork() or roll_up_for_ever(tmp_path, 1000 * (kill + 1))
        time.sleep(draw.uniform(0.02, 0.2))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        proof, damaged = shards.survey(lambda commit: None)
        for unit in damaged:  # its record was being written: not as a store writes it
            (tmp_path / "set/commits" / f"{unit}.json").unlink()
        assert said(shards.committed()) == said(proof)
    assert len(proof) > 8


def test_opening_imports_no_pandas(rolled):
    """Which takes longer than reading a million rows: arrow's own ``to_numpy`` imports it."""
    code = "import sys; from rekindle.data.storage.shards import ShardSet; "
    code += "from rekindle.data.storage import records; records.MIN_UNITS = 256; "
    code += "from rekindle.data.storage.store import open_store; "
    code += f"found = ShardSet(open_store({rolled.store.location!r}), 'set').committed(); "
    code += (
        "found.count_facts('tokens'), found.number_facts('seconds'), found.missing_units(9, [0]); "
    )
    code += "assert len(found) > 256 and not found._loaded; assert 'pandas' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_in_a_bucket_one_listing_and_a_few_reads(s3, commits, tmp_path, monkeypatch):
    """On a server: its listing has the ETags; another record under the same name is noticed."""
    store = open_store(f"{s3}/rolled")
    with ThreadPoolExecutor(16) as pool:
        places = [f"set/commits/{unit}.json" for unit in commits]
        list(pool.map(store.replace, places, (one.to_bytes() for one in commits.values())))
    shards = ShardSet(store, "set")
    shards.records.roll_up()
    asked = Counter()
    for name in ("read_bytes", "_list_entries", "state"):
        real = getattr(ObjectStore, name)

        def counting(*args, real=real, name=name):
            asked[name] += 1
            return real(*args)

        monkeypatch.setattr(ObjectStore, name, counting)
    assert said(shards.committed()) == truth(commits)
    assert asked == {"_list_entries": 1, "read_bytes": SAMPLE_COUNT + 2}
    again = simulated_commit("00070-r001", "again", **facts_of(70, 1))
    store.replace("set/commits/00070-r001.json", again.to_bytes())
    assert said(shards.committed()) == truth(commits | {again.unit: again})
