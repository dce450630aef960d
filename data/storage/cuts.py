"""Cuts rows out of list columns and joins them to a batch: the inner loop of reading.

Nothing here knows what the columns mean, nor checks them.

Rows are cut as memory views and joined as bytes: one copy, and per piece a third of what it costs
to slice NumPy arrays and concatenate them. A batch is hundreds of pieces of 1 to 32 kB.
"""

from collections.abc import Collection, Sequence
from typing import overload

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray


class RowLists:
    """List columns of one record batch that share their list offsets [R+1]."""

    def __init__(self, offsets: NDArray[np.int32], columns: dict[str, NDArray]):
        self.offsets, self.columns = offsets, columns
        self._ends = np.ascontiguousarray(offsets).data
        self.views = [np.ascontiguousarray(column).data for column in columns.values()]

    def cut(self, row: int) -> "Cut":
        """Where the row's entries lie."""
        return self, self._ends[row], self._ends[row + 1]


Cut = tuple[RowLists, int, int]  # a row's entries: in which record batch, from, to


def joined(cuts: Sequence[Cut], without: Collection[str] = ()) -> dict[str, NDArray]:
    """The columns of one row or more, but those ``without``, one after another, copied."""
    size = sum([last - first for _, first, last in cuts])
    out = {}
    for number, (name, column) in enumerate(cuts[0][0].columns.items()):
        if name in without:
            continue
        content = bytearray().join([lists.views[number][a:b] for lists, a, b in cuts])
        out[name] = np.ndarray((size, *column.shape[1:]), column.dtype, content)
    return out


def pad_cuts(cuts: Sequence[Cut], lengths: NDArray[np.int64], fill: int) -> NDArray[np.int32]:
    """Rows of one list column as [B, longest], ``fill`` at the end."""
    width = int(lengths.max(initial=1))
    if lengths.tolist() != [width] * len(cuts):
        out = np.full((len(cuts), width), fill, dtype=np.int32)
        for row, (lists, first, last) in enumerate(cuts):
            (column,) = lists.columns.values()
            out[row, : last - first] = column[first:last]
        return out
    (flat,) = joined(cuts).values() if cuts else (np.zeros(0, np.int32),)
    return flat.reshape(-1, width)


class Texts:
    """A string column of one record batch, decoded a value at a time."""

    def __init__(self, column: pa.StringArray):
        _, offsets, content = column.buffers()
        ends = np.frombuffer(offsets, np.int32, len(column) + 1, 4 * column.offset)
        self._ends, self._content = ends.data, memoryview(content or b"")
        self._missing: list[bool] = column.is_null().to_pylist() if column.null_count else []

    def __getitem__(self, row: int) -> str | None:
        if self._missing and self._missing[row]:
            return None
        return str(self._content[self._ends[row] : self._ends[row + 1]], "utf-8")


class RowTexts(Sequence[str | None]):
    """A text of each of some rows, decoded when it is asked for; a training step asks for none."""

    def __init__(self, places: list[tuple[Texts, int]]):
        self._places = places

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> str | None: ...
    @overload
    def __getitem__(self, index: slice) -> "RowTexts": ...
    def __getitem__(self, index: int | slice) -> "str | RowTexts | None":
        if isinstance(index, slice):
            return RowTexts(self._places[index])
        column, row = self._places[index]
        return column[row]

    def __repr__(self) -> str:
        return repr(list(self))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]
