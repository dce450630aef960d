"""Pairwise errors in closed form, held against a loop over all pairs, however a step is split."""

from itertools import combinations
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rekindle.data.batch import Batch
from rekindle.train.config import RankingConfig
from rekindle.train.distributed import World
from rekindle.train.objective.ranking import (
    KEY_BITS,
    Centres,
    centres_of,
    group_keys,
    ranking_loss,
)

steps = st.lists(st.tuples(st.integers(0, 3), st.floats(-4, 4, width=32)), min_size=1, max_size=12)


def by_pairs(rows, config):
    """The definition: mean of e², and mean of (e − f)² over the pairs of equal keys."""
    points = [e**2 for _, e in rows]
    pairs = [(e - f) ** 2 for (k, e), (m, f) in combinations(rows, 2) if k == m]
    loss = config.pointwise * sum(points) / len(points)
    return loss + (config.pairwise * sum(pairs) / len(pairs) if pairs else 0.0)


def gradient_by_pairs(rows, config):
    errors = torch.tensor([e for _, e in rows], dtype=torch.float64, requires_grad=True)
    by_pairs([(k, errors[i]) for i, (k, _) in enumerate(rows)], config).backward()
    return errors.grad


@settings(deadline=None)
@given(steps, st.integers(1, 12), st.sampled_from([(1, 1), (0, 1), (0.5, 2), (1, 0)]))
def test_a_step_however_split_is_the_mean_over_all_pairs(rows, size, weights):
    config = RankingConfig(pointwise=weights[0], pairwise=weights[1])
    keys = np.array([k for k, _ in rows], np.int64)
    errors = torch.tensor([e for _, e in rows], requires_grad=True)
    whole = size >= len(rows)
    centres = centres_of(keys, None if whole else errors.detach().double().numpy())
    total = 0.0
    for start in range(0, len(rows), size):
        part = slice(start, start + size)
        loss = ranking_loss(errors[part], keys[part], centres, len(rows), config)
        loss.backward()
        total += float(loss.detach())
    assert total == pytest.approx(by_pairs(rows, config), rel=1e-4, abs=1e-4)
    assert torch.allclose(errors.grad.double(), gradient_by_pairs(rows, config), atol=1e-3)


def test_a_worked_example():
    """Errors 1, 3 and 0 in one group, 5 alone in another: pairs 4, 1 and 9."""
    rows = [(7, 1.0), (7, 3.0), (9, 5.0), (7, 0.0)]
    keys, errors = np.array([k for k, _ in rows]), torch.tensor([e for _, e in rows])
    centres = centres_of(keys, errors.detach().double().numpy())
    assert centres == Centres((7, 9), (3, 1), (4 / 3, 5.0))
    assert centres.pairs == 3
    loss = ranking_loss(errors, keys, centres, 4, RankingConfig(pairwise=0.5))
    assert float(loss) == pytest.approx(35 / 4 + 0.5 * 14 / 3)


def test_a_constant_error_has_no_pairwise_loss():
    """An order is not a scale: all scores too high by the same are in the right order."""
    errors, keys = torch.full((6,), 2.5, requires_grad=True), np.zeros(6, np.int64)
    loss = ranking_loss(errors, keys, centres_of(keys, None), 6, RankingConfig(pointwise=0))
    loss.backward()
    assert float(loss.detach()) == 0
    assert not errors.grad.any()


def test_a_part_without_the_steps_means_is_a_bug():
    keys = np.zeros(4, np.int64)
    with pytest.raises(AssertionError, match="mean errors"):
        ranking_loss(torch.zeros(2), keys[:2], centres_of(keys, None), 4, RankingConfig())


def test_no_row_has_no_loss():
    keys = np.zeros(0, np.int64)
    assert (
        float(ranking_loss(torch.zeros(0), keys, centres_of(keys, None), 0, RankingConfig())) == 0
    )
    some = centres_of(np.zeros(3, np.int64), np.array([1.0, 2.0, 3.0]))
    assert float(ranking_loss(torch.zeros(0), keys, some, 3, RankingConfig())) == 0


def batch_of(domains, documents=()):
    count, nothing = len(domains), np.zeros((len(domains), 1), np.int32)
    index = np.arange(count)
    digests = ["d"] * count
    targets = {"expert": SimpleNamespace(rows=index)}
    return Batch(index, digests, domains, nothing, index, None, {}, targets, documents=documents)


def test_groups_are_the_batch_its_domains_or_its_documents():
    batch = batch_of(["a", "b", None, "a"], ["x", "y", "x", "x"])
    assert len(set(group_keys(batch, "expert", "batch").tolist())) == 1
    a, b, none, again = group_keys(batch, "expert", "domain").tolist()
    assert a == again
    assert len({a, b, none}) == 3
    x, y, *others = group_keys(batch, "expert", "document").tolist()
    assert x != y
    assert others == [x, x]
    every = [a, b, none, x, y]
    assert all(0 <= key < 2**KEY_BITS and int(float(key)) == key for key in every)


def test_a_batch_that_does_not_know_its_documents_is_refused():
    with pytest.raises(ValueError, match="which document"):
        group_keys(batch_of(["a", "b"]), "expert", "document")


def test_values_of_one_process_are_gathered_as_they_are():
    assert World.alone().gather([3.0, 1.5]) == [[3.0, 1.5]]
