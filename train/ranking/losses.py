"""The losses for fine-tuning a ranker, over the whole groups of a batch. R rows, G groups.

pointwise: each document by itself, mean over the rows. If every grade of the train split is 0 or 1,
or true and false (clicks), binary cross-entropy of σ(score) against it; otherwise the squared error
of the score against the grade.

pairwise: RankNet (Burges et al., ICML 2005). log(1 + exp(−(sᵢ − sⱼ))) for every two documents of a
group with grades gᵢ > gⱼ, mean over all such pairs of the batch.

listwise: ListNet (Cao et al., ICML 2007), its top-one form. Cross-entropy between softmax(grades /
temperature) and softmax(scores) of a group, mean over the groups of the batch.
"""

import torch
from torch import Tensor
from torch.nn import functional

from rekindle.train.ranking.kinds import Loss


def ranking_loss(
    scores: Tensor,
    grades: Tensor,
    groups: Tensor,
    loss: Loss,
    *,
    temperature: float = 1.0,
    clicks: bool = False,
) -> Tensor:
    """Return the mean loss of a batch from ``scores``, ``grades`` and ``groups`` [R] (any numbers,
    equal for rows of one group); ``clicks``: whether the train split's grades are all 0 or 1.
    """
    if loss == "pointwise":
        return pointwise(scores, grades, clicks)
    same = groups[:, None] == groups[None, :]  # [R,R]
    if loss == "pairwise":
        return pairwise(scores, grades, same)
    return listwise(scores, grades, same, temperature)


def pointwise(scores: Tensor, grades: Tensor, clicks: bool) -> Tensor:
    """Return the binary cross-entropy of clicks, or the squared error of grades."""
    if clicks:
        return functional.binary_cross_entropy_with_logits(scores, grades)
    return functional.mse_loss(scores, grades)


def pairwise(scores: Tensor, grades: Tensor, same: Tensor) -> Tensor:
    """Return RankNet's logistic loss over the pairs of different grade; 0 if there is none."""
    better = same & (grades[:, None] > grades[None, :])
    pair_losses = functional.softplus(scores[None, :] - scores[:, None])
    return pair_losses.masked_fill(~better, 0).sum() / better.sum().clamp(min=1)


def listwise(scores: Tensor, grades: Tensor, same: Tensor, temperature: float) -> Tensor:
    """Return ListNet's cross-entropy, mean over the groups."""
    sizes = same.to(scores.dtype).sum(dim=1)
    group_grades = (grades / temperature)[None, :].expand_as(same).masked_fill(~same, -torch.inf)
    grade_probs = torch.exp(
        grades / temperature - group_grades.logsumexp(dim=1)
    )  # [R] for each document
    group_scores = scores[None, :].expand_as(same).masked_fill(~same, -torch.inf)
    log_probs = scores - group_scores.logsumexp(dim=1)
    return -(grade_probs * log_probs).sum() / (1 / sizes).sum()  # the sum is the number of groups
