"""How much each of several classifiers is believed of an example (MUKI): certainty and weights.

Source: "From Mimicking to Integrating: Knowledge Integration for Pre-Trained Language Models",
Findings of EMNLP 2022. Shapes: B sequences, J experts, C classes of one.
"""

import torch
from torch import Tensor

from rekindle.train.config import UncertaintyConfig

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
