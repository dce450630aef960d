"""Sparse unbiased estimates of a distribution over the vocabulary. Torch only: no files, no models.

A draw is a function of (seed, example digest, replica, position) and of the row's probabilities
alone. Its uniforms come from a counter-based generator, and every sum over the vocabulary is an
exact sum of int64 fixed-point numbers: neither the other rows of a batch nor the way a device
splits a sum can change a draw.

N rows (positions), V tokens of the vocabulary, k kept. Both estimators hold int64 [N,V]: twice the
bytes of the probabilities, which the caller bounds by blocks of rows.
"""

from collections.abc import Sequence

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from rekindle.data.targets.schema import MOST_DRAWS, TeacherInfo

WORD = 0xFFFFFFFF
# Philox4x32: multipliers and key increments (Salmon et al., "Parallel random numbers: as easy as
# 1, 2, 3", SC 2011).
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
INCREMENTS = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
SUM_BITS = 62  # bits of an int64 that sums may fill
CDF_BITS = 52  # fixed point of the inverse CDF: ids below 2^-52 are never drawn
LOWEST_EXPONENT = -60  # rows with a smaller k-th probability are scaled as if it were 2^-60


def sample_keys(
    info: TeacherInfo, digests: Sequence[str], replica: int | None, positions: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Return the keys int64 [N,2] that draw a teacher's sample, at N positions of examples."""
    seed = xxhash.xxh3_64_intdigest(f"{info.seed}\0{info.name}".encode())
    return row_keys(seed, digests, replica, positions)


def row_keys(
    seed: int, digests: Sequence[str], replica: int | None, positions: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Return the keys int64 [N,2] of N rows, given one example digest (32 hex digits) and position
    each.

    A digest is hashed with the seed and the replica into 128 bits, and the position is added to the
    low half: rows of one example differ in the generator's counter, which it permutes. Raises
    ValueError if the lengths differ.
    """
    if len(digests) != len(positions):
        raise ValueError(f"{len(digests)} digests for {len(positions)} positions; one per row")
    index_of = {digest: index for index, digest in enumerate(dict.fromkeys(digests))}
    prefix = f"sample\0{seed}\0{replica}\0"
    hashes = b"".join(xxhash.xxh3_128_digest((prefix + digest).encode()) for digest in index_of)
    words = np.frombuffer(hashes, ">u8").astype(np.uint64).reshape(-1, 2)
    keys = words[np.array([index_of[digest] for digest in digests], np.int64)]
    keys[:, 1] += positions.astype(np.uint64)  # wraps
    return keys.view(np.int64)


def uniforms(keys: Tensor, draws: int) -> Tensor:
    """Return uniforms float64 [N,draws] in [0, 1), multiples of 2^-53, from ``keys`` int64 [N,2].

    Draws 2b and 2b + 1 of a row come from one Philox4x32-10 block: its key is the row's first word,
    its counter is b and the row's second word. The bits are the same on every device.
    """
    blocks = -(-draws // 2)
    counter = keys.new_zeros(len(keys), blocks, 4)
    counter[..., 0] = torch.arange(blocks, device=keys.device)
    counter[..., 2] = keys[:, 1:] & WORD
    counter[..., 3] = (keys[:, 1:] >> 32) & WORD
    key = torch.stack([keys[:, :1] & WORD, (keys[:, :1] >> 32) & WORD], dim=-1)
    words = philox4x32(counter, key).view(len(keys), blocks * 2, 2)
    bits = (words[..., 0] >> 5 << 26) | (words[..., 1] >> 6)
    return bits[:, :draws].to(torch.float64) * 2.0**-53


def philox4x32(counter: Tensor, key: Tensor) -> Tensor:
    """Return the Philox4x32-10 words [...,4] (32 bits) for ``counter`` [...,4] and ``key`` [...,2].

    All are int64 tensors that hold unsigned 32-bit words.
    """
    a, b, c, d = counter.unbind(-1)
    first, second = key.unbind(-1)
    for _ in range(ROUNDS):
        left, right = a * MULTIPLIERS[0], c * MULTIPLIERS[1]  # the products' 64 bits, as signed
        a, b, c, d = (
            ((right >> 32) & WORD) ^ b ^ first,
            right & WORD,
            ((left >> 32) & WORD) ^ d ^ second,
            left & WORD,
        )
        first, second = (first + INCREMENTS[0]) & WORD, (second + INCREMENTS[1]) & WORD
    return torch.stack([a, b, c, d], dim=-1)


def threshold_sample(probs: Tensor, k: int, u: Tensor) -> tuple[Tensor, Tensor]:
    """Return exactly ``k`` ids a row whose values are an unbiased estimate of ``probs`` [N,V]
    float32.

    With θ such that Σ min(1, tᵢ/θ) = k, entries tᵢ ≥ θ are kept as they are. The others are kept
    with probability tᵢ/θ at the value θ, by systematic sampling in the order of the ids with the
    one uniform of ``u`` [N] float64. Returns distinct ids int64 [N,k] and values float32 [N,k] that
    add up to the row's sum, by falling value: the exact ones before the drawn ones, ties by id. A
    row with no more than k non-zero probabilities is kept whole, filled up with zeros.

    Fixed point ends at 2^-(59 - log₂ kV) of the k-th largest probability (2^-38 of it at k = 64 and
    V = 30,522): ids less likely than that may never be drawn. Raises ValueError unless 1 ≤ k ≤ V.
    """
    if not 1 <= k <= probs.shape[1]:
        raise ValueError(f"k = {k} entries of a vocabulary of {probs.shape[1]}; 1 ≤ k ≤ V")
    top, ids, scale = _largest_probs(probs, k)
    # Weights are integers, in units of 1/scale. θ ≤ t_k + (the sum outside the k) ≤ V·t_k, so
    # weights above V·t_k are kept exactly and may be capped there: no sum then exceeds k·V·t_k.
    cap = 2.0 ** (SUM_BITS - k.bit_length())
    capped = (top * scale).clamp_(max=cap)
    weights = (probs * scale).scatter_(1, ids, capped).to(torch.int64)
    largest = capped.to(torch.int64)
    mass_before = largest.cumsum(1) - largest
    remaining = weights.sum(1, keepdim=True) - mass_before  # [N,k], the mass from each rank on
    rank = torch.arange(k, device=probs.device)
    # The exact ones are a prefix: once t₍ₘ₊₁₎ < θₘ = restₘ/(k − m), θ rises with m.
    exact = largest * (k - rank) >= remaining
    exact_count = exact.sum(1, keepdim=True)
    draw_count = k - exact_count
    mass = remaining.gather(1, exact_count.clamp(max=k - 1)) * (draw_count > 0)
    weights.scatter_(1, ids, largest.masked_fill_(exact, 0))
    # The points are a whole `gap` apart, and every weight ≤ gap: no id can be hit twice.
    point_count = draw_count.clamp(min=1)
    gap = mass // point_count
    # u·gap may round up to gap, which need not be exact in float64.
    start = torch.minimum((u[:, None] * gap).to(torch.int64), (gap - 1).clamp_(min=0))
    points = start + gap * (rank - exact_count).clamp_(min=0)
    picked = torch.searchsorted(weights.cumsum_(1), points, right=True)
    theta = (mass.to(torch.float64) / point_count / scale).to(torch.float32)
    return torch.where(exact, ids, picked), torch.where(exact, top, theta)


def _largest_probs(probs: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the k largest [N,k] by falling value, ties by id, their ids, and the row's scale
    [N,1].

    The scale is a power of two that leaves room for sums of k·V weights of t_k's size.
    """
    if not _may_read(probs):
        top, ids = _top_by_value_and_id(probs, k)
    else:
        top, ids = torch.topk(probs, k, dim=1, sorted=False)
    lowest = top.min(dim=1, keepdim=True).values
    exponent = ((lowest.view(torch.int32) >> 23) - 126).clamp_(min=LOWEST_EXPONENT)  # t_k < 2^e
    bits = SUM_BITS - k.bit_length() - probs.shape[1].bit_length()
    scale = ((bits - exponent + 127) << 23).view(torch.float32)
    if not _may_read(probs):
        return top, ids, scale
    has_zeros = (lowest * scale < 1)[:, 0]
    if bool(has_zeros.any()):  # topk may return any of the zeros; here those of the lowest ids
        full, order = torch.sort(probs[has_zeros], dim=1, descending=True, stable=True)
        top[has_zeros], ids[has_zeros] = full[:, :k], order[:, :k]
    # One sort by (value, id): non-negative floats have the order of their bits.
    order = (top.view(torch.int32).to(torch.int64) << 32) | (WORD - ids)
    order = order.sort(dim=1, descending=True).values
    return (order >> 32).to(torch.int32).view(torch.float32), WORD - (order & WORD), scale


def _may_read(values: Tensor) -> bool:
    """Return whether the values of tensors may be read: on a GPU, that would wait for the
    device.
    """
    return values.device.type == "cpu"


def _top_by_value_and_id(probs: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k largest [N,k] by falling value, ties by id, and their ids: by one top-k
    of both.
    """
    ids = torch.arange(probs.shape[1], device=probs.device)
    combined = (probs.view(torch.int32).to(torch.int64) << 32) | (WORD - ids)
    order = torch.topk(combined, k, dim=1).values
    return (order >> 32).to(torch.int32).view(torch.float32), WORD - (order & WORD)


def random_sample(probs: Tensor, draws: int, u: Tensor) -> tuple[Tensor, Tensor]:
    """Draw ``draws`` ids a row with replacement from ``probs`` [N,V] float32, rows that sum to 1.

    By inverse CDF with the uniforms ``u`` [N,draws] float64. Returns the distinct ids int64
    [N,draws] by falling count, ties by id, padded with -1, and their counts uint8 [N,draws], 0 at
    the padding; count/draws is an unbiased estimate of the probability (RS-KD, "Sparse Logit
    Sampling", ACL 2025). Raises ValueError unless 1 ≤ draws ≤ 255.
    """
    if not 1 <= draws <= MOST_DRAWS:
        raise ValueError(f"{draws} draws; 1 ≤ draws ≤ {MOST_DRAWS}, counts are stored in a byte")
    cumulative = (probs * 2.0**CDF_BITS).to(torch.int64).cumsum_(1)
    # In float64 u·total < total, since total is exact there: about 2^52.
    points = (u * cumulative[:, -1:]).to(torch.int64)
    picked = torch.searchsorted(cumulative, points, right=True).sort(dim=1).values
    is_first = torch.ones_like(picked)
    is_first[:, 1:] = picked[:, 1:] != picked[:, :-1]
    column = is_first.cumsum(1) - 1
    ids = torch.full_like(picked, -1).scatter_(1, column, picked)
    counts = torch.zeros_like(picked).scatter_add_(1, column, torch.ones_like(picked))
    counts, order = counts.sort(dim=1, descending=True, stable=True)
    return ids.gather(1, order), counts.to(torch.uint8)
