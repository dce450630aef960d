"""The compact profile of the default codec: the same integers, arranged so that zstd packs them.

For cold storage and transfer. Lossless: ``from_compact`` gives back every column of ``to_compact``.
NumPy in, NumPy out; it compresses nothing itself and knows no file. One call takes the positions of
one record batch, which is read as a whole: P positions, K candidates, T temperatures. Every column
is uint8 [P,w] with w fixed by V, K and T, but holds *streams*: all positions' first bytes, then all
second ones, and so on. Streams that end early are filled up with zeros.

=================  ============  ================================================================
column             w             meaning
=================  ============  ================================================================
``ids_table``      4 + B·⌈K/4⌉   D (4 bytes), the number of ids that occur at least four times in
                                 the batch; then they, by falling number of bits of their count,
                                 then by id: differences of neighbours mod 2^(16 + b) in B byte
                                 streams, low bytes first
``ids_class``      K             per candidate s. Its place r is that of its id in the table, D +
                                 its id when it is not there; r + 16 = (16 + s mod 16)·2^(s div 16)
                                 + rest. First candidates first
``ids_rest``       ⌈K·R/8⌉       the rests, (s div 16) bits each, as one bit stream, high bits
                                 first, in the order of ``ids_class``
``values_head``    min(K, 8)     differences along K mod 256, first candidates first
``values_rest``    K − 8         the others (only when K > 8)
``scalars_low``    3 + T         low bytes of ``log_prob_max``, of ``log_prob_min`` less it mod
                                 2^16, of ``entropy`` and ``tail_log_odds``
``scalars_high``   3             high bytes of the first three
``tails_high``     T             high bytes of ``tail_log_odds``
``small``          6 (8)         both bytes of ``positions`` less the one before, both of
                                 ``gold_log_prob`` less its forecast, all of ``gold_rank`` (4 when
                                 V > 65,536), the differences mod 2^16; mostly small numbers
=================  ============  ================================================================

b = bits of an id above 16, B = 2 (3 when b > 0), R = 13 + b (at most 15), T ≥ 1. The forecast of
``gold_log_prob`` is what the values say of the candidate of that rank, and ``log_prob_min`` for
lower ranks. All is integer arithmetic: the same on every machine.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rekindle.data.errors import CacheFormatError
from rekindle.data.storage.shards import ROWS_PER_BATCH
from rekindle.data.targets.codec import (
    Columns,
    decode_ids,
    high_bytes,
    high_planes,
    pack_planes,
)
from rekindle.data.targets.schema import POSITIONED_SCALARS, rank_dtype

# The first candidates' gaps are much wider: they get a column, and so code tables, of their own.
HEAD_SIZE = 8
MANTISSA = 16  # classes per power of two; zstd gives each class a code by its frequency
LARGEST_VOCABULARY = 2**19  # largest vocabulary whose classes fit a byte
LARGEST_TABLE = 2**18
POSITIONS_PER_BATCH = 4096
MIN_COUNT = 4  # a rarer id costs more in the table than written out

Bytes = NDArray[np.uint8]
Widths = dict[str, tuple[pa.DataType, int | None]]  # name -> value type, width (None: a scalar)
DEFAULT_COLUMNS = {
    *POSITIONED_SCALARS,
    "ids",
    "ids_high",
    "values",
    "log_prob_max",
    "log_prob_min",
    "tail_log_odds",
}


def compact_columns(columns: Widths, vocabulary_size: int) -> Widths:
    """Return name -> (value type, width) after ``to_compact``, from the same for the default
    columns.
    """
    k, temperatures = columns["ids"][1], columns["tail_log_odds"][1]
    assert k is not None
    assert temperatures is not None
    widths = _widths(k, temperatures, vocabulary_size)
    others = {name: column for name, column in columns.items() if name not in DEFAULT_COLUMNS}
    return {name: (pa.uint8(), width) for name, width in widths.items()} | others


def _widths(k: int, temperatures: int, vocabulary_size: int) -> dict[str, int]:
    """Return the columns and their bytes per position."""
    if vocabulary_size > LARGEST_VOCABULARY:
        raise ValueError(f"compact ids need V ≤ {LARGEST_VOCABULARY:,}, not {vocabulary_size:,}")
    widths = {
        "ids_table": 4 + -(-k // MIN_COUNT) * _id_bytes(vocabulary_size),
        "ids_class": k,
        "ids_rest": -(-k * _largest_shift(vocabulary_size) // 8),
        "values_head": min(k, HEAD_SIZE),
        "values_rest": k - HEAD_SIZE,
        "scalars_low": 3 + temperatures,
        "scalars_high": 3,
        "tails_high": temperatures,
        "small": 8 if vocabulary_size > 65_536 else 6,
    }
    return {name: width for name, width in widths.items() if width > 0}


def _id_bytes(vocabulary_size: int) -> int:
    return 3 if high_planes(vocabulary_size) else 2


def _largest_shift(vocabulary_size: int) -> int:
    return min(13 + high_planes(vocabulary_size), 15)  # of the largest id beside the largest table


def compact_rows(positions_per_sequence: float) -> int:
    """Return the sequences per record batch: about POSITIONS_PER_BATCH, a power of two.

    Smaller batches compress worse; of larger ones a shuffled reader uses little.
    """
    rows = 1
    while rows < ROWS_PER_BATCH and 2 * rows * positions_per_sequence <= POSITIONS_PER_BATCH:
        rows *= 2
    return rows


def to_compact(columns: Mapping[str, NDArray], vocabulary_size: int) -> Columns:
    """Return the compact columns of one record batch's default columns; other columns stay.

    Bits of ``ids_high`` beyond the planes are assumed to be zero, as ``codec.encode`` leaves them.
    """
    ids = decode_ids(columns, vocabulary_size)
    values = columns["values"]
    gaps = np.diff(values, axis=1, prepend=np.uint8(0)).T  # uint8: wraps
    widths = _widths(ids.shape[1], columns["tail_log_odds"].shape[1], vocabulary_size)
    words, small = _scalars(columns)
    streams = _id_streams(ids, vocabulary_size) | {
        "values_head": [gaps[:HEAD_SIZE]],
        "values_rest": [gaps[HEAD_SIZE:]],
        "scalars_low": [word[:, 0] for word in words],
        "scalars_high": [word[:, 1] for word in words[:3]],
        "tails_high": [word[:, 1] for word in words[3:]],
        "small": [planes.T for planes in small],
    }
    others = {name: column for name, column in columns.items() if name not in DEFAULT_COLUMNS}
    return {n: _column(streams[n], len(ids), width) for n, width in widths.items()} | others


def _column(streams: Sequence[Bytes], positions: int, width: int) -> Bytes:
    """Return one column [P,w] made of consecutive streams, padded with zeros."""
    out = np.zeros(positions * width, np.uint8)
    flat = np.concatenate([stream.reshape(-1) for stream in streams])
    out[: len(flat)] = flat
    return out.reshape(positions, width)


def _id_streams(ids: NDArray[np.int64], vocabulary_size: int) -> dict[str, list[Bytes]]:
    flat = ids.T.reshape(-1)
    counts = np.bincount(flat)
    frequent = np.flatnonzero(counts >= MIN_COUNT)
    count_bits = np.frexp(counts[frequent])[1]
    table = frequent[np.argsort(-count_bits, kind="stable")]
    table = table[:LARGEST_TABLE]
    steps = np.diff(table, prepend=0) % (1 << 16 + high_planes(vocabulary_size))
    size = np.full(min(len(ids), 1), len(table), "<u4").view(np.uint8)  # nowhere to go if P = 0
    table_streams = [size, *_byte_planes(steps, _id_bytes(vocabulary_size)).T]
    place_of = np.arange(len(counts)) + len(table)
    place_of[table] = np.arange(len(table))
    present = np.flatnonzero(counts)
    places = place_of[present] + MANTISSA
    shift = np.frexp(places)[1] - 5
    class_of = np.zeros(len(counts), np.uint8)
    rest_of = np.zeros(len(counts), np.uint16)
    class_of[present] = (shift << 4) + (places >> shift) - MANTISSA
    rest_of[present] = places & ((1 << shift) - 1)
    classes = class_of[flat]
    rests = _pack_rests(classes >> 4, rest_of[flat])
    return {"ids_table": table_streams, "ids_class": [classes], "ids_rest": [rests]}


def _byte_planes(numbers: NDArray, count: int) -> Bytes:
    """Return the lowest ``count`` bytes [N,count] of integers, low bytes first."""
    wide = np.ascontiguousarray(numbers, dtype="<i8")
    return wide.view(np.uint8).reshape(len(wide), 8)[:, :count]


def _pack_rests(shifts: NDArray[np.integer], rests: NDArray[np.uint16]) -> Bytes:
    """Pack numbers of ``shifts`` bits each, high bits first, into one bit stream."""
    starts, end = _bit_starts(shifts)
    # A number touches at most three bytes. No two numbers share a bit, so adding joins them.
    window = rests.astype(np.int64) << (24 - (starts & 7) - shifts)
    out = np.zeros(end // 8 + 3)
    for byte in range(3):
        part = (window >> (16 - 8 * byte)) & 0xFF
        out += np.bincount((starts >> 3) + byte, part, minlength=len(out))
    return out[: -(-end // 8)].astype(np.uint8)


def _unpack_rests(shifts: NDArray[np.integer], packed: Bytes) -> NDArray[np.int64]:
    starts, _ = _bit_starts(shifts)
    stream = np.concatenate([packed, np.zeros(3, np.uint8)]).astype(np.int64)
    window = (stream[:-2] << 16) | (stream[1:-1] << 8) | stream[2:]
    rests: NDArray[np.int64] = window[starts >> 3] >> (24 - (starts & 7) - shifts)
    return rests & ((1 << shifts.astype(np.int64)) - 1)


def _bit_starts(shifts: NDArray[np.integer]) -> tuple[NDArray[np.int64], int]:
    ends = np.cumsum(shifts, dtype=np.int64)
    return ends - shifts, int(ends[-1]) if len(ends) else 0


def _scalars(columns: Mapping[str, NDArray]) -> tuple[list[Bytes], list[Bytes]]:
    """Return bytes [P,2] of each word and bytes [P,2 or 4] of the small numbers, in the order of
    the table above.
    """
    best = columns["log_prob_max"].astype(np.int64)
    worst, rank = columns["log_prob_min"], columns["gold_rank"]
    words = [best, worst - best, columns["entropy"], *columns["tail_log_odds"].T]
    steps = np.diff(columns["positions"].astype(np.int64), prepend=0)
    surprise = columns["gold_log_prob"] - _forecast(columns["values"], best, worst, rank)
    small = [_byte_planes(steps, 2), _byte_planes(surprise, 2), _byte_planes(rank, rank.itemsize)]
    return [_byte_planes(word, 2) for word in words], small


def _forecast(
    values: Bytes, best: NDArray[np.int64], worst: NDArray[np.uint16], rank: NDArray
) -> NDArray[np.int64]:
    """Return −log-prob of the candidate of that rank, or of the last one for lower ranks, in 1/1024
    nat.
    """
    at = np.minimum(rank.astype(np.int64), values.shape[1] - 1)
    value = np.take_along_axis(values, at[:, None], axis=1)[:, 0].astype(np.int64)
    return best + (value * (worst - best) * 2 + 255) // 510


def fill_missing_scalars(columns: Columns, vocabulary_size: int) -> Columns:
    """Fill in scalars that imported targets may lack with values that compress to nothing; the
    reader drops them again.
    """
    count = len(columns["log_prob_max"])
    placeholders = {
        "gold_rank": np.zeros(count, rank_dtype(vocabulary_size)),
        "gold_log_prob": columns["log_prob_max"],  # the forecast for rank 0
        "entropy": np.zeros(count, np.uint16),
    }
    return placeholders | columns


def from_compact(columns: Mapping[str, NDArray], vocabulary_size: int) -> Columns:
    """Return the default columns of one record batch; the inverse of ``to_compact``.

    Raise CacheFormatError if the shape, type or content of the columns cannot come from there.
    Bytes that could come from there are decoded; the caller judges the values, as with any codec.
    """
    k, positions = _check_shapes(columns, vocabulary_size)
    ids = _read_ids(columns, positions, k, vocabulary_size)
    gaps = [columns[name].reshape(-1) for name in ("values_head", "values_rest") if name in columns]
    stream = np.concatenate(gaps).reshape(k, positions)
    values = np.ascontiguousarray(np.cumsum(stream, axis=0, dtype=np.uint8).T)
    scalars = _read_scalars(columns, values, vocabulary_size)
    out: Columns = {"positions": scalars["positions"], "ids": (ids & 0xFFFF).astype(np.uint16)}
    if high_bytes(vocabulary_size, k):
        out["ids_high"] = pack_planes(ids >> 16, high_planes(vocabulary_size))
    out |= {"values": values} | scalars
    return out | {n: c for n, c in columns.items() if n not in _widths(k, 1, vocabulary_size)}


def _check_shapes(columns: Mapping[str, NDArray], vocabulary_size: int) -> tuple[int, int]:
    """Return K and P; raise CacheFormatError if the columns disagree about them."""
    for name in ("ids_class", "tails_high"):
        if name not in columns or columns[name].ndim != 2:
            raise CacheFormatError(f"compact targets need the column {name!r} as [P,w]")
    positions, k = columns["ids_class"].shape
    temperatures = columns["tails_high"].shape[1]
    expected = _widths(k, temperatures, vocabulary_size)
    for name in {*expected, "values_rest"}:
        column = columns[name] if name in columns else np.zeros((positions, 0), np.uint8)
        shape = (positions, expected.get(name, 0))
        if column.shape != shape or column.dtype != np.uint8 or k < 1:
            raise CacheFormatError(
                f"column {name!r} of compact targets is {column.dtype}{list(column.shape)}, "
                f"not uint8{list(shape)}"
            )
    return k, positions


def _read_ids(
    columns: Mapping[str, NDArray], positions: int, k: int, vocabulary_size: int
) -> NDArray[np.int64]:
    classes = columns["ids_class"].reshape(-1)
    shifts = classes >> 4
    if shifts.max(initial=0) > _largest_shift(vocabulary_size):
        raise CacheFormatError("column 'ids_class' has classes that its vocabulary cannot have")
    rests = _unpack_rests(shifts, columns["ids_rest"].reshape(-1))
    places = (((classes & 15).astype(np.int64) + MANTISSA) << shifts) + rests - MANTISSA
    table = _read_table(columns["ids_table"].reshape(-1), vocabulary_size)
    ids = places - len(table)
    if ids.max(initial=0) >= 1 << 16 + high_planes(vocabulary_size):
        raise CacheFormatError("column 'ids_class' has places that its vocabulary cannot have")
    in_table = ids < 0
    ids[in_table] = table[places[in_table]]
    return ids.reshape(k, positions).T


def _read_table(stream: Bytes, vocabulary_size: int) -> NDArray[np.int64]:
    size, width = int.from_bytes(stream[:4].tobytes(), "little"), _id_bytes(vocabulary_size)
    if 4 + size * width > max(len(stream), 4):
        raise CacheFormatError("column 'ids_table' has no room for its table of ids")
    planes = stream[4 : 4 + size * width].reshape(width, size).astype(np.int64)
    steps = (planes << (8 * np.arange(width))[:, None]).sum(axis=0)
    table: NDArray[np.int64] = np.cumsum(steps) % (1 << 16 + high_planes(vocabulary_size))
    return table


def _read_scalars(columns: Mapping[str, NDArray], values: Bytes, vocabulary_size: int) -> Columns:
    positions = len(values)

    def planes(name: str) -> NDArray[np.uint32]:
        column = columns[name]
        return column.reshape(column.shape[1], positions).astype(np.uint32)

    high = np.concatenate([planes("scalars_high"), planes("tails_high")])
    words = (planes("scalars_low") | high << 8).astype(np.uint16)
    small = planes("small")
    steps, surprise = (small[0:4:2] | small[1:4:2] << 8).astype(np.uint16)
    rank = small[4] | small[5] << 8
    if vocabulary_size > 65_536:
        rank = rank | small[6] << 16 | small[7] << 24
    best = words[0]
    worst = best + words[1]  # uint16: wraps
    forecast = _forecast(values, best.astype(np.int64), worst, rank)
    return {
        "positions": np.cumsum(steps, dtype=np.uint16),
        "log_prob_max": best,
        "log_prob_min": worst,
        "tail_log_odds": np.ascontiguousarray(words[3:].T).view(np.int16),
        "gold_log_prob": surprise + forecast.astype(np.uint16),
        "gold_rank": rank if vocabulary_size > 65_536 else rank.astype(np.uint16),
        "entropy": words[2],
    }
