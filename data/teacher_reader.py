"""Reads one teacher's targets by corpus shard and row; checks what it reads before it is used."""

from collections.abc import Iterable
from functools import cached_property

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rekindle.data.codec import join_ids
from rekindle.data.columns import list_views
from rekindle.data.corpus import Corpus, unit_of
from rekindle.data.errors import CacheFormatError, CacheMismatchError
from rekindle.data.settings import parse_settings
from rekindle.data.shards import ROWS_PER_BATCH, Commit, Shard, ShardSet
from rekindle.data.targets import (
    VOCABULARY_TASKS,
    Columns,
    TeacherInfo,
    no_positions,
    position_columns,
    target_schema,
)
from rekindle.data.views import ViewReader, check_aligned


class TeacherReader:
    """One teacher of a cache: ``info`` and its committed units."""

    def __init__(self, corpus: Corpus, info: TeacherInfo, view: ViewReader | None):
        self.corpus, self.info, self.view = corpus, info, view
        self.shards = ShardSet(corpus.store, f"targets/{info.name}")
        self.commits: dict[str, Commit] = self.shards.committed()
        self._open: dict[str, Shard] = {}
        self._views: dict[tuple[str, int], tuple[NDArray[np.int32], Columns]] = {}

    def __getattr__(self, name: str) -> object:
        # task, k, label_names, fingerprints, … are read as attributes of the teacher itself.
        if name in TeacherInfo.model_fields:
            return getattr(self.info, name)
        raise AttributeError(f"a cached teacher has no attribute {name!r}")

    @property
    def fingerprint(self) -> str:
        """The digest of the teacher's weights."""
        return self.info.fingerprints.get("weights") or ""

    @property
    def masked(self) -> bool:
        """Whether there is one unit per masked replica."""
        return self.info.view.startswith("masked-")

    @property
    def paired(self) -> bool:
        """Whether it is shown text pairs."""
        return self.info.view.startswith("pairs-")

    @cached_property
    def replicas(self) -> int:
        """Replicas of the view; 1 for a teacher without a masked view."""
        return self.view.replicas if self.masked and self.view else 1

    @property
    def bytes(self) -> int:
        """Bytes of all committed shards."""
        return sum(commit.bytes for commit in self.commits.values())

    @property
    def positions(self) -> int:
        """Positions (or, for sequence teachers, sequences) that have a target."""
        return sum(commit.facts["positions"] for commit in self.commits.values())

    @property
    def coverage(self) -> float:
        """Share of the planned units (corpus shards × replicas) that are committed, by rows."""
        planned = len(self.corpus) * self.replicas
        return sum(commit.rows for commit in self.commits.values()) / planned if planned else 0.0

    def has(self, shard: int, replica: int | None) -> bool:
        """Whether the unit is committed."""
        return unit_of(shard, replica if self.masked else None) in self.commits

    def position_rows(
        self, shard: int, rows: Iterable[int], replica: int | None
    ) -> list[tuple[slice, Columns]]:
        """For each row: the slice of its positions in the flat columns of its record batch."""
        out = []
        for row in rows:
            index, local = divmod(int(row), ROWS_PER_BATCH)
            offsets, columns = self._batch_columns(shard, index, replica)
            out.append((slice(int(offsets[local]), int(offsets[local + 1])), columns))
        return out

    def sequence_rows(self, shard: int, rows: Iterable[int]) -> tuple[NDArray[np.bool_], Columns]:
        """Presence [R] and the fixed-width columns [R,C] of the rows (zeros where absent)."""
        wanted = [divmod(int(row), ROWS_PER_BATCH) for row in rows]
        parts = [self._batch_columns(shard, index, None)[1] for index, _ in wanted]
        columns = {
            name: np.stack([p[name][local] for p, (_, local) in zip(parts, wanted, strict=True)])
            for name in parts[0]
        }
        return columns.pop("present"), columns

    def _batch_columns(
        self, shard: int, index: int, replica: int | None
    ) -> tuple[NDArray[np.int32], Columns]:
        unit = unit_of(shard, replica if self.masked else None)
        if (unit, index) not in self._views:
            batch = self._shard(unit, shard, replica).batch(index)
            what = f"targets/{self.info.name}/{unit}"
            check_aligned(batch, self.corpus, shard, index, what)
            if self.info.kind == "sequence":
                self._views[unit, index] = (np.zeros(0, np.int32), _sequence_columns(batch))
            else:
                offsets, columns = _flat_columns(batch)
                self._validate(offsets, columns, shard, index, what)
                self._views[unit, index] = (offsets, columns)
        return self._views[unit, index]

    def _shard(self, unit: str, shard_number: int, replica: int | None) -> Shard:
        if unit not in self._open:
            if unit not in self.commits:
                raise CacheMismatchError(
                    f"teacher {self.info.name!r} has no targets for unit {unit}: the cache is "
                    "incomplete. Run `pipeline cache-teachers` again; it makes only what is missing"
                )
            replica = replica if self.masked else None
            about = {"kind": "targets", "shard": shard_number, "replica": replica}
            shard = self.shards.open(self.commits[unit], about)
            expected = target_schema(self.info, {})
            if not shard.schema.equals(expected, check_metadata=False):
                raise CacheFormatError(
                    f"{shard.path} does not have the columns that teacher.json announces"
                )
            stated = parse_settings(TeacherInfo, shard.metadata.get("teacher"), str(shard.path))
            if stated.identity() != self.info.identity():
                raise CacheMismatchError(
                    f"{shard.path} was made by another teacher than teacher.json describes: "
                    "targets were exchanged, or the description was edited"
                )
            self._open[unit] = shard
        return self._open[unit]

    def _validate(
        self,
        offsets: NDArray[np.int32],
        columns: Columns,
        shard: int,
        index: int,
        what: str,
    ) -> None:
        """Positions ascend within their sequence; ids lie within the vocabulary."""
        positions = columns["positions"].astype(np.int64)
        tokens = list_views(self.corpus.shard(shard).batch(index)["input_ids"], "input_ids")[0]
        # A causal target is the distribution of the next token: the last one has none.
        lengths = np.diff(tokens) - (self.info.task == "causal_lm")
        counts = np.diff(offsets)
        limit = np.repeat(lengths, counts)
        within = positions[offsets[0] : offsets[-1]]
        row = np.repeat(np.arange(len(counts)), counts)
        ascending = (np.diff(within) > 0) | (np.diff(row) > 0)
        if (within >= limit).any() or not ascending.all():
            raise CacheFormatError(
                f"{what}: record batch {index} has positions outside its sequences"
            )
        if "ids" in columns:
            size = self.info.vocabulary_size or 0
            ids = join_ids(columns["ids"], columns.get("ids_high"), size)
            if ids.max(initial=0) >= size:
                raise CacheFormatError(
                    f"{what}: record batch {index} has ids outside the vocabulary"
                )
            if (columns["log_prob_min"] < columns["log_prob_max"]).any():
                raise CacheFormatError(f"{what}: record batch {index} has rising probabilities")
        for name in ("log_probs", "logits"):
            if name in columns and np.isnan(columns[name]).any():
                raise CacheFormatError(f"{what}: record batch {index} has NaN in {name!r}")

    @property
    def is_vocabulary(self) -> bool:
        """Whether the targets are distributions over the vocabulary."""
        return self.info.task in VOCABULARY_TASKS

    def column_names(self) -> list[str]:
        """The per-position columns."""
        return list(position_columns(self.info))

    def no_positions(self) -> Columns:
        """The per-position columns with no position in them."""
        return no_positions(self.info)


def _flat_columns(batch: pa.RecordBatch) -> tuple[NDArray[np.int32], Columns]:
    columns: Columns = {}
    reference: NDArray[np.int32] | None = None
    for name in batch.schema.names[1:]:
        offsets, flat = list_views(batch[name], name)
        if reference is None:
            reference = offsets
        elif not np.array_equal(offsets, reference):
            raise CacheFormatError(f"column {name!r} has other list lengths than 'positions'")
        columns[name] = flat
    assert reference is not None
    return reference, columns


def _sequence_columns(batch: pa.RecordBatch) -> Columns:
    present = batch["logits"].is_valid().to_numpy(zero_copy_only=False)
    columns: Columns = {"present": present}
    for name in batch.schema.names[1:]:
        array = batch[name]
        flat = array.values.to_numpy(zero_copy_only=False)
        start = array.offset * array.type.list_size
        values = flat[start : start + len(array) * array.type.list_size]
        columns[name] = np.where(present[:, None], values.reshape(len(array), -1), 0)
        if np.isnan(columns[name]).any():
            raise CacheFormatError(f"column {name!r} has NaN")
    return columns
