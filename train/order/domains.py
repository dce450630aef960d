"""Which sequences of a corpus belong to which domain, as ranges of sequence numbers.

A shard's commit record counts its sequences by domain, so shards that lie in one domain, or have
none of the wanted ones, are not opened. Of the others only the domain column is read.
"""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from rekindle.data.corpus.corpus import Corpus
from rekindle.data.errors import CacheFormatError, InputError
from rekindle.data.storage.seal import REPAIR
from rekindle.train.order.held_out import Ranges

Runs = NDArray[np.int64]  # [R,3] number of the domain (-1: none), first row, row after the last


def check_domains(corpus: Corpus, names: Iterable[str], key: str) -> None:
    """Raise InputError for a domain, named in the configuration's ``key``, that the
    corpus lacks.
    """
    counts = corpus.domains
    unknown = [name for name in names if name not in counts]
    if not unknown:
        return
    if not counts:
        raise InputError(
            f"{key} names {unknown[0]!r}, but the sequences of {corpus.store.location} have no "
            "domains: set corpus.domain_field, and cache the corpus again"
        )
    raise InputError(
        f"{key}: there is no domain {unknown[0]!r} in {corpus.store.location}; it has "
        f"{', '.join(f'{name} ({count:,} sequences)' for name, count in sorted(counts.items()))}"
    )


def domain_ranges(corpus: Corpus, names: Sequence[str]) -> dict[str, Ranges]:
    """Return the sequences of each of the domains ``names``, which the corpus must have.

    There is one range per run of sequences of one domain: memory grows with the number of runs, not
    of sequences. Raises CacheFormatError for a shard without the domains that its record counts.
    """
    distinct = list(dict.fromkeys(names))
    counted = enumerate(corpus.commits_by_unit.counts_by_name("domains"))
    parts = [_shard_runs(corpus, shard, counts or {}, distinct) for shard, counts in counted]
    runs = np.concatenate([np.zeros((0, 3), np.int64), *parts])
    # A run may cross shards: ranges that touch are joined.
    return {n: Ranges(runs[runs[:, 0] == i, 1:]).joined() for i, n in enumerate(distinct)}


def _shard_runs(
    corpus: Corpus, shard: int, counts: Mapping[str, int], names: Sequence[str]
) -> Runs:
    first, stop = corpus.first(shard), corpus.first(shard + 1)
    present = [name for name in names if counts.get(name)]
    if not present:
        return np.zeros((0, 3), np.int64)
    if counts[present[0]] == stop - first:
        return np.array([[names.index(present[0]), first, stop]], np.int64)
    value_set = pa.array(names, pa.string())
    # The column has no checksum of its own, but is compared with the record, which has one; and
    # every training sequence is verified with its record batch.
    batches = corpus.shard(shard).read_unverified(["domain"])
    columns = [batch["domain"] for batch in batches]
    indices = [pc.fill_null(pc.index_in(column, value_set=value_set), -1) for column in columns]
    numbers = np.concatenate([one.to_numpy(zero_copy_only=False) for one in indices])
    for number, name in enumerate(names):
        if int((numbers == number).sum()) != counts.get(name, 0):
            raise CacheFormatError(
                f"{corpus.shard(shard).name} does not have the sequences of {name!r} that its "
                f"commit record counts. {REPAIR}"
            )
    edges = np.flatnonzero(np.diff(numbers, prepend=numbers[0] - 1, append=numbers[-1] - 1))
    return np.stack([numbers[edges[:-1]], first + edges[:-1], first + edges[1:]], axis=1)
