"""The columns of vocabulary targets, encoded on the device that scored them: the torch twin of
``data/targets/codec.py``, ``codec_precise.py`` and ``head.encode_hidden``. A test holds the two
equal to the bit. Torch only; it never waits for the device.

Why a GPU's bytes are those that the host would make of the same scores: every operation is exact or
correctly rounded by IEEE 754, namely differences, products, quotients and nearest integers, in the
host's order and precision. There is no logarithm, exponential or sum of several terms, whose last
bit may differ between devices; these are made before, by ``scoring.py``. Two habits keep it so: a
quotient is of two tensors (torch multiplies by the reciprocal of a number), and each operation is a
kernel of its own (a compiler could join a product and a sum). Integers that may not fit their
column are cut by bits, as no conversion out of range is defined.

P positions, K candidates, T temperatures, V ids; of K = 64 below 65,536 ids, 202 + 2T bytes come to
the host for a position instead of 784 + 4T.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from rekindle.data.targets.codec import (
    NO_TAIL,
    RANGE,
    SATURATED,
    STEP,
    WHOLE_TOLERANCE,
    high_planes,
)
from rekindle.data.targets.codec_precise import SATURATED as LARGEST_VALUE
from rekindle.data.targets.codec_precise import VALUE_STEP
from rekindle.data.targets.schema import rank_dtype

LARGEST_STEP = 32767  # of hidden states

Columns = dict[str, Tensor]


def encode(ids: Tensor, log_probs: Tensor, tail_log_odds: Tensor, vocabulary_size: int) -> Columns:
    """Encode ``ids`` int64 [P,K], ``log_probs`` [P,K] and ``tail_log_odds`` [P,T], both float32, as
    ``codec.encode`` does.
    """
    relative = (log_probs[:, :1] - log_probs).clamp(max=RANGE)
    span = relative[:, -1:]
    scale = torch.where(span > 0, torch.full_like(span, 255.0) / span, torch.zeros_like(span))
    highest = _fixed_point(-log_probs[:, 0])
    steps = (span[:, 0] * STEP).double()
    whole_lowest = (highest + steps.round()).clamp(max=SATURATED)
    is_whole = (steps - steps.round()).abs() < WHOLE_TOLERANCE
    lowest = torch.where(is_whole, whole_lowest, _fixed_point(-log_probs[:, 0] + span[:, 0]))
    return {
        **_encode_ids(ids, vocabulary_size),
        "values": ((relative * scale).round().to(torch.int32) & 0xFF).to(torch.uint8),
        "log_prob_max": _unsigned(highest),
        "log_prob_min": _unsigned(lowest),
        "tail_log_odds": encode_odds(tail_log_odds),
    }


def encode_precise(
    ids: Tensor, log_probs: Tensor, tail_log_odds: Tensor, vocabulary_size: int
) -> Columns:
    """Encode the same as ``codec_precise.encode_precise`` does."""
    wide = log_probs.double()
    below = ((wide[:, :1] - wide) * VALUE_STEP).clamp(max=LARGEST_VALUE)
    return {
        **_encode_ids(ids, vocabulary_size),
        "values": _unsigned(below.round()),
        "log_prob_max": _unsigned(_fixed_point(-log_probs[:, 0])),
        "tail_log_odds": encode_odds(tail_log_odds),
    }


# By codec; the compact one arranges the default's columns when a unit is written.
ENCODERS: Mapping[str, Callable[[Tensor, Tensor, Tensor, int], Columns]] = {
    "default": encode,
    "precise": encode_precise,
    "compact": encode,
}


def encode_odds(tail_log_odds: Tensor) -> Tensor:
    """Return log(kept/tail) float32 [P,T] as ``codec.encode_odds`` does: int16, in 1/1024 nat."""
    odds = (tail_log_odds.double() * STEP).round().clamp(1 - NO_TAIL, NO_TAIL - 1)
    return torch.where(torch.isposinf(tail_log_odds), NO_TAIL, odds).to(torch.int16)


def encode_scalars(scores: Mapping[str, Tensor], vocabulary_size: int) -> Columns:
    """Return the scalars [P] as ``Scorer.encode`` does."""
    rank, wide_rank = scores["gold_rank"], rank_dtype(vocabulary_size)().itemsize > 2
    return {
        "gold_log_prob": _unsigned(_fixed_point(-scores["gold_log_prob"])),
        "gold_rank": (  # of fewer than 2³¹ ids
            rank.to(torch.int32).view(torch.uint32)
            if wide_rank
            else _unsigned(rank.clamp(max=SATURATED))
        ),
        "entropy": _unsigned(_fixed_point(scores["entropy"].clamp(min=0))),
    }


def encode_hidden(hidden: Tensor) -> Columns:
    """Encode states float32 [P,H] as ``head.encode_hidden`` does."""
    highest = hidden.abs().amax(dim=1)
    scale = highest / torch.full_like(highest, LARGEST_STEP)
    safe = torch.where(scale > 0, scale, torch.ones_like(scale))
    steps = (hidden / safe[:, None]).round().clamp(-LARGEST_STEP, LARGEST_STEP)
    return {"hidden": steps.to(torch.int16), "hidden_scale": scale}


def _encode_ids(ids: Tensor, vocabulary_size: int) -> Columns:
    columns, planes = {"ids": _unsigned(ids)}, high_planes(vocabulary_size)
    if planes:
        high = ids >> 16
        bits = torch.cat([(high >> plane) & 1 for plane in range(planes)], dim=1)
        padded = torch.nn.functional.pad(bits, (0, -bits.shape[1] % 8))
        weights = 1 << torch.arange(8, device=ids.device)  # little-endian
        packed = (padded.view(len(ids), padded.shape[1] // 8, 8) * weights).sum(dim=2)
        columns["ids_high"] = packed.to(torch.uint8)
    return columns


def _fixed_point(nats: Tensor) -> Tensor:
    """Return non-negative nats in whole steps, float64, as ``codec.fixed_point`` does."""
    scaled = torch.nan_to_num(nats.double() * STEP, nan=0.0, posinf=SATURATED, neginf=0.0)
    return scaled.round().clamp(0, SATURATED)


def _unsigned(numbers: Tensor) -> Tensor:
    """Return the low 16 bits of whole numbers as uint16, for which torch has few operations."""
    low = numbers.to(torch.int32) & 0xFFFF
    return ((low ^ 0x8000) - 0x8000).to(torch.int16).view(torch.uint16)
