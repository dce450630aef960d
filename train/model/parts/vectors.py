"""What makes one vector of a text: pooling of the states, a projection, and length 1.

The same numbers as sentence-transformers' modules Pooling, Dense and Normalize give. B texts, S
tokens, H numbers of a state, D of a vector.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rekindle.train.model.parts.head_config import Pooling


class VectorHead(nn.Module):
    """Vectors [B,D] of the body's states: ``size`` D where they are projected, else H."""

    def __init__(self, width: int, size: int | None, pooling: Pooling, normalise: bool):
        super().__init__()
        self.pooling, self.normalise = pooling, normalise
        self.projection: nn.Linear | None = None
        if size is not None:
            self.projection = nn.Linear(width, size)
            nn.init.normal_(self.projection.weight, std=width**-0.5)  # lengths stay about the same
            nn.init.zeros_(self.projection.bias)

    def forward(self, states: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return vectors [B,D] of the body's ``states`` [B,S,H]."""
        vectors = pooled(states, inputs["attention_mask"], self.pooling)
        if self.projection is not None:
            vectors = self.projection(vectors)
        return F.normalize(vectors, dim=1) if self.normalise else vectors


def pooled(states: Tensor, attention_mask: Tensor, pooling: Pooling) -> Tensor:
    """Return one vector [B,H] for the states [B,S,H] of each text; ``attention_mask`` [B,S], 1 at
    its tokens, which stand at the front.
    """
    if pooling == "cls":
        return states[:, 0]
    if pooling == "lasttoken":
        last = attention_mask.sum(dim=1).clamp_min(1) - 1
        return states[torch.arange(len(states), device=states.device), last]
    inside = attention_mask[:, :, None].to(torch.bool)
    if pooling == "max":
        return states.masked_fill(~inside, torch.finfo(states.dtype).min).amax(dim=1)
    weights = inside.to(states.dtype)
    return (states * weights).sum(dim=1) / weights.sum(dim=1).clamp_min(1e-9)
