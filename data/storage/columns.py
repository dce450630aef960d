"""Convert between NumPy and Arrow's nested columns, without copies and without Python lists."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rekindle.data.errors import CacheFormatError

Lists = tuple[NDArray[np.int32], NDArray]  # offsets [R+1] and the values they point into


def offsets_of(lengths: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int32]:
    """Return list offsets from list lengths. Raise ValueError beyond the 32 bits of
    Arrow's lists.
    """
    ends = np.cumsum(np.asarray(lengths, dtype=np.int64))
    if len(ends) and ends[-1] > np.iinfo(np.int32).max:
        raise ValueError(f"a record batch may hold at most 2^31 − 1 positions, not {ends[-1]:,}")
    return np.concatenate([[0], ends]).astype(np.int32)


def list_array(offsets: NDArray[np.int32], flat: NDArray) -> pa.ListArray:
    """Return ``list<T>`` from 1-D values, or ``list<fixed_size_list<T,K>>`` from 2-D
    values [P,K].
    """
    return pa.ListArray.from_arrays(pa.array(offsets), plain_array(flat))


def plain_array(values: NDArray) -> pa.Array:
    """Return ``T`` from 1-D values, ``fixed_size_list<T,K>`` from 2-D values."""
    if values.ndim == 1:
        return pa.array(values)
    flat = pa.array(np.ascontiguousarray(values).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, values.shape[1])


def list_type(dtype: pa.DataType, width: int | None = None) -> pa.DataType:
    """Return the Arrow type that ``list_array`` makes."""
    # The child field is called "item", Arrow's default, so that arrays and schema agree by name.
    return pa.list_(pa.list_(dtype, width) if width is not None else dtype)


def list_views(column: pa.ListArray, name: str) -> Lists:
    """Return offsets [R+1] and the values they point into: 1-D, or 2-D for fixed-size lists.

    Zero-copy. Raise CacheFormatError for nulls, and if the offsets do not ascend within the values.
    """
    offsets = column.offsets.to_numpy()
    values = column.values
    fixed = pa.types.is_fixed_size_list(values.type)
    inner = values.values if fixed else values
    if column.null_count or values.null_count or inner.null_count:
        raise CacheFormatError(f"column {name!r} has nulls")
    flat = inner.to_numpy(zero_copy_only=False)
    if fixed:
        width = values.type.list_size
        flat = flat[: len(values) * width].reshape(len(values), width)
    if offsets[0] < 0 or (np.diff(offsets) < 0).any() or offsets[-1] > len(flat):
        raise CacheFormatError(f"column {name!r} has list offsets outside its values")
    return offsets, flat


def flat_lists(
    batch: pa.RecordBatch, names: Sequence[str]
) -> tuple[NDArray[np.int32], dict[str, NDArray]]:
    """Return the list offsets [R+1], from 0, that some columns of a batch share, and their values.

    Zero-copy. Raise CacheFormatError if the columns do not share them.
    """
    columns: dict[str, NDArray] = {}
    shared: NDArray[np.int32] | None = None
    for name in names:
        offsets, flat = list_views(batch[name], name)
        if shared is not None and not np.array_equal(offsets, shared):
            raise CacheFormatError(f"column {name!r} has other list lengths than the others")
        shared = offsets
        columns[name] = flat[offsets[0] : offsets[-1]]
    assert shared is not None
    return shared - shared[0], columns


def ascend_within(
    offsets: NDArray[np.int32], positions: NDArray[np.integer], lengths: NDArray[np.int64]
) -> bool:
    """Return whether the positions of each list ascend and lie below its entry of ``lengths`` [R].

    ``offsets`` [R+1] point into ``positions``.
    """
    counts = np.diff(offsets)
    within = positions[offsets[0] : offsets[-1]].astype(np.int64)
    row = np.repeat(np.arange(len(counts)), counts)
    ascending = (np.diff(within) > 0) | (np.diff(row) > 0)
    return bool((within < np.repeat(lengths, counts)).all() and ascending.all())


def split_lists(batches: Sequence[pa.RecordBatch], name: str) -> list[NDArray]:
    """Return the lists of a list column over several record batches, as views."""
    out: list[NDArray] = []
    for batch in batches:
        offsets, flat = list_views(batch[name], name)
        out += [flat[a:b] for a, b in pairwise(offsets)]
    return out
