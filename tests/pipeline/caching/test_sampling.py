"""Sparse unbiased estimates: the generator's bits, the means, the entries, no row moves another."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rekindle.pipeline.caching import sampling
from rekindle.pipeline.caching.sampling import (
    LOWEST_EXPONENT,
    philox4x32,
    random_sample,
    row_keys,
    threshold_sample,
    uniforms,
)

WORDS = 2**32
DIGESTS = [f"{n:032x}" for n in range(1000)]
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def keys_of(count: int, seed: int = 0) -> torch.Tensor:
    """Keys of ``count`` rows: 50 positions of each example."""
    digests = [DIGESTS[n // 50 % 1000] for n in range(count)]
    return torch.from_numpy(row_keys(seed, digests, None, np.arange(count)))


def rows(name: str, size: int) -> torch.Tensor:
    """One row [V] of a known shape, its ids shuffled."""
    ranks = torch.arange(1, size + 1, dtype=torch.float64)
    weights = {
        "flat": torch.ones(size, dtype=torch.float64),
        "zipf": 1 / ranks,
        "peaked": torch.where(ranks == 1, 20.0, 1 / ranks),
    }[name]
    order = torch.from_numpy(np.random.default_rng(1).permutation(size))
    return (weights / weights.sum())[order].to(torch.float32)


# --- the generator -------------------------------------------------------------------------------


# Random123's published known-answer vectors (its kat_vectors), philox4x32 with 10 rounds.
KNOWN_ANSWERS = """
00000000 00000000 00000000 00000000  00000000 00000000  6627e8d5 e169c58d bc57ac4c 9b00dbd8
ffffffff ffffffff ffffffff ffffffff  ffffffff ffffffff  408f276d 41c83b0e a20bc7c6 6d5451fd
243f6a88 85a308d3 13198a2e 03707344  a4093822 299f31d0  d16cfe09 94fdcceb 5001e420 24126ea1
"""  # counter, key, words


def test_philox_gives_the_published_words():
    lines = KNOWN_ANSWERS.strip().splitlines()
    table = torch.tensor([[int(word, 16) for word in line.split()] for line in lines])
    assert torch.equal(philox4x32(table[:, :4], table[:, 4:6]), table[:, 6:])


def reference_uniforms(key: tuple[int, int], draws: int) -> list[float]:
    """Philox4x32-10 in Python's own integers."""
    first, second = key[0] % 2**64, key[1] % 2**64
    found: list[float] = []
    for block in range(-(-draws // 2)):
        words = [block, 0, second % WORDS, second // WORDS]
        k0, k1 = first % WORDS, first // WORDS
        for _ in range(10):
            left, right = words[0] * 0xD2511F53, words[2] * 0xCD9E8D57
            words = [
                right // WORDS ^ words[1] ^ k0,
                right % WORDS,
                left // WORDS ^ words[3] ^ k1,
                left % WORDS,
            ]
            k0, k1 = (k0 + 0x9E3779B9) % WORDS, (k1 + 0xBB67AE85) % WORDS
        for high, low in (words[:2], words[2:]):
            found.append(((high >> 5) * 2**26 + (low >> 6)) / 2**53)
    return found[:draws]


INT64 = st.integers(-(2**63), 2**63 - 1)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(INT64, INT64), min_size=1, max_size=4), st.integers(1, 7))
def test_uniforms_are_those_of_plain_integers(keys, draws):
    found = uniforms(torch.tensor(keys), draws)
    assert found.dtype == torch.float64
    assert found.tolist() == [reference_uniforms(key, draws) for key in keys]


def test_uniforms_are_below_one(monkeypatch):
    monkeypatch.setattr(
        sampling, "philox4x32", lambda counter, key: torch.full_like(counter, WORDS - 1)
    )
    assert uniforms(torch.zeros(1, 2, dtype=torch.int64), 2).tolist() == [[1 - 2**-53] * 2]


def test_uniforms_are_uniform_and_not_correlated():
    """Over neighbouring positions, draws, replicas and seeds, which differ in few bits of input."""
    count = 40_000
    digests, positions = [DIGESTS[n // 50] for n in range(count)], np.arange(count) % 50
    draws = torch.cat(
        [
            uniforms(torch.from_numpy(row_keys(seed, digests, replica, positions)), 3)
            for seed, replica in ((0, None), (1, None), (0, 0), (0, 1))
        ],
        dim=1,
    ).numpy()
    bins = 100
    for column in draws.T:
        seen = np.histogram(column, bins, (0, 1))[0]
        statistic = ((seen - count / bins) ** 2).sum() / (count / bins)
        assert abs(statistic - (bins - 1)) < 5 * np.sqrt(2 * (bins - 1))
    correlations = np.corrcoef(draws.T) - np.eye(draws.shape[1])
    assert np.abs(correlations).max() < 5 / np.sqrt(count)
    neighbours = [np.corrcoef(column[1:], column[:-1])[0, 1] for column in draws.T]
    assert np.abs(neighbours).max() < 5 / np.sqrt(count)


def test_row_keys_tell_every_input_apart():
    inputs = [
        (seed, digest, replica, position)
        for seed in (0, 1, -1, 10)
        for digest in DIGESTS[:5]
        for replica in (None, 0, 1, 10)
        for position in (0, 1, 511, 65_535)
    ]
    found = {
        tuple(row_keys(seed, [digest], replica, np.array([position]))[0].tolist())
        for seed, digest, replica, position in inputs
    }
    assert len(found) == len(inputs)


def test_row_keys_do_not_depend_on_the_other_rows():
    random = np.random.default_rng(0)
    digests = [DIGESTS[n] for n in random.integers(0, 20, 300)]
    positions = random.integers(0, 512, 300)
    keys = row_keys(3, digests, 1, positions)
    assert keys.shape == (300, 2)
    assert keys.dtype == np.int64
    for n in range(300):
        assert (row_keys(3, [digests[n]], 1, positions[n : n + 1])[0] == keys[n]).all()
    assert row_keys(3, [], 1, positions[:0]).shape == (0, 2)
    with pytest.raises(ValueError, match="one per row"):
        row_keys(3, digests, 1, positions[:-1])


def test_draws_of_an_example_are_frozen():
    """Another process, machine or version must draw the same: caches are resumed and compared."""
    keys = row_keys(7, [DIGESTS[5], DIGESTS[5], DIGESTS[6]], 2, np.array([0, 1, 0]))
    assert keys.tolist() == FROZEN_KEYS
    assert uniforms(torch.from_numpy(keys), 3).tolist() == FROZEN_UNIFORMS


FROZEN_KEYS = [
    [7051441366157690657, -8805560748271377940],
    [7051441366157690657, -8805560748271377939],
    [-278064872161248492, 1968634401695633901],
]
FROZEN_UNIFORMS = [
    [0.19495266064323935, 0.06895982614811202, 0.6324585277008883],
    [0.43325932309068405, 0.05434492929098533, 0.4915846559326019],
    [0.716822175883107, 0.8719183696338316, 0.16439980285793265],
]


# --- threshold sampling --------------------------------------------------------------------------


def theta_of(row: list[float], k: int) -> Fraction:
    """θ with Σ min(1, t/θ) = k in exact arithmetic; 0 where no more than k entries are non-zero."""
    falling = sorted(map(Fraction, row), reverse=True)
    for kept in range(k):
        theta = sum(falling[kept:], Fraction(0)) / (k - kept)
        if falling[kept] < theta:
            return theta
    return Fraction(0)


ENTRY = st.one_of(
    st.just(0.0),
    st.sampled_from([1.0, 0.5, 0.25, 1e-3]),  # ties
    st.floats(0, 1, width=32),
    st.floats(-60, 0).map(lambda x: float(np.exp(x))),
)
ROWS = st.integers(1, 14).flatmap(
    lambda size: st.tuples(
        st.lists(
            st.lists(ENTRY, min_size=size, max_size=size).filter(lambda row: sum(row) > 1e-20),
            min_size=1,
            max_size=4,
        ),
        st.integers(1, size),
    )
)
GRID = 64


def normal(values: list[list[float]]) -> np.ndarray:
    array = np.array(values, np.float64)
    return (array / array.sum(axis=1, keepdims=True)).astype(np.float32)


def check_entries(probs: np.ndarray, k: int, ids: np.ndarray, values: np.ndarray) -> None:
    """What holds of every draw of one row."""
    assert ids.shape == values.shape == (k,)
    assert len(set(ids.tolist())) == k
    assert ((ids >= 0) & (ids < len(probs))).all()
    assert (values[:-1] >= values[1:]).all()
    total = probs.astype(np.float64).sum()
    np.testing.assert_allclose(values.astype(np.float64).sum(), total, rtol=1e-6)
    exact = values == probs[ids]
    if (probs > 0).sum() <= k:
        assert exact.all()
        # Kept whole, by value and id, filled up with the lowest ids of probability 0.
        assert (ids == np.argsort(-probs, kind="stable")[:k]).all()
    else:
        assert (probs[ids] > 0).all()


@settings(max_examples=50, deadline=None)
@given(ROWS)
def test_every_threshold_sample_has_k_entries_and_their_mean_is_the_row(case):
    """The uniform runs through a grid: inclusion is then exact to one step of it."""
    values, k = case
    batch = normal(values)
    grid = (torch.arange(GRID, dtype=torch.float64) + 0.5) / GRID
    ids, found = threshold_sample(
        torch.from_numpy(batch).repeat_interleave(GRID, 0), k, grid.repeat(len(batch))
    )
    assert ids.dtype == torch.int64
    assert found.dtype == torch.float32
    ids, found = ids.numpy().reshape(-1, GRID, k), found.numpy().reshape(-1, GRID, k)
    for row, row_ids, row_values in zip(batch, ids, found, strict=True):
        for draw in range(GRID):
            check_entries(row, k, row_ids[draw], row_values[draw])
        theta = float(theta_of(row.tolist(), k))
        mean = np.zeros(len(row))
        np.add.at(mean, row_ids.ravel(), row_values.ravel().astype(np.float64) / GRID)
        np.testing.assert_allclose(mean, row, rtol=1e-6, atol=theta / GRID * (1 + 1e-6) + 1e-12)
        kept = row > theta * (1 + 1e-6)
        least = 2.0**LOWEST_EXPONENT  # below it, fixed point has no digits left
        np.testing.assert_allclose(mean[kept], row[kept], rtol=1e-6, atol=least)
        drawn = np.isin(row_ids, np.flatnonzero((row > 0) & (row < theta * (1 - 1e-6))))
        np.testing.assert_allclose(row_values[drawn], theta, rtol=1e-6, atol=least)


@pytest.mark.parametrize("name", ["flat", "zipf", "peaked"])
@pytest.mark.parametrize("k", [1, 5, 12, 39])
def test_threshold_sampling_is_unbiased(name, k):
    size, draws = 40, 20_000
    row = rows(name, size)
    u = uniforms(keys_of(draws, seed=k), 1)[:, 0]
    ids, values = threshold_sample(row.expand(draws, size), k, u)
    dense = torch.zeros(draws, size, dtype=torch.float64).scatter_(1, ids, values.double())
    theta = float(theta_of(row.tolist(), k))
    true = row.double()
    spread = (true * (theta - true).clamp(min=0) / draws).sqrt()
    assert ((dense.mean(0) - true).abs() <= 4.5 * spread + 1e-7 * true).all()
    assert (spread > 0).any() == (k < 40 and theta > 0)


def test_all_of_the_vocabulary_is_exact():
    row = rows("zipf", 300)[None]
    ids, values = threshold_sample(row, 300, torch.tensor([0.7], dtype=torch.float64))
    assert torch.equal(values, row.sort(descending=True).values)
    assert torch.equal(ids, row.sort(descending=True, stable=True).indices)


def test_exact_entries_come_first_and_ties_by_id():
    row = torch.tensor([[0.01, 0.2, 0.01, 0.3, 0.2, 0.01, 0.25, 0.02]])
    for u in torch.linspace(0, 1 - 2**-53, 50, dtype=torch.float64):
        ids, values = threshold_sample(row, 6, u[None])
        assert ids[0, :4].tolist() == [3, 6, 1, 4]
        assert torch.equal(values[:, :4], row[:, [3, 6, 1, 4]])
        assert set(ids[0, 4:].tolist()) <= {0, 2, 5, 7}
        assert ids[0, 4] < ids[0, 5]
        torch.testing.assert_close(values[0, 4:], torch.full((2,), 0.025))


@pytest.mark.parametrize(
    ("size", "k"),
    # BERT's vocabulary; an odd one; the largest we know with many kept, where sums come near 2^62.
    [(30_522, 64), (30_522, 30_000), (50_257, 1), (262_144, 2048)],
)
@pytest.mark.parametrize("u", [0.0, 0.3, 1 - 2**-53])
def test_large_vocabularies(size, k, u):
    random = torch.Generator().manual_seed(size)
    batch = torch.softmax(6 * torch.randn(4, size, generator=random), dim=1)
    batch[1] = 1 / size
    # k - 1 entries just below θ, the rest flat and tiny: the largest sums in units of t_k.
    batch[2] = 1 / k / (size - k + 1)
    batch[2, : k - 1] = (1 - 1e-5) / k
    batch[3] = 0
    batch[3, size - k // 2 - 1 :] = 2**-100  # near the end of fixed point or beyond it
    batch[3, 0] = 1
    ids, values = threshold_sample(batch, k, torch.full((4,), u, dtype=torch.float64))
    for row in range(4):
        check_entries(batch[row].numpy(), k, ids[row].numpy(), values[row].numpy())
    ids, _ = random_sample(batch[:2], 1, torch.full((2, 1), u, dtype=torch.float64))
    assert ((ids >= 0) & (ids < size)).all()
    assert (batch[:2].gather(1, ids) > 0).all()


@pytest.mark.parametrize("k", [0, 6, -1])
def test_k_beyond_the_vocabulary_is_an_error(k):
    with pytest.raises(ValueError, match="1 ≤ k ≤ V"):
        threshold_sample(torch.full((1, 5), 0.2), k, torch.zeros(1, dtype=torch.float64))


# --- random sampling -----------------------------------------------------------------------------

PARTS = st.integers(1, 9).flatmap(
    lambda size: st.lists(st.integers(0, 1024), min_size=size - 1, max_size=size - 1)
)


@settings(max_examples=100, deadline=None)
@given(st.lists(PARTS, min_size=1, max_size=3), st.integers(1, 40), st.integers(0, 2**32))
def test_random_sampling_is_the_inverse_cdf(cuts, draws, seed):
    """Probabilities are multiples of 2^-10, so that NumPy's float64 sums are exact."""
    size = 1 + max(map(len, cuts))
    ends = [sorted([0, *cut]) + [1024] * (size - len(cut)) for cut in cuts]
    batch = np.diff(np.array(ends), axis=1) / 1024
    u = np.random.default_rng(seed).random((len(batch), draws))
    u[:, 0] = (0.0, 1 - 2**-53, 0.5)[seed % 3]
    ids, counts = random_sample(
        torch.from_numpy(batch.astype(np.float32)), draws, torch.from_numpy(u)
    )
    assert (ids.dtype, counts.dtype) == (torch.int64, torch.uint8)
    for row in range(len(batch)):
        drawn = np.searchsorted(batch[row].cumsum(), u[row], side="right")
        seen, times = np.unique(drawn, return_counts=True)
        order = np.argsort(-times, kind="stable")
        padding = draws - len(seen)
        assert ids[row].tolist() == [*seen[order].tolist(), *[-1] * padding]
        assert counts[row].tolist() == [*times[order].tolist(), *[0] * padding]


@pytest.mark.parametrize("name", ["flat", "zipf", "peaked"])
@pytest.mark.parametrize("draws", [1, 12, 255])
def test_random_sampling_is_unbiased(name, draws):
    size, count = 40, 40_000 // draws
    row = rows(name, size)
    ids, counts = random_sample(
        row.expand(count, size), draws, uniforms(keys_of(count, seed=draws), draws)
    )
    weights = torch.zeros(count, size + 1, dtype=torch.float64)
    weights.scatter_add_(1, ids + 1, counts.double() / draws)
    true = row.double()
    spread = (true * (1 - true) / (count * draws)).sqrt()
    assert ((weights.mean(0)[1:] - true).abs() <= 4.5 * spread + 1e-7 * true).all()
    assert weights[:, 0].sum() == 0


def test_random_sampling_counts_in_a_byte():
    row = torch.tensor([[0.0, 1.0, 0.0]])
    ids, counts = random_sample(row, 255, uniforms(keys_of(1), 255))
    assert ids[0, 0] == 1
    assert counts[0, 0] == 255
    assert (ids[0, 1:] == -1).all()
    for draws in (0, 256):
        with pytest.raises(ValueError, match="draws ≤ 255"):
            random_sample(row, draws, uniforms(keys_of(1), max(draws, 1)))


# --- both ----------------------------------------------------------------------------------------


def estimates(batch: torch.Tensor, keys: torch.Tensor) -> list[torch.Tensor]:
    u = uniforms(keys, 20)
    return [*threshold_sample(batch, 20, u[:, 0]), *random_sample(batch, 20, u)]


@pytest.mark.parametrize("size", [33, 3001, 70_001])
def test_a_row_draws_the_same_alone_in_any_batch_and_in_any_order(size):
    """Also with one long row, whose sums torch may split among threads."""
    random = torch.Generator().manual_seed(0)
    count = 24
    batch = torch.softmax(4 * torch.randn(count, size, generator=random), dim=1)
    batch[3] = 1 / size
    batch[4] = torch.nn.functional.one_hot(torch.tensor(7), size)
    batch[5] = torch.round(batch[5] * 64) / 64  # ties and zeros
    keys = keys_of(count)
    together = estimates(batch, keys)
    order = torch.randperm(count, generator=random)
    for whole, part in zip(together, estimates(batch[order], keys[order]), strict=True):
        assert torch.equal(whole[order], part)
    for n in range(count):
        alone = estimates(batch[n : n + 1], keys[n : n + 1])
        pair = estimates(batch[[n, n - 1]], keys[[n, n - 1]])
        for whole, single, two in zip(together, alone, pair, strict=True):
            assert torch.equal(whole[n], single[0])
            assert torch.equal(whole[n], two[0])


def test_no_rows():
    ids, values = threshold_sample(torch.zeros(0, 9), 3, torch.zeros(0, dtype=torch.float64))
    assert (ids.shape, values.shape) == ((0, 3), (0, 3))
    ids, counts = random_sample(torch.zeros(0, 9), 4, torch.zeros(0, 4, dtype=torch.float64))
    assert (ids.shape, counts.shape) == ((0, 4), (0, 4))


@pytest.mark.parametrize(("name", "draws"), [("zipf", 14), ("peaked", 49)])
def test_threshold_sampling_varies_less_than_random_at_equal_entries(name, draws):
    """Random sampling gets as many draws as leave it with 12 distinct ids or a few more."""
    size, count, k = 1000, 2000, 12
    row = rows(name, size)
    batch, keys = row.expand(count, size), keys_of(count)
    ids, counts = random_sample(batch, draws, uniforms(keys, draws))
    assert k <= (ids >= 0).sum(1).double().mean() < k + 1
    drawn = torch.zeros(count, size + 1, dtype=torch.float64)
    drawn.scatter_(1, ids + 1, counts.double() / draws)
    ids, values = threshold_sample(batch, k, uniforms(keys, 1)[:, 0])
    kept = torch.zeros(count, size, dtype=torch.float64).scatter_(1, ids, values.double())
    errors = [((found - row) ** 2).sum(1).mean() for found in (kept, drawn[:, 1:])]
    assert errors[0] < 0.9 * errors[1]


@pytest.mark.gpu
@gpu
def test_a_cuda_device_draws_the_same():
    random = torch.Generator().manual_seed(0)
    batch = torch.softmax(4 * torch.randn(64, 30_522, generator=random), dim=1)
    batch[3], batch[4] = 1 / 30_522, torch.nn.functional.one_hot(torch.tensor(7), 30_522)
    keys = keys_of(64)
    there = estimates(batch.cuda(), keys.cuda())
    for here, device in zip(estimates(batch, keys), there, strict=True):
        assert torch.equal(here, device.cpu())
    for n in range(64):
        alone = estimates(batch[n : n + 1].cuda(), keys[n : n + 1].cuda())
        for whole, single in zip(there, alone, strict=True):
            assert torch.equal(whole[n], single[0])
