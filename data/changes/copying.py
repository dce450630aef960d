"""Copy a teacher's shards: under another name, or in another codec. No value changes.

The codecs ``default`` and ``compact`` are two arrangements of the same integers.
"""

from collections.abc import Callable, Iterator

import numpy as np
import pyarrow as pa

from rekindle.data.corpus.corpus import Corpus
from rekindle.data.errors import CacheFormatError
from rekindle.data.storage.base import Store
from rekindle.data.storage.commits import ROWS_PER_BATCH, Commit
from rekindle.data.storage.shards import Shard, ShardSet
from rekindle.data.storage.units import UnitPlace, place_of
from rekindle.data.targets.kinds.base import TargetKind
from rekindle.data.targets.kinds.registry import kind_of
from rekindle.data.targets.reading.files import check_owner
from rekindle.data.targets.reading.reader import TeacherReader
from rekindle.data.targets.scalars import FACT, ScalarChecksum
from rekindle.data.targets.schema import TeacherInfo
from rekindle.data.views.reader import check_aligned
from rekindle.data.writing import write_options

Done = Callable[[Commit], object]
SCHEMA_KEYS = ("kind", "format_version", "teacher")  # every schema states these itself


def copy_units(
    corpus: Corpus,
    store: Store,
    info: TeacherInfo,
    changes: dict[str, object],
    done: Done,
) -> None:
    """Write and commit in ``store`` the units of ``info`` (a teacher, or a part of it), with
    ``changes`` of its fields. Units that exist there are left as they are.

    Raises CacheError if a unit is damaged, or of another teacher.
    """
    shards, columns = ShardSet(corpus.store, info.folder), [*kind_of(info).schema({})]
    target = ShardSet(store, info.model_copy(update=changes).folder)
    done_units, reader = {*target.committed()}, TeacherReader(corpus, [info])
    for unit, commit in shards.committed().items():
        if unit not in done_units:
            shard = shards.open(commit, fields=columns, direct=True)
            owner = check_owner(shard, info)
            kind = kind_of(owner.model_copy(update=changes))
            metadata = {k: v for k, v in shard.metadata.items() if k not in SCHEMA_KEYS}
            schema = kind.schema(metadata)
            place = _place(corpus, shard)
            batches = _unchanged(corpus, shard, place[0], schema)
            if "codec" in changes:
                batches = _transcoded(reader, commit, place, kind, schema)
            facts = {fact: value for fact, value in commit.facts.items() if fact != FACT}
            checksum = ScalarChecksum()
            target.write(
                unit,
                schema,
                checksum.pass_through(batches),
                facts,
                write_options(kind),
                kind.info.rows_per_batch,
                checksum.facts,
            )
        done(commit)


def _place(corpus: Corpus, shard: Shard) -> UnitPlace:
    """Return a shard's unit; raise CacheFormatError if it is not one of the corpus."""
    place = place_of(shard.commit.unit)
    if place is None or place[0] >= len(corpus.commits):
        raise CacheFormatError(f"{shard.name} does not belong to a corpus shard, by its name")
    return place


def _unchanged(
    corpus: Corpus, shard: Shard, number: int, schema: pa.Schema
) -> Iterator[pa.RecordBatch]:
    """Yield the record batches of a unit unchanged; they match those of the corpus's rows."""
    for index in range(shard.batch_count):
        batch = shard.batch(index, keep=False)
        check_aligned(batch, corpus, number, index, shard.name, shard.commit.rows_per_batch)
        yield pa.RecordBatch.from_arrays(batch.columns, schema=schema)


def _transcoded(
    reader: TeacherReader, commit: Commit, place: UnitPlace, kind: TargetKind, schema: pa.Schema
) -> Iterator[pa.RecordBatch]:
    """Yield a unit's rows, checked as a reader checks them, in the record batches of ``kind``."""
    shard, replica = place
    digests = reader.corpus.shard(shard).table()["digest"].to_pylist()
    step = commit.rows_per_batch
    for first in range(0, commit.rows, ROWS_PER_BATCH):
        last = min(first + ROWS_PER_BATCH, commit.rows)
        lists = [reader.row_lists(shard, at // step, replica) for at in range(first, last, step)]
        counts = np.concatenate([np.diff(one.offsets) for one in lists])
        columns = {
            name: np.concatenate([one.columns[name] for one in lists]) for name in lists[0].columns
        }
        rows = np.repeat(np.arange(last - first), counts)
        yield from kind.batches(schema, digests[first:last], rows, columns)
