"""The softmax that a loss reads: shares of the ids that no target lists, and masses of the rest."""

import pytest
import torch

from rekindle.kernels import softmax
from rekindle.kernels.softmax import Slots, softmax_, squared, times_line_

ROWS, VOCABULARY, KEPT = 7, 300, 5


@pytest.mark.parametrize("piece_rows", [1, 4, 7])
def test_pieces_of_rows_are_the_whole(piece_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, slope, start = torch.randn(ROWS, 11), torch.randn(ROWS, 1), torch.randn(ROWS, 1)
    expected = x * (x * slope + start)
    monkeypatch.setattr(softmax, "_PIECE_BYTES", piece_rows * x[0].nbytes)
    times_line_(x, slope, start)
    assert torch.equal(x, expected)


@pytest.mark.parametrize("spread", [0.01, 1.0, 30.0, 1e4])
def test_shares_at_one_are_squares_of_those_at_two(spread: float) -> None:
    """Also with an id in the complement that cannot occur."""
    g = torch.Generator().manual_seed(0)
    z = spread * torch.randn(ROWS, VOCABULARY, generator=g, dtype=torch.float64)
    ids = torch.stack([torch.randperm(VOCABULARY, generator=g)[:KEPT] for _ in range(ROWS)])
    z[0, ids[0, 0] - 1] = -torch.inf
    slots, at_two, expected = Slots.gather(z, ids), z / 2, z.clone()
    truth = softmax_(expected, slots, 1.0)
    at_one, squares = squared(at_two, softmax_(at_two, slots, 2.0), slots)
    torch.testing.assert_close(at_two.square() / squares, expected, rtol=1e-11, atol=1e-300)
    for found, right in zip(at_one[:-1], truth[:-1], strict=True):
        torch.testing.assert_close(found, right, rtol=1e-11, atol=1e-11)


def test_equal_shares_of_many_ids_are_summed_well() -> None:
    """A head of zeros, in float32; PyTorch's norm of the row is wrong by 1e-4 here."""
    vocabulary = 151_936
    shares, none = torch.zeros(2, vocabulary), torch.empty(2, 0, dtype=torch.long)
    slots = Slots.gather(shares, none)
    at_one, squares = squared(shares, softmax_(shares, slots, 2.0), slots)
    torch.testing.assert_close(squares, torch.full((2, 1), 1 / vocabulary), rtol=1e-6, atol=0)
    torch.testing.assert_close(
        at_one.largest, torch.full((2, 1), 1 / vocabulary), rtol=1e-6, atol=0
    )
