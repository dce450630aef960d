"""Pooling: the states of a text's tokens become one vector, in each way of sentence-transformers.

Shapes: B texts, S tokens, H hidden; D values of a vector, H for each mode.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from rekindle.train.model.parts.head_config import Pooling


def pooled(states: Tensor, mask: Tensor, modes: Sequence[Pooling], skipped: int = 0) -> Tensor:
    """Return fp32 vectors [B,D] of ``states`` [B,S,H]; ``mask`` [B,S] marks the tokens.

    The modes' vectors are concatenated. Padding may be at either end. All modes leave out the first
    ``skipped`` tokens of each text (a prompt).

    mean: their mean. cls: the first. lasttoken: the last. max: the largest of each value.
    mean_sqrt_len_tokens: their sum divided by the root of their number. weightedmean: their mean,
    the first with weight 1, the next with 2, … (SGPT, arXiv:2202.08904).
    """
    states, real = states.float(), mask.bool()
    numbers = real.long().cumsum(dim=1)  # 1, 2, …; padding before the text has 0
    real = real & (numbers > skipped)
    weights = real.float()[..., None]
    vectors = []
    for mode in modes:
        if mode in ("cls", "lasttoken"):
            places = torch.where(real, numbers, 0 if mode == "lasttoken" else numbers.shape[1] + 1)
            place = places.argmax(dim=1) if mode == "lasttoken" else places.argmin(dim=1)
            vectors.append(states[torch.arange(len(states), device=states.device), place])
        elif mode == "max":
            vectors.append(states.masked_fill(~real[..., None], -torch.inf).amax(dim=1))
        elif mode == "weightedmean":
            counted = weights * numbers[..., None]
            vectors.append((states * counted).sum(dim=1) / counted.sum(dim=1).clamp(min=1e-9))
        else:
            count = weights.sum(dim=1).clamp(min=1e-9)
            divisor = count.sqrt() if mode == "mean_sqrt_len_tokens" else count
            vectors.append((states * weights).sum(dim=1) / divisor)
    return torch.cat(vectors, dim=-1)
