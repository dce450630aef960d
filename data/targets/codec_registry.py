"""The codecs of candidates by name, and how each arranges the columns of a record batch."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rekindle.data.targets import codec_compact
from rekindle.data.targets.codec import (
    STEP,
    Columns,
    Floats,
    decode_log_probs,
    encode,
    high_bytes,
)
from rekindle.data.targets.codec_compact import Widths
from rekindle.data.targets.codec_precise import VALUE_STEP, decode_precise, encode_precise

BYTE = pa.uint8()
T = TypeVar("T")


def _unchanged(columns: T, vocabulary_size: int) -> T:
    return columns


@dataclass(frozen=True)
class Codec:
    """How candidates become integers, and how a record batch's columns are arranged on disk."""

    encode: Callable[[NDArray, Floats, Floats, int], Columns] = encode
    decode: Callable[[Columns, float, int, int | None], tuple[Floats, Floats]] = decode_log_probs
    value_type: pa.DataType = BYTE
    stores_span: bool = True  # values are fractions of the row's span, so log_prob_min is stored
    stored_columns: Callable[[Widths, int], Widths] = _unchanged  # (columns as used, V) -> on disk
    pack: Callable[[Columns, int], Columns] = _unchanged
    unpack: Callable[[Columns, int], Columns] = _unchanged  # the inverse of `pack`
    per_position: str = "positions"  # a column with an entry for every position on disk
    # whether shards are compressed; record batches are then small and read as a whole
    is_compressed: bool = False
    largest_vocabulary: int = 2**31

    def error_bound(self, span: NDArray[np.float64], temperature: float) -> NDArray[np.float64]:
        """Return the largest error [P] in nats of a log-probability at τ, as the codecs' files
        state it.

        ``span`` [P]: the difference between the candidates' largest and smallest log-probability at
        τ = 1.
        """
        step = (
            2 * (span / 510 + 1 / STEP) if self.stores_span else np.full_like(span, 1 / VALUE_STEP)
        )
        bound: NDArray[np.float64] = step / temperature + 0.5 / STEP
        return bound

    def widths(self, vocabulary_size: int, k: int, temperatures: int) -> Widths:
        """Return name -> (value type, width) of the candidates' columns."""
        high = high_bytes(vocabulary_size, k)
        columns: Widths = {"ids": (pa.uint16(), k)}
        columns |= {"ids_high": (pa.uint8(), high)} if high else {}
        columns |= {"values": (self.value_type, k), "log_prob_max": (pa.uint16(), None)}
        columns |= {"log_prob_min": (pa.uint16(), None)} if self.stores_span else {}
        return columns | {"tail_log_odds": (pa.int16(), temperatures)}


CODECS = {
    "default": Codec(),
    "precise": Codec(encode_precise, decode_precise, pa.uint16(), stores_span=False),
    "compact": Codec(
        stored_columns=codec_compact.compact_columns,
        pack=codec_compact.to_compact,
        unpack=codec_compact.from_compact,
        per_position="ids_class",
        is_compressed=True,
        largest_vocabulary=codec_compact.LARGEST_VOCABULARY,
    ),
}
