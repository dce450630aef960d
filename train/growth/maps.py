"""Which old unit each unit of a grown model copies, and with what weights. Pure index arithmetic.

A unit is a hidden dimension, a neuron of a feed-forward layer, or one dimension of an attention
head. d old units become D; the new unit j copies ``source[j]``. What computes a unit (a row of a
matrix, an entry of a bias) is copied and multiplied by ``write[j]``; what reads it (a column) is
copied and multiplied by ``read[j]``. Nothing changes downstream if for every old unit i

    Σ_{j: source[j] = i} write[j] · read[j] = 1.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Generator, Tensor

CopiedLayers = Literal["spread", "last", "first"]


@dataclass(frozen=True)
class Axis:
    """How one kind of unit grows from d to D.

    ``means``: the units after the d-th copy nothing but hold the mean of all old ones, so that a
    LayerNorm finds the old mean and turns them into 0; they are read through copied columns.
    ``norm_scale``: factor of the weights of a norm over these units; its eps is multiplied by the
    square.
    """

    source: Tensor  # [D] int64
    write: Tensor  # [D] float64
    read: Tensor  # [D] float64
    means: bool = False
    norm_scale: float = 1.0

    @classmethod
    def copied(cls, source: Tensor) -> "Axis":
        """Copy rows, and divide columns by the multiplicity: ELLE's and Net2Net's rule."""
        read = 1.0 / torch.bincount(source)[source].double()
        return cls(source, torch.ones_like(read), read)

    @classmethod
    def shared(cls, source: Tensor) -> "Axis":
        """Divide rows and columns by √multiplicity: the sum of squares stays, so an RMSNorm over D
        units with eps·d/D gives √(d/D) of its former value, for any d and D.
        """
        share = torch.bincount(source)[source].double().rsqrt()
        return cls(source, share, share.clone(), norm_scale=_norm_scale(source))

    @classmethod
    def averaged(cls, source: Tensor) -> "Axis":
        """Keep the old units, and add new ones that hold their mean: the mean stays, and the
        variance over D units is d/D of the old one, which weights and eps of a LayerNorm correct.
        """
        ones = torch.ones(len(source), dtype=torch.float64)
        return cls(source, ones, ones.clone(), means=True, norm_scale=_norm_scale(source))

    @property
    def old(self) -> int:
        """Return d; every old unit has a copy."""
        return int(self.source.max()) + 1

    def rows(self, tensor: Tensor, dim: int = 0) -> Tensor:
        """Return what computes the units, grown along ``dim``."""
        grown = tensor.index_select(dim, self.source) * _reshape_along(self.write, tensor, dim)
        if self.means:
            added = len(self.source) - self.old
            mean = tensor.mean(dim, keepdim=True, dtype=torch.float64).to(tensor.dtype)
            grown.narrow(dim, self.old, added).copy_(mean.expand_as(grown.narrow(dim, 0, added)))
        return grown

    def columns(
        self,
        tensor: Tensor,
        dim: int,
        noise: float = 0.0,
        draw: Generator | None = None,
        keep_sum: bool = False,
    ) -> Tensor:
        """Return what reads the units, grown along ``dim``.

        ``noise``: standard deviation of the noise added to the columns of every copy but the first.
        With ``keep_sum`` the first gets the negative sum, as only the sum over equal units matters.
        """
        grown = tensor.index_select(dim, self.source) * _reshape_along(self.read, tensor, dim)
        if noise and not self.means:
            noise_values = noise * torch.randn(grown.shape, generator=draw, dtype=grown.dtype)
            noise_values.narrow(dim, 0, self.old).zero_()  # the first d are the originals
            grown += noise_values
            if keep_sum:
                first = grown.narrow(dim, 0, self.old)
                first -= torch.zeros_like(first).index_add_(dim, self.source, noise_values)
        return grown

    def norm(self, tensor: Tensor, *, bias: bool, read: bool) -> Tensor:
        """Return the grown weight or bias of a norm. ``read``: its output goes into columns that
        are not divided (a tied output matrix), so it is divided here.
        """
        factor = self.write if bias else torch.full_like(self.write, self.norm_scale)
        if read:
            factor = factor * self.read / self.write
        grown = tensor[self.source] * factor.to(tensor.dtype)
        if bias and self.means:
            grown[self.old :] = 0.0
        return grown


def _norm_scale(source: Tensor) -> float:
    """Return √(d/D)."""
    return math.sqrt((int(source.max()) + 1) / len(source))


def _reshape_along(values: Tensor, tensor: Tensor, dim: int) -> Tensor:
    """Return ``values`` reshaped to multiply ``tensor`` along ``dim``."""
    shape = [1] * tensor.dim()
    shape[dim] = -1
    return values.to(tensor.dtype).reshape(shape)


def balanced_sources(old: int, new: int, draw: Generator) -> Tensor:
    """Return [new] int64: 0..old-1, then shuffled rounds; numbers of copies differ by at most 1."""
    rounds = [torch.arange(old)]
    while len(rounds) * old < new:
        rounds.append(torch.randperm(old, generator=draw))
    return torch.cat(rounds)[:new]


def in_blocks(source: Tensor, size: int) -> Tensor:
    """Return [D·size]: blocks of ``size`` consecutive units (a head's dimensions) that
    grow as one.
    """
    return (source[:, None] * size + torch.arange(size)).flatten()


def layer_sources(old: int, new: int, which: CopiedLayers) -> list[int]:
    """Return the old layer of each of ``new`` layers, ascending, so copies follow their originals.

    Numbers of copies differ by at most 1; ``which`` layers get one more: evenly over the depth, the
    last or the first ones.
    """
    if which == "spread":
        return [place * old // new for place in range(new)]
    copies, remainder = divmod(new, old)
    copied_once_more = range(old - remainder, old) if which == "last" else range(remainder)
    return [layer for layer in range(old) for _ in range(copies + (layer in copied_once_more))]
