"""Combine what several classifiers say of an example into one target (MUKI): certainty and weights.

Source: "From Mimicking to Integrating: Knowledge Integration for Pre-Trained Language Models",
Findings of EMNLP 2022. Shapes: B sequences, J experts, C_j labels of expert j, U labels of all.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from rekindle.train.config import UncertaintyConfig
from rekindle.train.objective.label_union import LabelUnion

FLOOR = 1e-6  # of a margin: an example that two experts claim alike still counts a little


def certainty(mc_probs: Tensor) -> Tensor:
    """Return S = 1 − H(p̄)/log C [B] of Monte-Carlo means p̄ [B,C]: 1 certain, 0 uniform."""
    entropy = -torch.xlogy(mc_probs, mc_probs).sum(dim=1)
    return 1.0 - entropy / torch.log(torch.tensor(float(mc_probs.shape[1])))


def expert_weights(certainties: Tensor, config: UncertaintyConfig) -> Tensor:
    """Return W [B,J] of certainties s [B,J]: softmax(s / sharpness), or 1 for the most certain."""
    if config.selection == "hard":
        best = certainties.argmax(dim=1, keepdim=True)
        return torch.zeros_like(certainties).scatter_(1, best, 1.0)
    return torch.softmax(certainties / config.sharpness, dim=1)


def margin(certainties: Tensor) -> Tensor:
    """Return V = s₍₁₎ − s₍₂₎ + 1e-6 [B]: how clearly one expert is the one to ask."""
    best = certainties.topk(2, dim=1).values
    return best[:, 0] - best[:, 1] + FLOOR


def mixed_target(
    union: LabelUnion,
    logits: Mapping[str, Tensor],
    weights: Tensor,
    temperature: float,
) -> Tensor:
    """Return Σ_j w_j · pad_j(softmax(z_j/τ)) [B,U], of ``logits`` z_j [B,C_j] and ``weights`` w
    [B,J].
    """
    parts = [
        weights[:, j : j + 1] * union.pad(name, torch.softmax(z / temperature, dim=1))
        for j, (name, z) in enumerate(logits.items())
    ]
    return torch.stack(parts).sum(dim=0)


def concatenated_target(
    union: LabelUnion, logits: Mapping[str, Tensor], temperature: float
) -> Tensor:
    """Return the softmax over all experts' logits z_j [B,C_j] side by side, among all labels [B,U].

    Labels that share a place add up. ``logits`` in the order of the union's experts.
    """
    probs = torch.softmax(torch.cat(list(logits.values()), dim=1) / temperature, dim=1)
    places = [place for own in union.places.values() for place in own]
    index = torch.tensor(places, device=probs.device)
    return probs.new_zeros(len(probs), len(union.names)).index_add_(1, index, probs)
