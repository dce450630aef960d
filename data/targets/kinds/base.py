"""Base classes of target kinds: columns, schema, reading, decoding.

A kind describes, with NumPy only, how its columns are stored, written, read, checked and decoded.
``pipeline/caching/scoring.py`` makes targets of the kind from logits and ``train/device_batch.py``
prepares them for a loss; both look up what to do by the kind's name.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from numbers import Integral
from typing import ClassVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rekindle.data.errors import InputError
from rekindle.data.storage.columns import flat_lists, list_array, list_type, offsets_of
from rekindle.data.storage.seal import FORMAT_VERSION
from rekindle.data.storage.shards import rows_in_batches, shard_schema
from rekindle.data.targets.codec import Columns, Floats
from rekindle.data.targets.codec_compact import Widths, fill_missing_scalars
from rekindle.data.targets.codec_registry import CODECS, Codec
from rekindle.data.targets.head import StoredHead
from rekindle.data.targets.interpolation import knots
from rekindle.data.targets.schema import VOCABULARY_TASKS, TeacherInfo, rank_dtype

_SIZES = ("num_labels", "hidden_size", "dimensions")
POSITIONS: Widths = {"positions": (pa.uint16(), None)}


class TargetKind(ABC):
    """One kind of target, for the teacher (or the extension) that ``info`` describes.

    On disk a column holds, for each row, the list of its positions' entries.
    """

    name: ClassVar[str]
    # of ``description``: {k} and the like are fields of ``info``
    template: ClassVar[str] = ""
    tasks: ClassVar[tuple[str, ...]]
    needs: ClassVar[tuple[str, ...]]  # fields of ``info`` that determine the columns' widths
    codecs: ClassVar[tuple[str, ...]] = ("default",)
    needs_temperatures: ClassVar[bool] = False  # whether it is stored for certain temperatures
    # Whether it is an unbiased sample at one temperature: usable where the loss is linear in the
    # probabilities.
    is_sample: ClassVar[bool] = False
    # whether every probability is known, at any temperature
    has_all_probabilities: ClassVar[bool] = False
    has_tail: ClassVar[bool] = False  # whether the mass outside its ids is stored
    has_head: ClassVar[bool] = False  # whether the teacher's output matrix is stored beside it
    # whether a larger k and more temperatures can be added later, beside it
    can_grow: ClassVar[bool] = False
    is_extension: ClassVar[bool] = False  # whether it adds to targets of another kind (as tails do)
    per_sequence: ClassVar[bool] = False  # one target per row, none at positions
    largest_k: ClassVar[int | None] = None  # independent of the vocabulary
    reveals_text: ClassVar[bool] = True  # whether much of the text can be read from it, or guessed

    def __init__(self, info: TeacherInfo):
        self.info = info

    @property
    def codec(self) -> Codec:
        """The codec that encodes and arranges its columns."""
        return CODECS[self.info.codec]

    @property
    def has_sizes(self) -> bool:
        """Whether the widths of all its columns are known."""
        return all(getattr(self.info, name) is not None for name in self.needs)

    @property
    def readable_temperature(self) -> float:
        """A temperature at which it can be read: 1 if possible, else the first that is stored
        (samples and imported targets may lack 1).
        """
        stored = self.info.temperatures
        return stored[0] if stored and 1.0 not in stored and not self.has_all_probabilities else 1.0

    def contradiction(self) -> str | None:
        """Return why there can be no such targets, or None. Readers rely on this after reading
        teacher.json.
        """
        info, size, k = self.info, self.info.vocabulary_size or 0, self.info.k
        largest = self.largest_k or (size if "k" in self.needs else None)
        is_right = {
            "its kind is not of its task": info.task in self.tasks,
            "its view is not of its task": info.task in info.view_class.tasks,
            "its size is missing": self.has_sizes,
            "its sizes are too large": max(size, *(getattr(info, name) or 0 for name in _SIZES))
            < 2**31,
            "its k is too large": k is None or largest is None or k <= largest,
            "its temperatures are missing, or not positive and finite": (
                all(0 < t < math.inf for t in info.temperatures)
                and (len(info.temperatures) > 0 or not self.needs_temperatures)
            ),
            "its codec is not of its kind": info.codec in self.codecs
            and size <= self.codec.largest_vocabulary,
            "its kind and extends contradict each other (only tails extend a part)": (
                self.is_extension == (info.extends is not None)
                and (not self.is_extension or info.part != "")
            ),
        }
        return next((problem for problem, right in is_right.items() if not right), None)

    def schema(self, about: Mapping[str, object]) -> pa.Schema:
        """Return the Arrow schema of one unit; its metadata repeats ``info`` and adds ``about``."""
        fields = [pa.field("digest", pa.string()), *self._fields()]
        described = {
            "kind": "targets",
            "format_version": FORMAT_VERSION,
            "teacher": self.info.model_dump(mode="json"),
        }
        return shard_schema(fields, described | dict(about))

    @property
    def width(self) -> str:
        """The number of values kept per target, as text."""
        size = getattr(self.info, self.needs[-1]) if self.needs else None
        return "?" if size is None else f"{size:,}"

    @property
    def summary(self) -> str:
        """What is kept of each target, in two words."""
        return f"{self.name.removesuffix('k')} {self.width}"  # "top 64"

    @property
    def description(self) -> str:
        """What is kept of each target, as a phrase."""
        return self.template.format_map(vars(self.info)) or self.summary

    @abstractmethod
    def memory_columns(self) -> Widths:
        """Return the columns as they are used, without ``positions``."""

    def stored_columns(self) -> Widths:
        """Return the columns on disk that have one entry per position."""
        return self.codec.stored_columns(
            POSITIONS | self.memory_columns(), self.info.vocabulary_size or 0
        )

    def entry_columns(self) -> dict[str, pa.DataType]:
        """Return the columns on disk with a variable number of entries per position, which the
        column ``distinct`` counts (kind random only).
        """
        return {}

    def _fields(self) -> list[pa.Field]:
        fields = [pa.field(n, list_type(t, w)) for n, (t, w) in self.stored_columns().items()]
        return fields + [pa.field(n, list_type(t)) for n, t in self.entry_columns().items()]

    @property
    def bytes_per_position(self) -> int:
        """The most bytes a position can take: all columns, uncompressed, all draws different."""
        columns = [*self.stored_columns().values()]
        columns += [(dtype, self.info.k) for dtype in self.entry_columns().values()]
        return sum(dtype.bit_width // 8 * (1 if w is None else w) for dtype, w in columns)

    @property
    def size_varies(self) -> bool:
        """Whether ``bytes_per_position`` is only an upper bound, because of sampling or
        compression.
        """
        return self.codec.is_compressed or bool(self.entry_columns())

    @property
    def is_copied_on_read(self) -> bool:
        """Whether reading copies its columns; else they are views of the file."""
        return self.codec.is_compressed

    def empty_columns(self) -> Columns:
        """Return the used columns of zero targets."""
        columns = ({} if self.per_sequence else POSITIONS) | self.memory_columns()
        return {
            name: np.zeros((0,) if width is None else (0, width), dtype.to_pandas_dtype())
            for name, (dtype, width) in columns.items()
        }

    def batches(
        self, schema: pa.Schema, digests: list[str], rows: NDArray[np.int64], columns: Columns
    ) -> Iterator[pa.RecordBatch]:
        """Yield the record batches of a unit with the ``digests`` of its rows.

        ``columns`` are [P,…] as they are used; ``rows`` [P], ascending, gives the row of each
        position.
        """
        columns = columns if len(rows) else self.empty_columns()
        counts = np.bincount(rows, minlength=len(digests))
        starts = np.concatenate([[0], np.cumsum(counts)])
        for first, last in rows_in_batches(len(digests), self.info.rows_per_batch):
            part = slice(starts[first], starts[last])
            stored = self._pack({name: flat[part] for name, flat in columns.items()})
            offsets = dict.fromkeys(schema.names[1:], offsets_of(counts[first:last]))
            if entries := self.entry_columns():
                entry_counts = np.bincount(rows[part] - first, stored["distinct"], last - first)
                offsets |= dict.fromkeys(entries, offsets_of(entry_counts.astype(np.int64)))
            arrays = [list_array(offsets[name], stored[name]) for name in schema.names[1:]]
            digest = pa.array(digests[first:last], pa.string())
            yield pa.record_batch([digest, *arrays], schema=schema)

    def _pack(self, columns: Columns) -> Columns:
        return self.codec.pack(columns, self.info.vocabulary_size or 0)

    def read(self, batch: pa.RecordBatch) -> tuple[NDArray[np.int32], Columns]:
        """Return list offsets [R+1] and the columns [P,…] of a record batch, as they are used."""
        offsets, columns = flat_lists(batch, [*self.stored_columns()])
        return offsets, self.codec.unpack(columns, self.info.vocabulary_size or 0)

    def problems(self, columns: Columns) -> Iterator[str]:
        """Yield what is wrong with columns that Rekindle cannot have written."""
        yield from ()


class TaskKind(TargetKind):
    """The logits of a task head, all of them."""

    needs = ("num_labels",)

    @property
    def summary(self) -> str:
        """What is kept of each target, in two words."""
        return f"{self.width} {'logit' if self.info.num_labels == 1 else 'logits'}"

    @property
    def description(self) -> str:
        """What is kept of each target, as a phrase."""
        return "a score" if self.info.num_labels == 1 else f"{self.info.num_labels} logits"


class VocabularyKind(TargetKind):
    """Distributions over the vocabulary, each with the scalars of its position."""

    tasks = VOCABULARY_TASKS
    needs: ClassVar[tuple[str, ...]] = ("vocabulary_size",)

    @classmethod
    def settings(
        cls,
        k: int,
        temperatures: tuple[float, ...],
        codec: str,
        vocabulary_size: int,
        hidden_size: int | None,
        tokens: int | None = None,
    ) -> dict[str, object]:
        """Return the fields of ``teacher.json`` that say what is kept of a distribution.

        ``tokens``: the number of ids, of ``vocabulary_size``, that can have a probability; None:
        all.
        """
        tokens = vocabulary_size if tokens is None else tokens
        fields: dict[str, object] = {"kind": cls.name, "vocabulary_size": vocabulary_size}
        if "hidden_size" in cls.needs:
            fields["hidden_size"] = hidden_size
        if "k" in cls.needs:
            k = min(k, cls.largest_k or tokens)
            bias = "unbiased" if cls.is_sample else "biased"
            if k == tokens and cls.largest_k is None:  # draws may miss an id at any k
                bias = "exact"
            fields |= {"k": k, "temperatures": temperatures, "codec": codec}
            fields["estimator"] = {"kind": cls.name, "bias": bias}
        return fields

    @property
    def size(self) -> int:
        """V: one more than the largest token id."""
        assert self.info.vocabulary_size is not None
        return self.info.vocabulary_size

    @property
    def certainty_threshold(self) -> float:
        """Probability above which a position's likeliest id is certainly the teacher's; 0:
        always.
        """
        return 0.0

    @property
    def k(self) -> int:
        """K: the number of ids kept per position."""
        return self.info.k if self.info.k is not None and "k" in self.needs else self.size

    @abstractmethod
    def distribution_columns(self) -> Widths:
        """Return the columns of what is kept, as they are used."""

    def memory_columns(self) -> Widths:
        """Return the columns as they are used, without ``positions``."""
        rank = pa.from_numpy_dtype(rank_dtype(self.size))
        # gold_log_prob is stored negated, as -log p in 1/1024 nat
        scalars: Widths = {"gold_log_prob": (pa.uint16(), None), "gold_rank": (rank, None)}
        scalars["entropy"] = (pa.uint16(), None)
        for name in self._lacks:
            del scalars[name]
        return self.distribution_columns() | scalars

    @property
    def _lacks(self) -> tuple[str, ...]:
        """The scalars missing from imported or served targets."""
        return self.info.lacks

    def _pack(self, columns: Columns) -> Columns:
        if self._lacks and self.codec.is_compressed:
            columns = fill_missing_scalars(columns, self.size)
        return super()._pack(columns)

    def read(self, batch: pa.RecordBatch) -> tuple[NDArray[np.int32], Columns]:
        """Return list offsets [R+1] and the columns [P,…] of a record batch, as they are used."""
        offsets, columns = super().read(batch)
        return offsets, {name: c for name, c in columns.items() if name not in self._lacks}

    def candidate_ids(self, columns: Columns) -> NDArray[np.int64] | None:
        """Return the kept ids [P,K], −1 for none; None if all ids are kept."""
        return None

    @abstractmethod
    def decode(
        self, columns: Columns, head: StoredHead | None, temperature: float, k: int | None
    ) -> tuple[NDArray[np.int64], Floats, Floats]:
        """Return ids [P,k], log-probabilities [P,k] at ``temperature`` and log tail mass [P].

        Raise InputError at a temperature that is not stored, or for a ``k`` below that of a sample.
        """

    def interpolates(self, temperature: float) -> bool:
        """Return whether ``temperature``, not stored itself, can be interpolated: it lies among
        three or more stored ones, each with a tail.
        """
        return self.has_tail and knots(temperature, self.info.temperatures) != ()

    def slot(self, temperature: float, k: int | None = None) -> int:
        """Return the index of a stored temperature; 0 if all temperatures can be read.

        Raise InputError as ``slots`` does.
        """
        return self.slots(temperature, k)[0]

    def slots(
        self, temperature: float, k: int | None = None, interpolate: bool = False
    ) -> tuple[int, ...]:
        """Return the indices of the stored temperatures needed to read ``temperature``.

        Its own index or, if it may ``interpolate``, those of the three around it
        (``targets/interpolation.py``); (0,) if all temperatures can be read. Raise InputError at a
        temperature that is not stored, for a ``k`` below that of a sample, and for one above what
        is kept.
        """
        info = self.info
        if k is not None and (not isinstance(k, Integral) or k < 1):
            raise InputError(f"k is {k!r}; it is how many candidates are read, 1 or more")
        if self.has_all_probabilities:
            return (0,)
        if k is not None and k != self.k and self.is_sample:
            raise InputError(
                f"teacher {info.name!r} keeps a sample of {self.k} ({self.name}): a part of it "
                "would be biased. Leave k out, or cache a smaller sample"
            )
        if k is not None and k > self.k:
            raise InputError(
                f"teacher {info.name!r} keeps {self.k} candidates; k = {k} is not cached"
            )
        if temperature in info.temperatures:
            return (info.temperatures.index(temperature),)
        if interpolate and self.interpolates(temperature):
            return knots(temperature, info.temperatures)
        unknown = f"the mass outside its top {self.k} is known at stored temperatures only"
        if self.is_sample:
            reason = "a sample is of one distribution. Change the teacher's targets.temperatures"
        elif info.imported:
            reason = f"{unknown}. Import rows whose log_tails include {temperature}"
        elif info.served:
            reason = "a server tells the mass outside its top ids at temperature 1 only"
        else:
            reason = (
                f"{unknown}. Add {temperature} to the teacher's targets.temperatures (if it is "
                "there, finish `pipeline cache-teachers`)"
            )
        alternative = "or train at a stored one"
        if interpolate and self.has_tail:
            alternative += (
                ". Interpolation needs three or more stored temperatures, below and above it"
            )
        elif self.interpolates(temperature):
            alternative = (
                "train at a stored one, or have the distillation term interpolate it "
                "(temperature_between: interpolate)"
            )
        raise InputError(
            f"teacher {info.name!r} stores the temperatures {list(info.temperatures)}, not "
            f"{temperature}: {reason}, {alternative}"
        )
