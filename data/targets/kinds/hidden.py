"""``hidden``: the output matrix's input, from which every probability can be computed.

On disk: ``hidden`` int16 [P,H] times ``hidden_scale`` float32 [P]; the matrix is stored once in
``head.safetensors`` (``head.py``).
"""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from rekindle.data.errors import CacheFormatError
from rekindle.data.targets.codec import Columns, Floats
from rekindle.data.targets.codec_compact import Widths
from rekindle.data.targets.head import StoredHead, decode_hidden
from rekindle.data.targets.kinds.dense import Dense


class Hidden(Dense):
    """The teacher's final hidden states."""

    name = "hidden"
    template = "hidden states of {hidden_size} values"
    needs = ("vocabulary_size", "hidden_size")
    has_head = True

    def distribution_columns(self) -> Widths:
        """Return the columns of what is kept, as they are used."""
        return {"hidden": (pa.int16(), self.info.hidden_size), "hidden_scale": (pa.float32(), None)}

    def log_probs(self, columns: Columns, head: StoredHead | None) -> Floats:
        """Return the log-probabilities [P,V] at τ = 1."""
        assert head is not None
        log_probs = head.log_probs(decode_hidden(columns["hidden"], columns["hidden_scale"]))
        if np.isnan(log_probs).any():  # finite numbers, but too large
            raise CacheFormatError(
                f"the hidden states of teacher {self.info.name!r} give no probabilities"
            )
        return log_probs

    def problems(self, columns: Columns) -> Iterator[str]:
        """Yield what is wrong with columns that Rekindle cannot have written."""
        if not np.isfinite(columns["hidden_scale"]).all():
            yield "NaN or infinity in 'hidden_scale'"
