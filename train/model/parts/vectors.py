"""Make one vector of a text: pooling of the states, a projection, and scaling to length 1.

The numbers equal those of sentence-transformers' modules Pooling, Dense and Normalize. B texts, S
tokens, H numbers of a state, D of a vector.
"""

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor, nn

from rekindle.train.model.parts.head_config import Pooling
from rekindle.train.model.parts.pooling import pooled


class VectorHead(nn.Module):
    """Vectors [B,D] of the body's states: D is ``size`` if they are projected, else H."""

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
        vectors = pooled(states, inputs["attention_mask"], (self.pooling,))
        if self.projection is not None:
            vectors = self.projection(vectors)
        return F.normalize(vectors, dim=1) if self.normalise else vectors
