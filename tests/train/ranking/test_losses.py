"""The losses that rankers are fine-tuned on against a direct computation; each gradient against the
differences of the loss.
"""

import math

import pytest
import torch

from rekindle.train.ranking.losses import ranking_loss

GROUPS = [4, 4, 1, 4, 1, 1, 9, 7, 7]  # one of a single document, one of one grade throughout
GRADES = [0.0, 2.0, 1.0, 1.0, 0.0, 3.0, 1.0, 2.0, 2.0]


def inputs(clicks):
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(len(GROUPS), generator=generator, dtype=torch.float64) * 2
    grades = torch.tensor(GRADES, dtype=torch.float64)
    return scores, (grades > 1).double() if clicks else grades, torch.tensor(GROUPS)


def direct(scores, grades, groups, loss, temperature, clicks):
    """Written with loops, from the papers."""
    s, g = scores.tolist(), grades.tolist()
    if loss == "pointwise":
        if not clicks:
            return sum((a - b) ** 2 for a, b in zip(s, g, strict=True)) / len(s)
        each = [-math.log(1 / (1 + math.exp(-a if b else a))) for a, b in zip(s, g, strict=True)]
        return sum(each) / len(each)
    members = [[i for i, one in enumerate(GROUPS) if one == name] for name in {*GROUPS}]
    if loss == "pairwise":
        pairs = [(i, j) for rows in members for i in rows for j in rows if g[i] > g[j]]
        return sum(math.log1p(math.exp(s[j] - s[i])) for i, j in pairs) / len(pairs)
    total = 0.0
    for rows in members:
        wanted = [math.exp(g[i] / temperature) for i in rows]
        given = [math.exp(s[i]) for i in rows]
        for w, p in zip(wanted, given, strict=True):
            total -= w / sum(wanted) * math.log(p / sum(given))
    return total / len(members)


@pytest.mark.parametrize("clicks", [False, True])
@pytest.mark.parametrize(
    ("loss", "temperature"),
    [("pointwise", 1.0), ("pairwise", 1.0), ("listwise", 1.0), ("listwise", 0.3)],
)
def test_a_loss_is_the_direct_computation_and_its_gradient_its_derivative(
    loss, temperature, clicks
):
    scores, grades, groups = inputs(clicks)
    how = {"loss": loss, "temperature": temperature, "clicks": clicks}

    def value(given):
        return ranking_loss(given, grades, groups, **how)

    expected = direct(scores, grades, groups, loss, temperature, clicks)
    assert value(scores).item() == pytest.approx(expected, rel=1e-12)
    assert torch.autograd.gradcheck(value, scores.clone().requires_grad_())
    order = torch.randperm(len(scores), generator=torch.Generator().manual_seed(1))
    moved = ranking_loss(scores[order], grades[order], groups[order], **how)
    assert moved.item() == pytest.approx(expected, rel=1e-12)


def test_pairs_of_a_batch_without_an_order_have_no_loss():
    scores = torch.randn(4, requires_grad=True)
    loss = ranking_loss(scores, torch.ones(4), torch.tensor([0, 0, 1, 2]), "pairwise")
    loss.backward()
    assert (loss.item(), scores.grad.abs().sum().item()) == (0, 0)
