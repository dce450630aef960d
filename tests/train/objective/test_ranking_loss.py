"""Ranking losses by the numbers of a group, held against a direct computation over its pairs and
its whole list, however a step is split.
"""

from itertools import combinations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from rekindle.data.batch import Batch, SequenceTargetBatch
from rekindle.train.distributed import World
from rekindle.train.objective.ranking import (
    KEY_BITS,
    RankedRows,
    group_keys,
    groups_of,
    ranking_loss,
)
from rekindle.train.ranking.config import RankingConfig

scores = st.floats(-4, 4, width=32)
steps = st.lists(st.tuples(st.integers(0, 3), scores, scores), min_size=1, max_size=12)
WEIGHTS = [(1, 1, 0), (0, 1, 0), (0.5, 2, 0), (1, 0, 0), (0, 0, 1), (0.5, 0.3, 2)]


def directly(keys, own, wanted, config, tau=1.0):
    """The definition, over scores in float64: pairs are named one by one, lists are whole."""
    errors = own - wanted
    loss = config.pointwise * errors.square().mean()
    lists = [np.flatnonzero(keys == key) for key in np.unique(keys)]
    pairs = []
    for rows in lists:
        if config.pairs == "all":
            pairs += combinations(rows, 2)
        else:
            best = max(rows, key=lambda row: (wanted[row], -row))
            pairs += [(best, row) for row in rows if row != best]
    if pairs:
        apart = [(errors[i] - errors[j]) ** 2 for i, j in pairs]
        loss = loss + config.pairwise * torch.stack(apart).mean()
    divergences = [
        F.kl_div(
            torch.log_softmax(own[rows] / tau, 0),
            torch.softmax(wanted[rows] / tau, 0),
            reduction="sum",
        )
        for rows in lists
        if len(rows) > 1
    ]
    if divergences:
        loss = loss + config.listwise * tau**2 * torch.stack(divergences).mean()
    return loss


def cut(rows, part):
    return RankedRows(rows.keys[part], rows.index[part], rows.teacher_scores[part])


def by_parts(rows, own, config, tau, size):
    """The loss and the gradient of a step in micro-batches of so many rows."""
    own = own.clone().requires_grad_()
    wanted = torch.from_numpy(rows.teacher_scores)
    held = None if size >= len(own) else own.detach()
    groups, total = groups_of(rows, tau, held), 0.0
    for start in range(0, len(own), size):
        part = slice(start, start + size)
        loss = ranking_loss(own[part], wanted[part], cut(rows, part), groups, len(own), config, tau)
        loss.backward()
        total += float(loss.detach())
    return total, own.grad


@settings(deadline=None, max_examples=60)
@given(
    steps,
    st.integers(1, 12),
    st.sampled_from(WEIGHTS),
    st.sampled_from(["all", "best"]),
    st.sampled_from([1.0, 0.5, 3.0]),
)
def test_a_step_however_split_is_the_direct_computation(given_rows, size, weights, pairs, tau):
    names = ("pointwise", "pairwise", "listwise")
    config = RankingConfig(**dict(zip(names, weights, strict=True)), pairs=pairs)
    columns = [np.array(column) for column in zip(*given_rows, strict=True)]
    keys, wanted = columns[0], columns[2].astype(np.float64)
    rows = RankedRows(keys, np.arange(len(keys)), wanted)
    own = torch.from_numpy(columns[1].astype(np.float64))
    total, gradient = by_parts(rows, own, config, tau, size)
    leaf = own.clone().requires_grad_()
    expected = directly(keys, leaf, torch.from_numpy(wanted), config, tau)
    expected.backward()
    assert total == pytest.approx(float(expected.detach()), rel=1e-9, abs=1e-9)
    assert torch.allclose(gradient, leaf.grad, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("size", [1, 3, 7])
@pytest.mark.parametrize("pairs", ["all", "best"])
def test_the_gradient_is_the_slope_of_the_loss(pairs, size):
    """By central differences, which know nothing of what is held constant."""
    draw = np.random.default_rng(3)
    keys = np.array([2, 5, 2, 2, 5, 9, 2])
    rows = RankedRows(keys, np.arange(7), draw.normal(size=7))
    config = RankingConfig(pointwise=0.4, pairwise=0.7, listwise=1.3, pairs=pairs)
    own = torch.from_numpy(draw.normal(size=7))
    gradient = by_parts(rows, own, config, 2.0, size)[1]
    step = 1e-5
    for row in range(7):
        moved = [own.clone() for _ in range(2)]
        moved[0][row] += step
        moved[1][row] -= step
        above, below = (by_parts(rows, one, config, 2.0, size)[0] for one in moved)
        assert float(gradient[row]) == pytest.approx((above - below) / (2 * step), abs=1e-8)


def test_a_worked_example():
    """Errors 1, 3 and 0 in one group, 5 alone in another: pairs 4, 1 and 9, of which those with the
    best, the second row, are 4 and 9.
    """
    keys, wanted = np.array([7, 7, 9, 7]), np.array([0.0, 2.0, 0.0, 1.0])
    rows, own = RankedRows(keys, np.array([10, 11, 12, 13]), wanted), torch.tensor([1.0, 5, 5, 1])
    groups = groups_of(rows, 1.0, own)
    assert (groups.keys, groups.sizes, groups.best) == ((7, 9), (3, 1), (11, 12))
    assert (groups.pair_count("all"), groups.pair_count("best"), groups.list_count) == (3, 2, 1)
    assert groups.student_sums.mean_errors.tolist() == [4 / 3, 5.0]
    assert groups.student_sums.best_errors.tolist() == [3.0, 5.0]
    for pairs, mean in (("all", 14 / 3), ("best", 13 / 2)):
        config = RankingConfig(pairwise=0.5, pairs=pairs)
        loss = ranking_loss(own, torch.from_numpy(wanted), rows, groups, 4, config)
        assert float(loss) == pytest.approx(35 / 4 + 0.5 * mean)


def test_a_sequence_that_is_twice_in_a_step_is_one_best():
    """Where a batch repeats the sequences of a short corpus: no pair is of the best with itself."""
    keys, wanted = np.zeros(4, np.int64), np.array([1.0, 3.0, 3.0, 3.0])
    rows = RankedRows(keys, np.array([4, 6, 5, 5]), wanted)
    own = torch.tensor([1.5, 3.0, 4.0, 4.0], dtype=torch.float64)
    groups = groups_of(rows, 1.0, own)
    assert (groups.best, groups.copies, groups.pair_count("best")) == ((5,), (2,), 2)
    config = RankingConfig(pointwise=0, pairs="best")
    total, gradient = by_parts(rows, own, config, 1.0, 2)
    assert total == pytest.approx((0.5**2 + 1.0**2) / 2)  # errors 0.5, 0 against 1
    assert gradient.tolist() == pytest.approx([-0.5, -1.0, 0.75, 0.75])


def rows_alike(count):
    return RankedRows(np.zeros(count, np.int64), np.arange(count), np.zeros(count))


@pytest.mark.parametrize("pairs", ["all", "best"])
def test_a_constant_error_has_no_loss_of_the_order(pairs):
    """An order is not a scale: all scores too high by the same are in the right order."""
    config = RankingConfig(pointwise=0, pairs=pairs, listwise=1.0)
    own = torch.full((6,), 2.5, requires_grad=True)
    rows = rows_alike(6)
    loss = ranking_loss(own, torch.zeros(6), rows, groups_of(rows, 1.0), 6, config)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0, abs=1e-6)
    assert own.grad.abs().max() < 1e-6


def test_a_part_without_the_steps_means_is_a_bug():
    rows = rows_alike(4)
    part = cut(rows, slice(0, 2))
    with pytest.raises(AssertionError, match="mean errors"):
        ranking_loss(torch.zeros(2), torch.zeros(2), part, groups_of(rows, 1.0), 4, RankingConfig())


def test_no_row_has_no_loss():
    none, nothing = rows_alike(0), torch.zeros(0)
    config = RankingConfig(listwise=1.0)
    assert float(ranking_loss(nothing, nothing, none, groups_of(none, 1.0), 0, config)) == 0
    some = groups_of(rows_alike(3), 1.0, torch.tensor([1.0, 2.0, 3.0]))
    assert float(ranking_loss(nothing, nothing, none, some, 3, config)) == 0


def batch_of(domains, documents=(), groups=()):
    count, nothing = len(domains), np.zeros((len(domains), 1), np.int32)
    index = np.arange(count)
    digests = ["d"] * count
    present = np.ones(count, bool)
    scored = SequenceTargetBatch(None, present, np.zeros((count, 1), np.float32), None)
    return Batch(
        *(index, digests, domains, nothing, index, None, {}, {"expert": scored}),
        **{"documents": documents, "groups": groups},
    )


def test_groups_are_the_batch_its_domains_its_documents_or_the_corpuss_own():
    batch = batch_of(["a", "b", None, "a"], ["x", "y", "x", "x"], ["q", "q", "r", "q"])
    q, same, r, last = group_keys(batch, "expert", "group").tolist()
    assert q == same == last != r
    assert len(set(group_keys(batch, "expert", "batch").tolist())) == 1
    a, b, none, again = group_keys(batch, "expert", "domain").tolist()
    assert a == again
    assert len({a, b, none}) == 3
    x, y, *others = group_keys(batch, "expert", "document").tolist()
    assert x != y
    assert others == [x, x]
    every = [a, b, none, x, y]
    assert all(0 <= key < 2**KEY_BITS and int(float(key)) == key for key in every)


@pytest.mark.parametrize("group", ["document", "group"])
def test_a_batch_that_does_not_know_its_groups_is_refused(group):
    with pytest.raises(ValueError, match=f"does not give the {group} of its"):
        group_keys(batch_of(["a", "b"]), "expert", group)


def test_values_of_one_process_are_gathered_as_they_are():
    assert World.alone().gather([3.0, 1.5]) == [[3.0, 1.5]]
