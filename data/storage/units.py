"""The names of units of work, their numeric order, and tables with a row per unit.

A name has five digits, or more if the number needs them; sorted as text, 100000 would come before
99999. Recorded facts that are numbers, or counts by name, become columns. A column's name includes
its type, so a fact that is an integer in one record and a float in another has two columns.
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
_REPLICAS = 1 << 20  # keys per shard: one for the unmasked shard, then one for each replica
NOT_A_UNIT = 1 << 62  # above any unit's key; for names that are not ours


def unit_of(shard: int, replica: int | None = None) -> str:
    """Return the name of a unit of work: a corpus shard, or one masked replica of it."""
    return f"{shard:05d}" if replica is None else f"{shard:05d}-r{replica:03d}"


def place_of(unit: str) -> UnitPlace | None:
    """Return the shard and replica of a unit's name; None for a name that is not ours."""
    if (match := _UNIT.fullmatch(unit)) is None:
        return None
    place = int(match[1]), None if match[2] is None else int(match[2])
    return place if unit_of(*place) == unit else None


def unit_key(unit: str) -> int:
    """Return the unit's name as a sortable number; NOT_A_UNIT for a name that is not ours."""
    if (place := place_of(unit)) is None:
        return NOT_A_UNIT
    return place[0] * _REPLICAS + (0 if place[1] is None else place[1] + 1)


def unit_keys(shards: NDArray[np.int64], replica: int | None) -> NDArray[np.int64]:
    """Return the keys of one replica of each of those shards."""
    return shards * _REPLICAS + (0 if replica is None else replica + 1)


def shards_among(keys: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the shards whose units, without replicas, are among those keys."""
    return keys[(keys % _REPLICAS == 0) & (keys < NOT_A_UNIT)] // _REPLICAS


def replicas_of(keys: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the replica of each key; −1 for none."""
    return keys % _REPLICAS - 1


def sort_key(unit: str) -> tuple[int, str]:
    """Return the sort key of a unit: shard, replica; names that are not ours come last."""
    return unit_key(unit), unit


# --- tables ---------------------------------------------------------------------------------------

FIELDS = {
    "key": pa.int64(),  # of the unit, see `unit_key`
    "unit": pa.string(),
    "state": pa.string(),  # of the commit record, from a listing of the store
    "rows": pa.int64(),
    "bytes": pa.int64(),
    "sha256": pa.string(),
}
INT, FLOAT, JSON = "int:", "float:", "json:"  # prefixes of the columns of facts
_TYPES = {INT: pa.int64(), FLOAT: pa.float64(), JSON: pa.string()}
_NUMPY = {pa.int64(): np.int64, pa.float64(): np.float64, pa.bool_(): np.bool_}
INT64_LIMIT = 1 << 63


def column_type(column: str) -> pa.DataType | None:
    """Return the type of that column; None if there is no such column."""
    return FIELDS.get(column) or _TYPES.get(f"{column.partition(':')[0]}:")


def arrow_array(values: Sequence[Any] | NDArray[Any], dtype: pa.DataType) -> pa.Array:
    """Return ``values`` as an array, None as null. Avoids ``pa.array``, which spends a second on
    importing pandas.
    """
    validity = None
    if not isinstance(values, np.ndarray) and None in values:
        is_valid = np.array([value is not None for value in values], bool)
        validity = pa.py_buffer(np.packbits(is_valid, bitorder="little").tobytes())
    if dtype != pa.string():
        numbers: NDArray[Any] = np.array([value or 0 for value in values], _NUMPY[dtype])
        content = [np.packbits(numbers, bitorder="little") if dtype == pa.bool_() else numbers]
    else:
        texts = values if validity is None else [value or "" for value in values]
        if (joined := "".join(texts)).isascii():  # a million names, encoded at once
            lengths, encoded = map(len, texts), joined.encode()
        else:
            # A file's name may contain a lone surrogate, which must not end the command.
            parts = [text.encode(errors="backslashreplace") for text in texts]
            lengths, encoded = map(len, parts), b"".join(parts)
        offsets = np.zeros(len(texts) + 1, np.int32)
        np.cumsum(np.fromiter(lengths, np.int32, len(texts)), out=offsets[1:])
        content = [offsets, np.frombuffer(encoded, np.uint8)]
    buffers = [validity, *(pa.py_buffer(one.tobytes()) for one in content)]
    return pa.Array.from_buffers(dtype, len(values), buffers)


def join_tables(tables: Iterable[pa.Table]) -> pa.Table:
    """Join several tables in the order of units; facts that a table lacks become null."""
    empty = pa.table({name: arrow_array([], dtype) for name, dtype in FIELDS.items()})
    table = pa.concat_tables([empty, *tables], promote_options="default")
    keys = int_values(table, "key")
    if (keys[1:] <= keys[:-1]).any():
        table = table.take(arrow_array(np.argsort(keys, kind="stable"), pa.int64()))
    return table.combine_chunks()


def int_values(table: pa.Table, column: str) -> NDArray[np.int64]:
    """Return a column of integers without nulls as a view of its bytes."""
    return numpy_values(table[column].combine_chunks(), np.int64)


def numpy_values(column: pa.Array, dtype: type[np.generic]) -> NDArray[Any]:
    """Return the numbers of a column without nulls. Avoids ``to_numpy``: see ``arrow_array``."""
    if not len(column):
        return np.zeros(0, dtype)
    return np.frombuffer(column.buffers()[1], dtype)[column.offset :][: len(column)]


def float_values(column: pa.Array) -> NDArray[np.float64]:
    """Return the numbers of a column; NaN for null."""
    numbers = numpy_values(column.cast(pa.float64(), safe=False), np.float64)
    if not column.null_count:
        return numbers
    bits = np.unpackbits(np.frombuffer(column.buffers()[0], np.uint8), bitorder="little")
    return np.where(bits[column.offset :][: len(column)], numbers, math.nan)


def is_in(queries: NDArray[np.int64], sorted_keys: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return which of the keys ``queries`` are among the ascending ``sorted_keys``."""
    if not len(sorted_keys):
        return np.zeros(len(queries), bool)
    return (
        sorted_keys[np.minimum(np.searchsorted(sorted_keys, queries), len(sorted_keys) - 1)]
        == queries
    )
