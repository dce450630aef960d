"""Index maps of growth, on every index: who copies whom, and that nothing is counted twice."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from rekindle.train.growth.maps import Axis, balanced_sources, in_blocks, layer_sources

SIZES = st.integers(1, 12).flatmap(
    lambda old: st.tuples(st.just(old), st.integers(old, 5 * old + 3))
)
SEEDS = st.integers(0, 5)
DOUBLE = torch.float64


def source_of(sizes, seed):
    return balanced_sources(*sizes, torch.Generator().manual_seed(seed))


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


@given(SIZES, SEEDS)
@settings(deadline=None)
def test_sources_are_rounds_over_all_old_units(sizes, seed):
    old, new = sizes
    source = source_of(sizes, seed).tolist()
    assert len(source) == new
    assert source[:old] == list(range(old))
    for start in range(0, new, old):
        part = source[start : start + old]
        assert len(set(part)) == len(part)
        assert set(part) <= set(range(old))


@given(SIZES, SEEDS, st.sampled_from([Axis.copied, Axis.shared]))
@settings(deadline=None)
def test_the_shares_of_a_units_copies_sum_to_one(sizes, seed, rule):
    axis = rule(source_of(sizes, seed))
    assert axis.old == sizes[0]
    sums = torch.zeros(sizes[0], dtype=DOUBLE)
    sums.index_add_(0, axis.source, (axis.write * axis.read).double())
    torch.testing.assert_close(sums, torch.ones_like(sums), rtol=1e-6, atol=0)


@given(SIZES, SEEDS)
@settings(deadline=None)
def test_elles_rule_at_every_index(sizes, seed):
    old, new = sizes
    axis = Axis.copied(source_of(sizes, seed))
    matrix = random(old, old)
    grown = axis.columns(axis.rows(matrix), 1)
    g = axis.source.tolist()
    for j in range(new):
        for k in range(new):
            assert grown[j, k].item() == pytest.approx(matrix[g[j], g[k]].item() / g.count(g[k]))


@given(SIZES, SEEDS, st.sampled_from([Axis.copied, Axis.shared]), st.sampled_from([0.0, 0.7]))
@settings(deadline=None)
def test_who_reads_the_copies_sees_what_was_there(sizes, seed, rule, noise):
    axis = rule(source_of(sizes, seed))
    draw = torch.Generator().manual_seed(seed)
    states, matrix = random(3, sizes[0]), random(4, sizes[0], seed=1)
    for dim, kept in ((1, matrix), (0, matrix.T)):
        grown = axis.columns(kept, dim, noise, draw, keep_sum=True)
        read = axis.rows(states, 1) @ (grown.T if dim else grown)
        torch.testing.assert_close(read, states @ matrix.T, rtol=1e-5, atol=1e-5)


@given(SIZES, SEEDS)
@settings(deadline=None)
def test_noise_moves_every_copy_but_the_first(sizes, seed):
    axis = Axis.copied(source_of(sizes, seed))
    matrix = random(4, sizes[0], seed=1)
    plain = axis.columns(matrix, 1)
    noisy, again = (
        axis.columns(matrix, 1, 0.5, torch.Generator().manual_seed(seed)) for _ in range(2)
    )
    assert torch.equal(noisy, again)
    first = torch.arange(sizes[1]) < sizes[0]
    assert torch.equal(noisy[:, first], plain[:, first])
    assert (noisy != plain)[:, ~first].all()


@given(SIZES, SEEDS)
@settings(deadline=None)
def test_an_rms_norm_finds_the_same_behind_shared_copies(sizes, seed):
    old, new = sizes
    axis, eps = Axis.shared(source_of(sizes, seed)), 0.3
    states, weight = random(3, old), random(old, seed=1)
    expected = states * weight / (states.square().mean(1, keepdim=True) + eps).sqrt()
    wide = axis.rows(states, 1)
    wide_weight = axis.norm(weight, bias=False, read=False)
    scale = (wide.square().mean(1, keepdim=True) + eps * axis.norm_scale**2).sqrt()
    assert axis.norm_scale == pytest.approx(math.sqrt(old / new))
    torch.testing.assert_close(
        wide * wide_weight / scale, axis.rows(expected, 1), rtol=1e-5, atol=1e-6
    )


@given(SIZES, SEEDS)
@settings(deadline=None)
def test_a_layer_norm_finds_the_same_beside_means(sizes, seed):
    old, new = sizes
    axis, eps = Axis.averaged(source_of(sizes, seed)), 0.3
    states, weight, bias = random(3, old), random(old, seed=1), random(old, seed=2)
    wide = axis.rows(states, 1)
    torch.testing.assert_close(wide[:, :old], states, rtol=0, atol=0)
    torch.testing.assert_close(wide[:, old:], states.mean(1, keepdim=True).expand(3, new - old))
    found = F.layer_norm(
        wide,
        (new,),
        axis.norm(weight, bias=False, read=False),
        axis.norm(bias, bias=True, read=False),
        eps * axis.norm_scale**2,
    )
    expected = F.layer_norm(states, (old,), weight, bias, eps)
    torch.testing.assert_close(found[:, :old], expected, rtol=1e-5, atol=1e-6)
    assert found[:, old:].abs().max() < 1e-5 if new > old else True
    matrix = random(4, old, seed=3)
    torch.testing.assert_close(
        found @ axis.columns(matrix, 1, noise=0.5).T, expected @ matrix.T, rtol=1e-5, atol=1e-4
    )


@given(SIZES, SEEDS, st.sampled_from([Axis.copied, Axis.shared, Axis.averaged]))
@settings(deadline=None)
def test_a_last_norm_makes_good_for_tied_columns(sizes, seed, rule):
    """The output matrix is the table of embeddings: its columns are copied, never divided."""
    axis = rule(source_of(sizes, seed))
    normed, table = random(3, sizes[0]), random(7, sizes[0], seed=1)
    kept = axis.rows(normed, 1) * (axis.read / axis.write).double()
    if axis.means:
        kept[:, axis.old :] = 0.0  # what a LayerNorm makes of them
    torch.testing.assert_close(kept @ axis.rows(table, 1).T, normed @ table.T, rtol=1e-5, atol=1e-5)


@given(st.integers(1, 6), st.integers(0, 9), st.integers(1, 4), SEEDS)
@settings(deadline=None)
def test_blocks_stay_whole(old, more, size, seed):
    source = source_of((old, old + more), seed)
    found = in_blocks(source, size).tolist()
    assert len(found) == (old + more) * size
    for place, unit in enumerate(found):
        assert unit == source[place // size] * size + place % size


@given(SIZES, st.sampled_from(["spread", "last", "first"]))
@settings(deadline=None)
def test_copies_of_layers_follow_their_originals(sizes, which):
    old, new = sizes
    sources = layer_sources(old, new, which)
    assert len(sources) == new
    assert sources == sorted(sources)
    counts = [sources.count(layer) for layer in range(old)]
    assert min(counts) >= 1
    assert max(counts) - min(counts) <= 1
    if which != "spread":
        assert counts == sorted(counts, reverse=which == "first")


def test_layers_are_copied_evenly_over_the_depth():
    assert layer_sources(4, 6, "spread") == [0, 0, 1, 2, 2, 3]
    assert layer_sources(4, 6, "last") == [0, 1, 2, 2, 3, 3]
    assert layer_sources(4, 6, "first") == [0, 0, 1, 1, 2, 3]
    assert layer_sources(2, 5, "last") == [0, 0, 1, 1, 1]
