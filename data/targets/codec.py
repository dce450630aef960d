"""The default codec of vocabulary targets: integers only, format version 1. NumPy in, NumPy out.

Per stored position, candidates by falling probability (P positions, K candidates, T temperatures):

=================  ===================  =========================================================
column             type                 meaning
=================  ===================  =========================================================
``ids``            uint16 [P,K]         token id, low 16 bits
``ids_high``       uint8 [P,⌈K·b/8⌉]    bits 16 and up, one little-endian bit plane per bit
                                        (only when V > 65,536; b = planes)
``values``         uint8 [P,K]          255·(lp₁ − lp)/(lp₁ − lp_K): linear in the log-prob
``log_prob_max``   uint16 [P]           −lp₁ in 1/1024 nat
``log_prob_min``   uint16 [P]           −lp_K in 1/1024 nat
``tail_log_odds``  int16 [P,T]          log(kept mass / tail mass) at each stored temperature,
                                        1/1024 nat; 32767: nothing lies outside the ids
=================  ===================  =========================================================

Log-odds instead of the log of the tail: both the kept mass and the tail then keep a relative error
of 1/2048, however small either is (a log-tail of −0.002 ± 0.0005 would be 25 % off in the kept mass
of a flat row). Reading forms kept log-probabilities at temperature τ as softmax over the candidates
of rel/τ times the stored kept mass at τ, so a row always sums to 1 and nothing is derived by
subtraction.

Precision, with s = lp₁ − lp_K: |error of a log-prob at τ| ≤ 2·(s/510 + 1/1024)/τ + 1/2048; the 2 is
there because the softmax shares one candidate's error out over the others. Candidates more than 32
nats below the best (logits of −inf, say) are stored as 32 nats below it: at temperature τ they are
read as e^(−32/τ) of the best one's probability.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

STEP = 1024.0  # fixed point: units per nat
RANGE = 32.0  # nats between the best and the lowest representable candidate
WHOLE_TOLERANCE = 1e-2  # steps: float32 rounding of a whole number of steps
SATURATED = 65535  # 64 nats: log(1.6e-28)
NO_TAIL = 32767

Columns = dict[str, NDArray]
Floats = NDArray[np.float32]


def high_planes(vocabulary_size: int) -> int:
    """Return the number of bit planes that ids need above their low 16 bits."""
    return max(0, (vocabulary_size - 1).bit_length() - 16)


def high_bytes(vocabulary_size: int, k: int) -> int:
    """Return the bytes per position of the packed high planes."""
    return -(-k * high_planes(vocabulary_size) // 8)


def fixed_point(nats: Floats) -> NDArray[np.uint16]:
    """Convert non-negative nats to uint16 in 1/1024 nat; values above 63.998 (and inf) saturate."""
    scaled = np.nan_to_num(nats.astype(np.float64) * STEP, nan=0.0, posinf=SATURATED)
    return np.clip(np.rint(scaled), 0, SATURATED).astype(np.uint16)


def encode(
    ids: NDArray[np.int64], log_probs: Floats, tail_log_odds: Floats, vocabulary_size: int
) -> Columns:
    """Encode ``ids`` [P,K] and ``log_probs`` [P,K] at τ = 1, both by falling probability.

    ``tail_log_odds`` [P,T] holds log(kept/tail) at the stored temperatures, +inf without a tail.
    """
    relative = np.minimum(log_probs[:, :1] - log_probs, RANGE)  # 0 ≤ relative ≤ RANGE
    span = relative[:, -1:]
    scale = np.divide(255.0, span, out=np.zeros_like(span), where=span > 0)
    highest = fixed_point(-log_probs[:, 0])
    # A span of whole steps stays whole however the best candidate is rounded, so what is read from
    # a cache and written again is unchanged.
    steps = (span[:, 0] * STEP).astype(np.float64)
    whole_lowest = np.minimum(highest + np.rint(steps), SATURATED).astype(np.uint16)
    is_whole = np.abs(steps - np.rint(steps)) < WHOLE_TOLERANCE
    planes = high_planes(vocabulary_size)
    columns: Columns = {"ids": (ids & 0xFFFF).astype(np.uint16)}
    if planes:
        columns["ids_high"] = pack_planes(ids >> 16, planes)
    return columns | {
        "values": np.rint(relative * scale).astype(np.uint8),
        "log_prob_max": highest,
        "log_prob_min": np.where(
            is_whole, whole_lowest, fixed_point(-log_probs[:, 0] + span[:, 0])
        ),
        "tail_log_odds": encode_odds(tail_log_odds),
    }


def encode_odds(tail_log_odds: Floats) -> NDArray[np.int16]:
    """Return log(kept/tail) [P,T] in 1/1024 nat; +inf becomes NO_TAIL."""
    odds = np.clip(np.rint(tail_log_odds.astype(np.float64) * STEP), -NO_TAIL + 1, NO_TAIL - 1)
    return np.where(np.isposinf(tail_log_odds), NO_TAIL, odds).astype(np.int16)


def pack_planes(high: NDArray[np.int64], planes: int) -> NDArray[np.uint8]:
    """Return the column ``ids_high`` from the ids' bits 16 and up [P,K]."""
    bits = [(high >> plane) & 1 for plane in range(planes)]
    return np.packbits(np.concatenate(bits, axis=1).astype(np.uint8), axis=1, bitorder="little")


def decode_ids(columns: Mapping[str, NDArray], vocabulary_size: int) -> NDArray[np.int64]:
    """Return the token ids [P,K] from the columns ``ids`` and, if present, ``ids_high``."""
    ids = columns["ids"].astype(np.int64)
    if "ids_high" not in columns:
        return ids
    k, planes = ids.shape[1], high_planes(vocabulary_size)
    bits = np.unpackbits(columns["ids_high"], axis=1, count=k * planes, bitorder="little")
    for plane in range(planes):
        ids |= bits[:, plane * k : (plane + 1) * k].astype(np.int64) << (16 + plane)
    return ids


def decode_log_probs(
    columns: Mapping[str, NDArray], temperature: float = 1.0, slot: int = 0, k: int | None = None
) -> tuple[Floats, Floats]:
    """Return log-probabilities [P,k] and log tail mass [P] at ``temperature``, stored in ``slot``.

    With ``k`` below the stored number the dropped candidates' mass joins the tail.
    """
    span = (columns["log_prob_min"].astype(np.float32) - columns["log_prob_max"]) / STEP
    relative = (
        columns["values"] * (-span / 255.0)[:, None].astype(np.float32) / np.float32(temperature)
    )
    return with_tail(relative, columns["tail_log_odds"][:, slot], k)


def with_tail(
    relative: NDArray[np.floating], tail_log_odds: NDArray[np.int16], k: int | None
) -> tuple[Floats, Floats]:
    """Return log-probabilities [P,k] and log tail mass [P] from candidates' log-probabilities
    [P,K], known up to a constant, and the stored log-odds [P].
    """
    odds = tail_log_odds.astype(relative.dtype) / STEP
    odds[tail_log_odds == NO_TAIL] = np.inf
    log_kept, log_tail = -np.logaddexp(0.0, -odds), -np.logaddexp(0.0, odds)
    log_probs = relative - log_sum_exp(relative)[:, None] + log_kept[:, None]
    if k is not None and k < log_probs.shape[1]:
        log_tail = np.logaddexp(log_tail, log_sum_exp(log_probs[:, k:]))
        log_probs = log_probs[:, :k]
    return log_probs.astype(np.float32), log_tail.astype(np.float32)


def log_sum_exp(values: NDArray[np.floating]) -> NDArray[np.floating]:
    """Return log Σ exp of each row [P]."""
    top = values.max(axis=1)
    out: NDArray[np.floating] = top + np.log(np.exp(values - top[:, None]).sum(axis=1))
    return out
