"""Cut rows out of list columns and join them to a batch: the inner loop of reading.

Nothing here knows what the columns mean; the readers check their input. Rows are cut as memory
views and joined as bytes: one copy, and per piece a third of the cost of slicing and concatenating
NumPy arrays. A batch consists of hundreds of pieces of 1 to 32 kB.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from typing import ClassVar, overload

import numpy as np
from numpy.typing import NDArray

from rekindle.data.storage.commits import ROWS_PER_BATCH


class RowLists:
    """List columns of one record batch that share their list offsets [R+1]."""

    def __init__(self, offsets: NDArray[np.int32], columns: dict[str, NDArray]):
        self.offsets, self.columns = offsets, columns
        self._ends = np.ascontiguousarray(offsets).data
        self.views = [np.ascontiguousarray(column).data for column in columns.values()]

    def cut(self, row: int) -> "Cut":
        """Return the location of the row's entries."""
        return self, self._ends[row], self._ends[row + 1]


Cut = tuple[RowLists, int, int]  # a row's entries: record batch, start, end
Place = tuple[int, int]  # a corpus shard and a row in it
BatchKey = tuple[int, int, int | None]  # shard, record batch, replica
# list offsets [R+1], and the columns they index
Flat = tuple[NDArray[np.int32], dict[str, NDArray]]


class RowReader(ABC):
    """Cuts rows out of the record batches of a set of shards, each read when first needed."""

    rows_per_batch = ROWS_PER_BATCH
    recomputed: ClassVar[tuple[str, ...]] = ()  # cached properties that are not pickled

    def __init__(self) -> None:
        self._lists: dict[BatchKey, RowLists] = {}

    def __getstate__(self) -> dict[str, object]:
        """Pickle what it knows of its shards, without their bytes: another process opens
        the files.
        """
        known = {name: value for name, value in vars(self).items() if name not in self.recomputed}
        return known | {"_lists": {}, "_open": {}}

    def cut(self, place: Place, replica: int | None = None) -> Cut:
        """Return the location of the entries of one row of the corpus."""
        shard, row = place
        index, local = divmod(row, self.rows_per_batch)
        found = self._lists.get((shard, index, replica))  # called for every row of every batch
        return (found or self.row_lists(shard, index, replica)).cut(local)

    def row_lists(self, shard: int, index: int, replica: int | None = None) -> RowLists:
        """Return the list columns of one record batch, checked when first used."""
        key = (shard, index, replica)
        found = self._lists.get(key)
        if found is None:
            found = RowLists(*self._read_lists(*key))
            self._keep(key, found)
        return found

    def _keep(self, key: BatchKey, lists: RowLists) -> None:
        self._lists[key] = lists

    @abstractmethod
    def _read_lists(self, shard: int, index: int, replica: int | None) -> Flat: ...


def join_cuts(cuts: Sequence[Cut], excluded: Collection[str] = ()) -> dict[str, NDArray]:
    """Return the columns of one or more rows, except ``excluded``, concatenated and copied."""
    size = sum([last - first for _, first, last in cuts])
    out = {}
    for number, (name, column) in enumerate(cuts[0][0].columns.items()):
        if name in excluded:
            continue
        content = bytearray().join([lists.views[number][a:b] for lists, a, b in cuts])
        out[name] = np.ndarray((size, *column.shape[1:]), column.dtype, content)
    return out


def cut_lengths(cuts: Sequence[Cut]) -> NDArray[np.int64]:
    """Return the number of entries of each row."""
    return np.array([last - first for _, first, last in cuts], np.int64)


def pad_cuts(
    cuts: Sequence[Cut], lengths: NDArray[np.int64], name: str, fill: int
) -> NDArray[np.int32]:
    """Return rows of the list column ``name`` as [B, longest], padded with ``fill``."""
    width = int(lengths.max(initial=1))
    if cuts and lengths.tolist() == [width] * len(cuts):
        others = cuts[0][0].columns.keys() - {name}
        return join_cuts(cuts, others)[name].reshape(-1, width).astype(np.int32, copy=False)
    out = np.full((len(cuts), width), fill, dtype=np.int32)
    for row, (lists, first, last) in enumerate(cuts):
        out[row, : last - first] = lists.columns[name][first:last]
    return out


class RowTexts(Sequence[str | None]):
    """A text per row, read when it is asked for; training steps need none."""

    def __init__(self, read: Callable[[Place], str | None], places: Sequence[Place]):
        self._read, self._places = read, places

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> str | None: ...
    @overload
    def __getitem__(self, index: slice) -> "RowTexts": ...
    def __getitem__(self, index: int | slice) -> "str | RowTexts | None":
        if isinstance(index, slice):
            return RowTexts(self._read, self._places[index])
        return self._read(self._places[index])

    def __reduce__(self) -> tuple[type[list], tuple[list[str | None]]]:
        """Pickle the texts themselves, so that the other process needs no cache."""
        return list, (list(self),)

    def __repr__(self) -> str:
        return repr(list(self))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)
