"""Encoded targets at given ids, made without a codec: what their integers say is what they are."""

import torch
from torch import Tensor

from rekindle.kernels.encoded import NO_TAIL, EncodedTargets


def encoded_rows(ids: Tensor, temperature: float) -> EncodedTargets:
    """Return targets at ids [N,K] below 2¹⁶, by falling probability; steepness and tail differ from
    row to row, and every fourth row has no tail.
    """
    rows, kept = ids.shape
    assert int(ids.max()) < 2**16
    row = torch.arange(rows)
    values = torch.linspace(0, 255, kept).to(torch.uint8).repeat(rows, 1)
    highest = 100 + 50 * row
    lowest = highest + 2000 + 3000 * (row % 3)
    odds = torch.where(row % 4 == 3, NO_TAIL, 1500 - 1000 * (row % 4))
    columns = {
        "ids": ids.cpu().to(torch.uint16),
        "values": values,
        "log_prob_max": highest.to(torch.uint16),
        "log_prob_min": lowest.to(torch.uint16),
        "tail_log_odds": odds.to(torch.int16),
    }
    sent = {name: column.to(ids.device) for name, column in columns.items()}
    return EncodedTargets(**sent, temperature=temperature)
