"""``sequence``: classifiers and regressors (C = 1) of whole sequences or sentence pairs.

On disk, per row: ``logits`` float32 [C], null where the teacher does not apply; with Monte-Carlo
passes also ``mc_probs`` float32 [C].
"""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rekindle.data.errors import CacheFormatError
from rekindle.data.storage.columns import offsets_of
from rekindle.data.storage.shards import rows_in_batches
from rekindle.data.targets.codec import Columns
from rekindle.data.targets.codec_compact import Widths
from rekindle.data.targets.kinds.base import TaskKind


class SequenceLogits(TaskKind):
    """Logits of C classes per sequence."""

    name = "sequence"
    tasks = ("sequence_classification", "regression")
    is_copied_on_read = True
    bytes_per_position = 0  # there are no positions
    per_sequence = True
    reveals_text = False

    def memory_columns(self) -> Widths:
        """Return the columns as they are used."""
        names = ["logits"] + (["mc_probs"] if self.info.monte_carlo_passes else [])
        return dict.fromkeys(names, (pa.float32(), self.info.num_labels))

    def _fields(self) -> list[pa.Field]:
        return [pa.field(n, pa.list_(t, width)) for n, (t, width) in self.memory_columns().items()]

    def batches(
        self, schema: pa.Schema, digests: list[str], rows: NDArray[np.int64], columns: Columns
    ) -> Iterator[pa.RecordBatch]:
        """Yield the record batches of a unit from columns [R,C]; ``rows`` [R] have a target, the
        others become null.
        """
        absent, width = ~np.isin(np.arange(len(digests)), rows), self.info.num_labels or 0
        wide = {name: np.zeros((len(digests), width), np.float32) for name in self.memory_columns()}
        for name, values in wide.items():
            values[~absent] = columns[name] if len(rows) else 0
        for first, last in rows_in_batches(len(digests)):
            arrays = [pa.array(digests[first:last], pa.string())]
            for values in wide.values():
                flat, missing = values[first:last].reshape(-1), pa.array(absent[first:last])
                arrays.append(pa.FixedSizeListArray.from_arrays(flat, width, mask=missing))
            yield pa.record_batch(arrays, schema=schema)

    def read(self, batch: pa.RecordBatch) -> tuple[NDArray[np.int32], Columns]:
        """Return offsets [R+1] that rise by one after each row with a target, and those targets."""
        present = batch["logits"].is_valid().to_numpy(zero_copy_only=False)
        columns: Columns = {}
        for name in batch.schema.names[1:]:
            array = batch[name]
            flat = array.values.to_numpy(zero_copy_only=False)
            start = array.offset * array.type.list_size
            values = flat[start : start + len(array) * array.type.list_size]
            columns[name] = values.reshape(len(array), -1)[present]
            has_same_nulls = array.null_count == batch["logits"].null_count
            if not np.isfinite(columns[name]).all() or not has_same_nulls:
                raise CacheFormatError(f"column {name!r} has NaN, infinity or other nulls")
        return offsets_of(present.astype(np.int64)), columns
