"""Write and commit a unit of a teacher's targets; guard a teacher's name in the cache.

Where targets come from, a model that was run or an import, is unknown here.
"""

import shlex
from collections.abc import Callable, Mapping

import pyarrow as pa
from numpy.typing import NDArray

from rekindle.data.corpus.corpus import Corpus
from rekindle.data.errors import CacheMismatchError
from rekindle.data.journal import refuse_renamed
from rekindle.data.storage.seal import seal
from rekindle.data.storage.shards import Commit, ShardSet
from rekindle.data.storage.units import unit_of
from rekindle.data.targets.codec import Columns
from rekindle.data.targets.kinds.base import TargetKind
from rekindle.data.targets.kinds.registry import kind_of
from rekindle.data.targets.reading.files import read_teacher
from rekindle.data.targets.scalars import ScalarChecksum
from rekindle.data.targets.schema import TeacherInfo

ZSTD_LEVEL = 1  # for the compact codec: higher levels cost time and gain nothing


def write_targets(
    info: TeacherInfo,
    corpus: Corpus,
    place: tuple[int, int | None],
    rows: NDArray,
    columns: Columns,
    facts: Mapping[str, object],
    late_facts: Callable[[], Mapping[str, object]] = dict,
) -> Commit:
    """Write and commit the unit of ``place`` (shard of the corpus, replica).

    ``rows`` [P], ascending, is the row of each entry of ``columns``, [P,…] as they are used. The
    record gets ``facts``, and the result of ``late_facts`` once all is encoded. Raises
    CacheMismatchError as ``check_same`` does.
    """
    shard, replica = place
    kind = kind_of(info)
    schema = kind.schema({"shard": shard, "replica": replica})
    digests = corpus.shard(shard).table()["digest"].to_pylist()
    batches = kind.batches(schema, digests, rows, columns)
    all_facts = {
        "positions": len(rows),
        "tokens": corpus.commits[shard].facts["tokens"],
        "shard": shard,
        "replica": replica,
        "corpus_sha256": corpus.commits[shard].sha256,
        **facts,
    }
    # Only once there is something to write: a teacher that cannot be loaded, or gives NaN, leaves
    # its name free for the corrected configuration.
    claim_teacher(corpus, info)
    checksum = ScalarChecksum()
    return ShardSet(corpus.store, info.folder).write(
        unit_of(shard, replica),
        schema,
        checksum.pass_through(batches),
        all_facts,
        write_options(kind),
        info.rows_per_batch,
        lambda: checksum.facts() | dict(late_facts()),
    )


def write_options(kind: TargetKind) -> pa.ipc.IpcWriteOptions | None:
    """Return how shards of that kind are written."""
    if not kind.codec.is_compressed:
        return None
    return pa.ipc.IpcWriteOptions(compression=pa.Codec("zstd", compression_level=ZSTD_LEVEL))


def claim_teacher(corpus: Corpus, info: TeacherInfo) -> None:
    """Record the teacher (or its extension) in the cache, or check that it is the one there.

    Raises CacheMismatchError as ``check_same`` does.
    """
    content = seal(info.model_dump(mode="json"))
    if not corpus.store.create(f"{info.folder}/teacher.json", content):
        check_same(corpus, read_teacher(corpus.store, info.name, info.part), info)


def check_name(corpus: Corpus, present: TeacherInfo | None, info: TeacherInfo) -> None:
    """Raise InputError for a teacher that is not ``present`` under its name because it was renamed;
    CacheMismatchError as ``check_same`` does.
    """
    if present is None:
        refuse_renamed(corpus.store, [info])
    else:
        check_same(corpus, present, info)


def check_same(corpus: Corpus, present: TeacherInfo, info: TeacherInfo) -> None:
    """Raise CacheMismatchError, naming the differences, unless both are the same teacher.

    Targets of two models never mix under one name.
    """
    lead = f"the cache {corpus.store.location} already holds a teacher {info.name!r} that"
    if present.imported and not info.imported:
        raise CacheMismatchError(
            f"{lead} was imported ({present.imported.summary()}). Nothing has to be run for it: "
            "remove it from `teachers` (train.objective may still name it), or give this one "
            "another name"
        )
    if info.imported and not present.imported:
        raise CacheMismatchError(
            f"{lead} was run ({present.model}), not imported; give these targets another name"
        )
    if bool(info.served) != bool(present.served):
        raise CacheMismatchError(
            f"{lead} was {'served' if present.served else 'run'} ({present.model}), but this "
            f"one is {'served' if info.served else 'run'}; give it another name"
        )
    old, new = present.identity(), info.identity()
    old_prints, new_prints = old.pop("fingerprints"), new.pop("fingerprints")
    changed_prints = [
        name for name in old_prints | new_prints if old_prints.get(name) != new_prints.get(name)
    ]
    changed = [f"other {' and '.join(changed_prints)}"] if changed_prints else []
    changed += [f"{k}: {old.get(k)!r} there, {v!r} here" for k, v in new.items() if old.get(k) != v]
    if changed:
        command = f"`pipeline teachers {shlex.quote(corpus.store.location)}"
        advice = "Give"
        changed_keys = {k for k, v in new.items() if old.get(k) != v} - {"codec", "rows_per_batch"}
        if not changed_prints and not changed_keys and "precise" not in (present.codec, info.codec):
            advice = (
                f"Set its targets.codec to {present.codec}, or transcode it ({command} --transcode "
                f"{info.name} {info.codec}`), or give"
            )
        raise CacheMismatchError(
            f"{lead} differs from this one ({'; '.join(changed)}). {advice} this one another "
            f"name, or remove that one ({command} --remove {info.name} --yes`) to make it again"
        )
