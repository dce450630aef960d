"""Mixtures of sparse targets: exact mass, distinct ids, falling probabilities, honest tails."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rekindle.kernels.losses import kd_loss, merge_targets


def teachers_of(seed: int, rows: int, vocabulary: int, sizes: list[int]) -> list:
    g = torch.Generator().manual_seed(seed)
    out = []
    for k in sizes:
        dense = (3 * torch.randn(rows, vocabulary, generator=g, dtype=torch.float64)).softmax(1)
        ids = torch.rand(rows, vocabulary, generator=g).argsort(1)[:, :k]
        probs = dense.gather(1, ids)
        hole = torch.rand(rows, k, generator=g) < 0.2
        tail = (1 - torch.where(hole, 0.0, probs).sum(1)).clamp(min=0)  # 1 - 1 may round below 0
        out.append((torch.where(hole, -1, ids), probs, tail))
    return out


def dense(ids: Tensor, probs: Tensor, vocabulary: int) -> Tensor:
    out = torch.zeros(ids.shape[0], vocabulary + 1, dtype=probs.dtype)
    out.scatter_add_(1, torch.where(ids >= 0, ids, vocabulary), torch.where(ids >= 0, probs, 0.0))
    return out[:, :vocabulary]


@given(
    seed=st.integers(0, 10**6),
    rows=st.integers(0, 4),
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=4),
    per_row=st.booleans(),
)
@settings(max_examples=80, deadline=None)
def test_merged_is_the_weighted_sum(seed: int, rows: int, sizes: list[int], per_row: bool) -> None:
    vocabulary = 9
    teachers = teachers_of(seed, rows, vocabulary, sizes)
    weights = torch.rand(rows, len(sizes), dtype=torch.float64)
    weights[:, 0] = torch.where(torch.arange(rows) % 2 == 0, 0.0, weights[:, 0])
    weights = weights if per_row else torch.rand(len(sizes), dtype=torch.float64)
    ids, probs, tail = merge_targets(teachers, weights)
    w = weights.expand(rows, len(sizes))
    expected = torch.zeros(rows, vocabulary, dtype=torch.float64)
    expected_tail = torch.zeros(rows, dtype=torch.float64)
    listed: list[set] = [set() for _ in range(rows)]
    for t, (t_ids, t_probs, t_tail) in enumerate(teachers):
        present = (t_ids >= 0).any(1) & (w[:, t] != 0)
        expected += torch.where(present, w[:, t], 0.0)[:, None] * dense(t_ids, t_probs, vocabulary)
        expected_tail += torch.where(present, w[:, t] * t_tail, 0.0)
        for n in range(rows):
            if present[n]:
                listed[n] |= set(t_ids[n].tolist()) - {-1}
    torch.testing.assert_close(dense(ids, probs, vocabulary), expected)
    torch.testing.assert_close(tail, expected_tail)
    for n in range(rows):
        kept = [i for i in ids[n].tolist() if i >= 0]
        assert len(kept) == len(set(kept))
        assert set(kept) == listed[n]
        assert ids[n].tolist() == kept + [-1] * (ids.shape[1] - len(kept))
    falling = torch.where(ids >= 0, probs, -1.0)
    assert (falling[:, 1:] <= falling[:, :-1]).all()
    assert (probs[ids < 0] == 0).all()


def test_mass_in_another_teachers_tail_stays_in_the_tail() -> None:
    a = (torch.tensor([[4, 1]]), torch.tensor([[0.5, 0.3]]), torch.tensor([0.2]))
    b = (torch.tensor([[4, 2]]), torch.tensor([[0.6, 0.3]]), torch.tensor([0.1]))
    ids, probs, tail = merge_targets([a, b], [0.5, 0.5])
    assert ids.tolist() == [[4, 1, 2, -1]]
    torch.testing.assert_close(probs, torch.tensor([[0.55, 0.15, 0.15, 0.0]]))
    torch.testing.assert_close(tail, torch.tensor([0.15]))
    torch.testing.assert_close(probs.sum(1) + tail, torch.ones(1))


def test_order_and_dtype_of_ids_do_not_matter() -> None:
    (ids, probs, tail), *_ = teachers_of(0, 3, 50, [8])
    one = merge_targets([(ids.to(torch.int32), probs.float(), tail)], [1.0])
    two = merge_targets([(ids.flip(1), probs.float().flip(1), tail)], torch.tensor([1.0]))
    for x, y in zip(one, two, strict=True):
        assert torch.equal(x, y)
    assert one[0].dtype == torch.int64
    assert one[1].dtype == torch.float32


def test_missing_tail_is_one_minus_the_sum() -> None:
    (ids, probs, _), *_ = teachers_of(0, 3, 50, [8])
    listed = torch.where(ids >= 0, probs, 0.0).sum(1)
    torch.testing.assert_close(merge_targets([(ids, probs, None)], [1.0])[2], 1 - listed)


def test_the_gradient_of_a_mixture_is_the_mixture_of_gradients() -> None:
    """For raw masses forward KL is linear in q up to a constant: merging changes no gradient."""
    teachers = teachers_of(5, 4, 30, [6, 7, 3])
    weights = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    z = torch.randn(4, 30, dtype=torch.float64, requires_grad=True)
    ids, probs, _ = merge_targets(teachers, weights)
    merged = kd_loss(z, ids, probs, tail="none").loss
    apart = sum(
        w * kd_loss(z, i, p, tail="none").loss
        for w, (i, p, _) in zip(weights, teachers, strict=True)
    )
    torch.testing.assert_close(torch.autograd.grad(merged, z), torch.autograd.grad(apart, z))


def test_bad_arguments_are_named() -> None:
    good = teachers_of(0, 3, 50, [8, 4])
    ids, probs, tail = good[0]
    for teachers, weights, message in (
        ([], [], "no teacher"),
        (good, [1.0], "weights"),
        (good, [1.0, -0.5], "negative"),
        ([(ids[:, :3], probs, tail)], [1.0], "teacher 0"),
        ([(ids, probs, tail[:2])], [1.0], "tail"),
        ([good[0], (ids[:2], probs[:2], None)], [0.5, 0.5], "teacher 1"),
    ):
        with pytest.raises(ValueError, match=message):
            merge_targets(teachers, weights)
