"""The names of units of work and their order, that of their numbers; tables with a row for each.

A name has five digits, and more where the number has: as texts, 100000 would come before 99999.
Of the facts that the owner of a set records, numbers and counts by name have columns; they are
named after their type, so that a fact which is whole in one record and not in the next has two.
"""

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

UnitPlace = tuple[int, int | None]  # corpus shard, replica

_UNIT = re.compile(r"(\d{5,12})(?:-r(\d{3,6}))?", re.ASCII)
_REPLICAS = 1 << 20  # keys of a shard: one for the shard as it stands, then one for each replica
STRANGE = 1 << 62  # no key of a unit is as large: for what has a name that is none of ours


def unit_of(shard: int, replica: int | None = None) -> str:
    """The name of a unit of work: a corpus shard, or one masked replica of it."""
    return f"{shard:05d}" if replica is None else f"{shard:05d}-r{replica:03d}"


def place_of(unit: str) -> UnitPlace | None:
    """The shard and replica that a unit's name stands for; None for a name that is none of ours."""
    if (found := _UNIT.fullmatch(unit)) is None:
        return None
    place = int(found[1]), None if found[2] is None else int(found[2])
    return place if unit_of(*place) == unit else None


def key_of(unit: str) -> int:
    """The unit's name as a number, in the order of units; STRANGE for a name of no unit."""
    if (place := place_of(unit)) is None:
        return STRANGE
    return place[0] * _REPLICAS + (0 if place[1] is None else place[1] + 1)


def keys_of(shards: NDArray[np.int64], replica: int | None) -> NDArray[np.int64]:
    """The keys of a replica of each of those shards."""
    return shards * _REPLICAS + (0 if replica is None else replica + 1)


def shards_among(keys: NDArray[np.int64]) -> NDArray[np.int64]:
    """The shards whose units, without replicas, are among those keys."""
    return keys[(keys % _REPLICAS == 0) & (keys < STRANGE)] // _REPLICAS


def replicas_among(keys: NDArray[np.int64]) -> NDArray[np.int64]:
    """The replica of each key; −1 where it has none."""
    return keys % _REPLICAS - 1


def order_of(unit: str) -> tuple[int, str]:
    """What units are sorted by: shard, replica; names that are none of ours come last."""
    return key_of(unit), unit


# --- tables ---------------------------------------------------------------------------------------

FIELDS = {
    "key": pa.int64(),  # of the unit, see `key_of`
    "unit": pa.string(),
    "state": pa.string(),  # of the commit record, as a listing of the store gave it
    "rows": pa.int64(),
    "bytes": pa.int64(),
    "sha256": pa.string(),
}
WHOLE, FRACTION, NAMED = "int:", "float:", "json:"  # what the columns of facts are named by
_TYPES = {WHOLE: pa.int64(), FRACTION: pa.float64(), NAMED: pa.string()}
_NUMPY = {pa.int64(): np.int64, pa.float64(): np.float64, pa.bool_(): np.bool_}
LARGEST = 1 << 63


def type_of(column: str) -> pa.DataType | None:
    """The type of that column; None where there is none of such a name."""
    return FIELDS.get(column) or _TYPES.get(f"{column.partition(':')[0]}:")


def array_of(values: Sequence[Any] | NDArray[Any], dtype: pa.DataType) -> pa.Array:
    """``values`` as an array, None as null. Not by ``pa.array``, which imports pandas: a second."""
    valid = None
    if not isinstance(values, np.ndarray) and None in values:
        there = np.array([value is not None for value in values], bool)
        valid = pa.py_buffer(np.packbits(there, bitorder="little").tobytes())
    if dtype != pa.string():
        filled: NDArray[Any] = np.array([value or 0 for value in values], _NUMPY[dtype])
        content = [np.packbits(filled, bitorder="little") if dtype == pa.bool_() else filled]
    else:
        texts = values if valid is None else [value or "" for value in values]
        if (whole := "".join(texts)).isascii():  # a million names, encoded at once
            lengths, encoded = map(len, texts), whole.encode()
        else:
            # A file's name may be no text (a lone surrogate): it must not end the command.
            parts = [text.encode(errors="backslashreplace") for text in texts]
            lengths, encoded = map(len, parts), b"".join(parts)
        ends = np.zeros(len(texts) + 1, np.int32)
        np.cumsum(np.fromiter(lengths, np.int32, len(texts)), out=ends[1:])
        content = [ends, np.frombuffer(encoded, np.uint8)]
    buffers = [valid, *(pa.py_buffer(one.tobytes()) for one in content)]
    return pa.Array.from_buffers(dtype, len(values), buffers)


def joined(tables: Iterable[pa.Table]) -> pa.Table:
    """One table of several, in the order of units; facts that a table lacks are null there."""
    empty = pa.table({name: array_of([], dtype) for name, dtype in FIELDS.items()})
    whole = pa.concat_tables([empty, *tables], promote_options="default")
    keys = numbers_in(whole, "key")
    if (keys[1:] <= keys[:-1]).any():
        whole = whole.take(array_of(np.argsort(keys, kind="stable"), pa.int64()))
    return whole.combine_chunks()


def numbers_in(table: pa.Table, column: str) -> NDArray[np.int64]:
    """A column of whole numbers, none of which is null, as an array of the bytes as they lie."""
    return as_they_lie(table[column].combine_chunks(), np.int64)


def as_they_lie(column: pa.Array, dtype: type[np.generic]) -> NDArray[Any]:
    """The numbers of a column without nulls. Not by its ``to_numpy``: see ``array_of``."""
    if not len(column):
        return np.zeros(0, dtype)
    return np.frombuffer(column.buffers()[1], dtype)[column.offset :][: len(column)]


def floats_in(column: pa.Array) -> NDArray[np.float64]:
    """The numbers of a column; NaN for null."""
    numbers = as_they_lie(column.cast(pa.float64(), safe=False), np.float64)
    if not column.null_count:
        return numbers
    bits = np.unpackbits(np.frombuffer(column.buffers()[0], np.uint8), bitorder="little")
    return np.where(bits[column.offset :][: len(column)], numbers, math.nan)


def among(wanted: NDArray[np.int64], keys: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which of the keys ``wanted`` are among ``keys``, which ascend."""
    if not len(keys):
        return np.zeros(len(wanted), bool)
    return keys[np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)] == wanted
