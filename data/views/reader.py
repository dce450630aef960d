"""Read the rows of a stored view by corpus shard (and replica), checked against the corpus."""

from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rekindle.data.corpus.config import are_tokens
from rekindle.data.corpus.corpus import Corpus
from rekindle.data.errors import CacheFormatError, CacheMismatchError, unusable
from rekindle.data.storage.columns import flat_lists, list_views
from rekindle.data.storage.cuts import Flat, RowReader
from rekindle.data.storage.seal import REPAIR, read_sealed
from rekindle.data.storage.shards import ROWS_PER_BATCH, Shard, ShardSet
from rekindle.data.storage.units import unit_of
from rekindle.data.views.base import unit_metadata
from rekindle.data.views.registry import view_kind


class ViewReader(RowReader):
    """Reads the rows of a view by corpus shard (and replica), checked against the corpus."""

    def __init__(self, corpus: Corpus, name: str, max_replicas: int | None = None):
        """``max_replicas``: read at most this many replicas, the first ones."""
        super().__init__()
        self.corpus, self.name, self.kind = corpus, name, view_kind(name)
        self.max_replicas = max_replicas
        self.shards = ShardSet(corpus.store, f"views/{name}")
        self.commits = self.shards.committed()
        self._open: dict[str, Shard] = {}

    @property
    def folder(self) -> str:
        """Return the folder of its shards."""
        return self.shards.folder

    @cached_property
    def identity(self) -> Mapping[str, Any]:
        """Return what decides its bytes, from ``view.json``."""
        path = f"{self.folder}/view.json"
        location = f"{self.corpus.store.location}/{path}"
        with unusable(f"{location} is missing", FileNotFoundError, advice=f". {REPAIR}"):
            return read_sealed(self.corpus.store, path)

    @cached_property
    def replicas(self) -> int:
        """Return how many replicas every corpus shard has; at most those to be read."""
        # Recently added text may have no masks yet; the rest has.
        shards, count = len(self.corpus.commits), 0
        uncovered = self.commits.missing_units(shards, [0])
        while count != self.max_replicas and len(uncovered) < shards:
            if len(self.commits.missing_units(shards, [count])) > len(uncovered):
                break
            count += 1
        return count

    def count_pairs(self, domains: Sequence[str] | None, limit: float) -> int:
        """Return how many sequences (of ``domains``; None: all) have a pair of texts, in a view of
        pairs; stop at ``limit``.
        """
        count = 0
        for number in range(len(self.corpus.commits)):
            for index, batch in enumerate(self.batches(number)):
                has_pair = batch["text_a"].is_valid()
                if domains is not None:
                    rows = self.corpus.rows(number, index * ROWS_PER_BATCH, ROWS_PER_BATCH)
                    has_pair = pc.and_(
                        has_pair, pc.is_in(rows["domain"], pa.array(domains, pa.string()))
                    )
                count += has_pair.true_count
                if count >= limit:
                    return count
        return count

    def has(self, shard: int, replica: int | None = None) -> bool:
        """Return whether the unit is committed."""
        return unit_of(shard, replica) in self.commits

    def batch(self, shard: int, index: int, replica: int | None = None) -> pa.RecordBatch:
        """Return record batch ``index`` of one corpus shard's view."""
        return self._shard(shard, replica).batch(index)

    def batches(self, shard: int, replica: int | None = None) -> list[pa.RecordBatch]:
        """Return all record batches of one corpus shard's view."""
        count = self.corpus.shard(shard).batch_count
        return [self.batch(shard, index, replica) for index in range(count)]

    def _read_lists(self, shard: int, index: int, replica: int | None) -> Flat:
        return flat_lists(self.batch(shard, index, replica), ["input_ids", self.kind.list_column])

    def _shard(self, shard: int, replica: int | None) -> Shard:
        unit = unit_of(shard, replica)
        if unit not in self._open:
            if unit not in self.commits:
                raise CacheFormatError(
                    f"view {self.name} has no unit {unit}; run `pipeline cache-teachers` to make it"
                )
            metadata = unit_metadata(self.name, shard, replica)
            check = partial(self._check_rows, unit, shard)
            commit = self.commits[unit]
            self._open[unit] = self.shards.open(commit, metadata, self.kind.fields, check)
        return self._open[unit]

    def _check_rows(self, unit: str, shard: int, index: int, batch: pa.RecordBatch) -> None:
        """Raise CacheFormatError for what our own code would not have written."""
        check_aligned(batch, self.corpus, shard, index, f"views/{self.name}/{unit}")
        offsets, ids = list_views(batch["input_ids"], "input_ids")
        lists = list_views(batch[self.kind.list_column], self.kind.list_column)
        ids = ids[offsets[0] : offsets[-1]]
        are_valid = are_tokens(ids, self.corpus.info["tokenizer"])
        is_sound = are_valid and np.array_equal(offsets, lists[0])
        lengths = self.corpus.lengths(shard, index * ROWS_PER_BATCH, len(batch))
        if not is_sound or not self.kind.is_valid_batch(batch, lists, lengths):
            raise CacheFormatError(
                f"views/{self.name}: record batch {index} of shard {shard} has ids outside the "
                "vocabulary, positions outside its sequences or columns that do not agree"
            )


def shown_view(corpus: Corpus, name: str) -> ViewReader | None:
    """Return the reader of the view recorded as ``name``; None for the corpus itself."""
    return ViewReader(corpus, name) if view_kind(name).stored else None


def check_aligned(
    batch: pa.RecordBatch,
    corpus: Corpus,
    shard: int,
    index: int,
    label: str,
    rows_per_batch: int = ROWS_PER_BATCH,
) -> None:
    """Raise CacheMismatchError unless the batch's digests are the corpus's, row by row."""
    expected = corpus.rows(shard, index * rows_per_batch, rows_per_batch)["digest"]
    if batch["digest"].equals(expected):
        return
    digests, corpus_digests = batch["digest"].to_pylist(), expected.to_pylist()
    pairs = enumerate(zip(digests, corpus_digests, strict=False))
    row = next((i for i, (a, b) in pairs if a != b), len(corpus_digests))
    raise CacheMismatchError(
        f"{label}: row {row} of record batch {index} does not belong to the corpus row beside it "
        "(their digests differ); these targets were made from another corpus"
    )
