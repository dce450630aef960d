"""``token``: token classifiers: ``logits`` float32 [P,C] at the positions that begin a word."""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from rekindle.data.targets.codec import Columns
from rekindle.data.targets.codec_compact import Widths
from rekindle.data.targets.kinds.base import TaskKind


class TokenLogits(TaskKind):
    """Logits of C classes per position."""

    name = "token"
    tasks = ("token_classification",)
    reveals_text = False

    def memory_columns(self) -> Widths:
        """Return the columns as they are used, without ``positions``."""
        return {"logits": (pa.float32(), self.info.num_labels)}

    def problems(self, columns: Columns) -> Iterator[str]:
        """Yield what is wrong with columns that Rekindle cannot have written."""
        if not np.isfinite(columns["logits"]).all():
            yield "NaN or infinity in 'logits'"
