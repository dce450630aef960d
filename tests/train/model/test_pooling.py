"""Pooling is what its words say, one text at a time, wherever the padding lies."""

from typing import get_args

import pytest
import torch

from rekindle.train.embedding.folder import POOLINGS
from rekindle.train.model.parts.head_config import Pooling
from rekindle.train.model.parts.pooling import pooled

DIRECT = {
    "mean": lambda own, at: own.mean(0),
    "cls": lambda own, at: own[0],
    "lasttoken": lambda own, at: own[-1],
    "max": lambda own, at: own.max(0).values,
    "mean_sqrt_len_tokens": lambda own, at: own.sum(0) / len(own) ** 0.5,
    "weightedmean": lambda own, at: (own * at[:, None]).sum(0) / at.sum(),
}


@pytest.mark.parametrize("mode", POOLINGS)
@pytest.mark.parametrize("before", [False, True], ids=["padded after", "padded before"])
def test_each_mode_is_a_direct_computation(mode, before):
    torch.manual_seed(0)
    states, lengths = torch.randn(4, 7, 5), [7, 1, 4, 3]
    places = torch.arange(7)
    mask = torch.stack([(places >= 7 - n) if before else (places < n) for n in lengths])
    for skipped in (0, 2):
        found = pooled(states, mask, [mode], skipped)
        for row, length in enumerate(lengths):
            own, at = states[row][mask[row]][skipped:], torch.arange(1, length + 1)[skipped:]
            if len(own):
                expected = DIRECT[mode](own, at.float())
                torch.testing.assert_close(found[row], expected)


def test_several_modes_stand_one_after_another():
    states, mask = torch.randn(2, 3, 4), torch.ones(2, 3)
    parts = [pooled(states, mask, [mode]) for mode in ("max", "cls")]
    assert torch.equal(pooled(states, mask, ["max", "cls"]), torch.cat(parts, 1))


def test_teachers_and_students_know_the_same_modes():
    assert get_args(Pooling) == POOLINGS
