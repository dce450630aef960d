"""Opens, resumes and reads a cache of very many units, with commit records and hardly any data: the
cost of a corpus at the scale of the internet before its first byte is read.

    python tests/benchmarks/scale/simulated_cache.py [--units 100000] [--in /dev/shm] [--rebuild]

There are that many corpus shards and as many units of one causal teacher. Only the shards that rank
5 of 512 reads have data. Each figure comes from a fresh process, which has not opened the cache
before. A record that none of them reads is an empty file, which takes a quarter of the space: 10^6
units take 2 GB of a tmpfs. "--rebuild" fills them all, and opens the cache once more without its
roll-ups. The folder is removed at the end.
"""

import argparse
import hashlib
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from rekindle.data.cache import Cache, write_manifest
from rekindle.data.corpus.additions import shard_metadata
from rekindle.data.corpus.corpus import Corpus
from rekindle.data.permutation import epoch_batch
from rekindle.data.storage import records
from rekindle.data.storage.commits import Commit, columns_of
from rekindle.data.storage.manifest import raise_version
from rekindle.data.storage.seal import WITH_ROLL_UPS, seal
from rekindle.data.storage.shards import ShardSet, shard_schema
from rekindle.data.storage.store import LocalStore
from rekindle.data.storage.units import join_tables, unit_keys, unit_of
from rekindle.data.targets.schema import TeacherInfo
from rekindle.data.writing import write_targets

ROWS, LENGTH, TARGETS = 8, 32, 31  # of a shard; of a sequence
RANK, WORLD, BATCHES, BATCH = 5, 512, 4, 4096  # the batch of all ranks
TEACHER = "teacher-default"
NEW = os.O_CREAT | os.O_EXCL | os.O_WRONLY
LOST = 100  # units that are missing when stage 1 is resumed


def digest_of(unit: str, kind: str) -> str:
    return hashlib.sha256(f"{kind} {unit}".encode()).hexdigest()


def simulated(kind: str, shard: int) -> Commit:
    """Return the record of a unit without data."""
    unit = unit_of(shard)
    sha256 = digest_of(unit, kind)
    facts: dict[str, Any] = {"tokens": ROWS * LENGTH}
    if kind == "corpus":
        facts |= {"next": [shard, 0], "domains": {}}
    else:
        about = {"shard": shard, "replica": None, "corpus_sha256": digest_of(unit, "corpus")}
        facts |= about | {"positions": ROWS * TARGETS, "scalars": sha256[:32], "seconds": 8.125}
    regions = ((0, 900, sha256[:16]), (900, 30_000, sha256[16:32]), (30_900, 900, sha256[32:48]))
    return Commit(unit, f"data/{unit}-{sha256[:8]}.arrow", ROWS, 31_800, sha256, regions, facts)


def write_record(folder: Path, commit: Commit) -> None:
    with open(f"{folder}/commits/{commit.unit}.json", "xb") as file:
        file.write(commit.to_bytes())


def hollow_columns(kind: str, shards: np.ndarray[Any, Any]) -> pa.Table:
    """Return what the records of those shards would say if they were not empty files."""
    one = columns_of([simulated(kind, 0)], {})
    columns = {name: pa.repeat(one[name][0], len(shards)) for name in one.column_names}
    units = [unit_of(shard) for shard in shards.tolist()]
    columns["key"] = pa.array(unit_keys(shards, None))
    columns["unit"] = pa.array(units)
    columns["sha256"] = pa.array([digest_of(unit, kind) for unit in units])
    return pa.table(columns)


def make(folder: Path, units: int, full: bool) -> LocalStore:
    """Make the cache, rolled up from what was written; ``full``: no record is empty."""
    from cache_rows import Ours, make_corpus  # torch: not needed by what is measured

    corpus = make_corpus(folder, 2 * ROWS, LENGTH, ROWS)
    ours = Ours(corpus, "default", TARGETS)
    ours.write()
    store = LocalStore(folder / "cache")
    store.discard("corpus/complete.json")
    store.create("corpus/complete.json", seal({"shards": units}))
    touched = {0, 1, units - 1, *(indices(units * ROWS) // ROWS).tolist()}
    for shard in sorted(touched - {0, 1}):
        write_data(corpus, ours.info, shard)
    raise_version(store, WITH_ROLL_UPS)
    # compared with the records when the cache is opened
    compared = np.linspace(0, units - 1, records.SAMPLE_COUNT)
    near = np.abs(compared[:, None] - np.arange(-2 * LOST, 2 * LOST + 1)).round().astype(int)
    filled = {*range(units)} if full else {*near[(near >= 0) & (near < units)].tolist()}
    for kind, name in (("corpus", "corpus"), ("targets", f"targets/{TEACHER}")):
        shards = ShardSet(store, name)
        commits = [shards.read_record(unit_of(shard)) for shard in sorted(touched)]
        for shard in sorted(filled - touched):
            commits.append(simulated(kind, shard))
            write_record(store.root / name, commits[-1])
        hollow = np.setdiff1d(np.arange(units), sorted(filled | touched))
        for shard in hollow.tolist():
            os.close(os.open(f"{store.root}/{name}/commits/{unit_of(shard)}.json", NEW))
        time.sleep(records.SETTLE_SECONDS)
        table = join_tables([columns_of(commits, {}), hollow_columns(kind, hollow)])
        shards.records._write(table, store.folder_state(shards.records.commits))
    write_manifest(store)
    return store


def write_data(corpus: Corpus, info: TeacherInfo, shard: int) -> None:
    """Write a shard with the rows of the first one, and the teacher's targets for it."""
    from cache_rows import draw_columns

    addition, first = corpus.additions[0], corpus.shard(0)
    schema = shard_schema(
        [*first.schema], shard_metadata(shard, addition, corpus.info["tokenizer"])
    )
    batches = [pa.record_batch(b.columns, schema=schema) for b in first.batches()]
    facts = {"tokens": ROWS * LENGTH, "next": [shard, 0], "domains": {}}
    corpus.shards.write(unit_of(shard), schema, batches, facts)
    corpus.commits_by_unit.add(corpus.shards.read_record(unit_of(shard)))
    about = {"tokens": ROWS * LENGTH, "shard": shard, "replica": None}
    columns = draw_columns(ROWS * TARGETS, 0, "default", TARGETS)
    rows = np.repeat(np.arange(ROWS), TARGETS)
    write_targets(info, _Alone(corpus, shard), (shard, None), rows, columns, about)


class _Alone:
    """A corpus as the writer of one unit's targets sees it."""

    def __init__(self, corpus: Corpus, shard: int):
        commit = corpus.shards.read_record(unit_of(shard))
        self.store, self.commits, self.shard = corpus.store, {shard: commit}, corpus.shard
        self.shard = lambda _: corpus.shards.open(commit)


def indices(size: int) -> np.ndarray[Any, Any]:
    """Return the sequences of RANK's first batches."""
    whole = {"seed": 0, "epoch": 0, "rank": RANK, "world_size": WORLD}
    found = [epoch_batch(number, size, BATCH, **whole) for number in range(BATCHES)]
    return np.concatenate(found)


# --- what is measured, each in a process of its own -----------------------------------------------


def opening(path: str) -> Iterator[tuple[str, float, str]]:
    began, busy = time.perf_counter(), time.process_time()
    cache = Cache.open(path)
    yield "open", time.perf_counter() - began, "s"
    yield "open: of this on a core", time.process_time() - busy, "s"
    assert cache.teachers[TEACHER].coverage == 1.0
    yield "open, count tokens, positions, coverage", time.perf_counter() - began, "s"


def listed(path: str) -> Iterator[tuple[str, float, str]]:
    """List as after a commit: the folders have changed."""
    for name in ("corpus", f"targets/{TEACHER}"):
        extra = Path(path) / name / "commits" / "x"
        extra.touch()
        extra.unlink()
    began, busy = time.perf_counter(), time.process_time()
    Cache.open(path)
    yield "open after a change (by listings)", time.perf_counter() - began, "s"
    yield "open after a change: of this on a core", time.process_time() - busy, "s"


def resuming(path: str) -> Iterator[tuple[str, float, str]]:
    """Find the missing units as stage 1 does, without its checks of bytes, after LOST units were
    lost.
    """
    # Imports torch: the time begins after that.
    from rekindle.data.inventory import roll_up_records
    from rekindle.pipeline.caching.cache_teachers import missing_units
    from rekindle.pipeline.caching.repair import repair_cache
    from rekindle.pipeline.progress import SILENT

    store = LocalStore(Path(path))
    commits = store.root / f"targets/{TEACHER}/commits"
    gone = lost(Path(path))
    for unit in gone:
        (commits / f"{unit}.json").unlink()
    began, busy = time.perf_counter(), time.process_time()
    assert repair_cache(store, [TEACHER], False, SILENT) == 0
    roll_up_records(store)
    corpus = Corpus(store)
    missing, there = missing_units(corpus, f"targets/{TEACHER}", "clean", 1)
    assert [unit.name for unit in missing] == gone
    assert there == len(corpus.commits) - len(gone)
    yield "resume: repair, roll up, corpus, missing units", time.perf_counter() - began, "s"
    yield "resume: of this on a core", time.process_time() - busy, "s"


def lost(path: Path) -> list[str]:
    size = len(list((path / "corpus/commits").iterdir()))
    read = {*(indices(size * ROWS) // ROWS).tolist()}
    places = [shard for shard in range(7, size, max(1, size // (LOST + 1))) if shard not in read]
    return [unit_of(shard) for shard in places[:LOST]]


def reading(path: str) -> Iterator[tuple[str, float, str]]:
    """Read the first batches of one rank of 512."""
    asked: Counter[str] = Counter()
    read = LocalStore.read_bytes

    def counting(store: LocalStore, name: str) -> bytes:
        asked[name.split("/")[-2]] += 1
        return read(store, name)

    cache = Cache.open(path)
    LocalStore.read_bytes = counting  # type: ignore[method-assign]
    whole = {"batch_sequences": BATCH, "rank": RANK, "world_size": WORLD}
    began = time.perf_counter()
    batches = cache.batches([TEACHER], **whole)
    sequences = sum(len(next(batches).index) for _ in range(BATCHES))
    yield f"rank {RANK} of {WORLD}: {BATCHES} batches", time.perf_counter() - began, "s"
    touched = len({*(indices(len(cache)) // ROWS).tolist()})
    assert asked == {"commits": 2 * touched}, (asked, touched)
    yield f"rank {RANK} of {WORLD}: sequences", sequences, "sequences"
    yield f"rank {RANK} of {WORLD}: records read", asked["commits"], "records"


def rebuilding(path: str) -> Iterator[tuple[str, float, str]]:
    store = LocalStore(Path(path))
    for name in ("corpus", f"targets/{TEACHER}"):
        ShardSet(store, name).records.forget_roll_up()
    began = time.perf_counter()
    Cache.open(path)
    yield "open without roll-ups", time.perf_counter() - began, "s"


def alone(measure: Callable[[str], Iterator[tuple[str, float, str]]], path: str) -> list[Any]:
    """Return what a fresh process measures, and its peak memory."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return list(pool.apply(_measured, (measure, path)))


def _measured(measure: Callable[[str], Any], path: str) -> list[tuple[str, float, str]]:
    found = list(measure(path))
    # Not ru_maxrss: it includes the parent's memory from before the child became another program.
    status = Path("/proc/self/status").read_text()
    peak = int(status.split("VmHWM:")[1].split()[0]) * 1024
    return [*found, (f"{found[0][0]}: peak memory", peak, "B")]


def main() -> None:
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from results_csv import RESULTS, Row, append, processor, versions

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--units", type=int, default=100_000)
    parser.add_argument("--in", dest="folder", type=Path, help="where it is made temporarily")
    parser.add_argument("--rebuild", action="store_true")
    parser.add_argument("--csv", type=Path, default=RESULTS)
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="simulated-", dir=given.folder))
    case = f"{given.units:,} corpus shards and as many units of a teacher"
    rows: list[Row] = []
    try:
        began = time.perf_counter()
        path = make(folder, given.units, given.rebuild).location
        print(f"made in {time.perf_counter() - began:.0f} s", flush=True)
        steps = [opening, reading, resuming, listed, *[rebuilding] * given.rebuild]
        for measure in steps:
            for metric, value, unit in alone(measure, path):
                print(f"{metric}: {value:,.6g} {unit}", flush=True)
                rows.append((case, "rekindle", metric, value, unit))
    finally:
        shutil.rmtree(folder)
    append(rows, "simulated_cache", processor(), versions("pyarrow", "numpy"), given.csv)


if __name__ == "__main__":
    main()
