"""From logits to what the cache keeps, on the teacher's device, in float32. No models, no files.

N rows (positions), V real tokens of the vocabulary, K kept, T temperatures.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rekindle.data.errors import InputError
from rekindle.data.targets.codec import Columns, encode_odds, fixed_point
from rekindle.data.targets.codecs import CODECS
from rekindle.data.targets.head import encode_hidden
from rekindle.data.targets.kinds.registry import KINDS
from rekindle.data.targets.schema import TeacherInfo, rank_dtype
from rekindle.pipeline.caching.sampling import random_sample, threshold_sample, uniforms
from rekindle.train.model.split_model import OutputHead

# At most this much [rows, V] float32 at once. On a CPU small enough for the allocator to reuse the
# block: larger ones are mapped and unmapped at every operation, and page faults then cost more than
# the arithmetic.
LOGITS_BYTES = {"cpu": 16 << 20, "cuda": 512 << 20}
LOWEST = -1e5  # stands for −inf below the largest logit: its exponential is 0, and 0 · LOWEST is 0


@dataclass(frozen=True)
class Extras:
    """What some kinds of targets need of each row besides its logits."""

    keys: Tensor | None = None  # [N,2] of the generator, for samples
    kept: Tensor | None = None  # [N,K] ids that are stored already, for tails

    def rows(self, part: slice) -> "Extras":
        """Those of some rows."""
        keys, kept = self.keys, self.kept
        return Extras(keys if keys is None else keys[part], kept if kept is None else kept[part])


NO_EXTRAS = Extras()


@dataclass(frozen=True)
class RowScores:
    """What is taken from a block of logits, on the device."""

    gold_log_prob: Tensor  # [N]
    gold_rank: Tensor  # [N]
    entropy: Tensor  # [N]
    log_probs: Tensor | None = None  # [N,K] by falling probability, or [N,V] for dense targets
    ids: Tensor | None = None  # [N,K]
    tail_log_odds: Tensor | None = None  # [N,T]
    counts: Tensor | None = None  # [N,K] of random samples


def score_hidden(
    hidden: Tensor, head: OutputHead, gold: Tensor, info: TeacherInfo, extras: Extras = NO_EXTRAS
) -> Iterator[Columns]:
    """Yield the cache's columns of ``hidden`` [N,H], a bounded block of rows at a time.

    ``gold`` [N] are the true ids.

    The head is cut to the tokenizer's vocabulary before any normalisation: rows that pad it to a
    round size (30,522 → 30,528) are not tokens and get no probability.
    """
    assert info.vocabulary_size is not None
    real, scorer = head.cut(info.vocabulary_size), SCORERS[info.kind](info)
    step = max(1, LOGITS_BYTES[hidden.device.type] // (4 * info.vocabulary_size))
    for start in range(0, len(hidden), step):
        states, truth = hidden[start : start + step], gold[start : start + step]
        more = extras.rows(slice(start, start + step))
        yield scorer.columns(states, real.logits(states), truth, more)


@dataclass(frozen=True)
class Block:
    """A block of logits on the device, as the kinds of targets take it."""

    relative: Tensor  # [N,V] logits less the row's largest
    weights: Tensor  # [N,V] their exponentials, which may be overwritten
    normaliser: Tensor  # [N,1] log Σ weights
    ids: Tensor  # [N,K] the likeliest ids
    above: Tensor  # [N,K] their logits less the row's largest
    tail_log_odds: Tensor  # [N,T] log(mass of `ids` / mass outside), of kinds with a tail


class Scorer:
    """Takes one kind of target from logits."""

    def __init__(self, info: TeacherInfo):
        self.info, self.kind = info, KINDS[info.kind](info)

    def columns(self, states: Tensor, logits: Tensor, gold: Tensor, extras: Extras) -> Columns:
        """Return the columns of a block: ``states`` [N,H], ``logits`` [N,V], ``gold`` [N]."""
        return to_columns(self.scores(logits, gold, extras), self.info)

    def kept(self, block: Block, extras: Extras) -> dict[str, Tensor]:
        """Return what is kept of the rows, under names of ``RowScores``."""
        return {}

    def scores(self, logits: Tensor, gold: Tensor, extras: Extras) -> RowScores:
        """Return the scores of a block of float32 ``logits`` [N,V], which is overwritten.

        ``gold`` [N] are the true ids. Masses outside the kept ids are sums over those ids, never
        1 − kept. Raises InputError when the teacher's logits are NaN or +inf.
        """
        with_tail = self.kind.has_tail
        top, ids = torch.topk(logits, self.info.k if with_tail and self.info.k else 1, dim=1)
        gold_logit = logits.gather(1, gold[:, None])
        gold_rank = (logits > gold_logit).sum(dim=1)
        highest = top[:, :1].clone()
        relative = _relative(logits, highest, self.info)
        odds, weights = _tail_log_odds(relative, ids if with_tail else None, self.info.temperatures)
        total = weights.sum(dim=1)
        entropy = total.log() - torch.einsum("nv,nv->n", weights, relative) / total
        normaliser = total.log()[:, None]
        block = Block(relative, weights, normaliser, ids, top - highest, odds)
        scalars = ((gold_logit - highest - normaliser)[:, 0], gold_rank, entropy)
        return RowScores(*scalars, **self.kept(block, extras))


class TopKScorer(Scorer):
    """The K likeliest ids and what lies outside them."""

    def kept(self, block: Block, extras: Extras) -> dict[str, Tensor]:
        """Return ids, log-probabilities and tails."""
        log_probs = block.above - block.normaliser
        return {"log_probs": log_probs, "ids": block.ids, "tail_log_odds": block.tail_log_odds}


class ThresholdScorer(Scorer):
    """An unbiased sample of K distinct ids."""

    def kept(self, block: Block, extras: Extras) -> dict[str, Tensor]:
        """Return ids, and values that give their probabilities; nothing lies outside."""
        assert self.info.k is not None
        probs, keys = _tempered_probs(block, self.info, extras)
        ids, values = threshold_sample(probs, self.info.k, uniforms(keys, 1)[:, 0])
        # Readers divide by the temperature: log q · τ is what gives q at τ.
        log_probs = values.log() * self.info.temperatures[0]
        odds = torch.full((len(ids), 1), torch.inf, device=ids.device)
        return {"log_probs": log_probs, "ids": ids, "tail_log_odds": odds}


class RandomScorer(Scorer):
    """K draws with replacement."""

    def kept(self, block: Block, extras: Extras) -> dict[str, Tensor]:
        """Return the ids that were drawn and how often."""
        assert self.info.k is not None
        probs, keys = _tempered_probs(block, self.info, extras)
        ids, counts = random_sample(probs, self.info.k, uniforms(keys, self.info.k))
        return {"ids": ids, "counts": counts}


class DenseScorer(Scorer):
    """The whole distribution."""

    def kept(self, block: Block, extras: Extras) -> dict[str, Tensor]:
        """Return every log-probability."""
        return {"log_probs": block.relative - block.normaliser}


class HiddenScorer(Scorer):
    """The states that the output matrix multiplies."""

    def columns(self, states: Tensor, logits: Tensor, gold: Tensor, extras: Extras) -> Columns:
        """Return the scalars and the states."""
        stored, scale = encode_hidden(states.float().cpu().numpy())
        scalars = super().columns(states, logits, gold, extras)
        return scalars | {"hidden": stored, "hidden_scale": scale}


class TailsScorer(Scorer):
    """Tail masses of ids that are stored already."""

    def columns(self, states: Tensor, logits: Tensor, gold: Tensor, extras: Extras) -> Columns:
        """Return log(kept mass / mass outside) [N,T], as it is stored."""
        assert extras.kept is not None
        relative = _relative(logits, logits.max(dim=1, keepdim=True).values, self.info)
        odds, _ = _tail_log_odds(relative, extras.kept, self.info.temperatures)
        return {"tail_log_odds": encode_odds(odds.cpu().numpy())}


SCORERS: dict[str, type[Scorer]] = {
    "topk": TopKScorer,
    "threshold": ThresholdScorer,
    "random": RandomScorer,
    "dense": DenseScorer,
    "hidden": HiddenScorer,
    "tails": TailsScorer,
}


def _relative(logits: Tensor, highest: Tensor, info: TeacherInfo) -> Tensor:
    if not bool(torch.isfinite(highest).all()) or bool(torch.isnan(logits).any()):
        raise InputError(
            f"teacher {info.name!r} produced logits that are NaN or infinite in {info.precision}; "
            "its targets would be worthless. Try `precision: fp32` for it, and check the model"
        )
    return logits.sub_(highest).clamp_(min=LOWEST)


def _tail_log_odds(
    relative: Tensor, kept: Tensor | None, temperatures: tuple[float, ...]
) -> tuple[Tensor, Tensor]:
    """log(kept mass / mass outside) [N,T] at each temperature, and exp(relative) [N,V].

    Nothing but the latter without ``kept`` ids.
    """
    weights, above = torch.empty_like(relative), None
    odds = {}
    for tau in sorted({1.0, *(temperatures if kept is not None else ())}, reverse=True):
        _exponentials(relative, tau, weights, above)
        above = tau
        if kept is not None:
            inside = weights.gather(1, kept)
            rest = weights.scatter_(1, kept, 0.0).sum(dim=1)
            weights.scatter_(1, kept, inside)
            odds[tau] = inside.sum(dim=1).log() - rest.log()
    if above != 1.0:  # temperatures below 1 come after it
        _exponentials(relative, 1.0, weights, None)
    if kept is None:
        return relative[:, :0], weights
    return torch.stack([odds[tau] for tau in temperatures], dim=1), weights


def _tempered_probs(block: Block, info: TeacherInfo, extras: Extras) -> tuple[Tensor, Tensor]:
    """Return probabilities [N,V] at a sample's one temperature, and the keys to draw with."""
    assert extras.keys is not None
    (tau,) = info.temperatures
    if tau != 1.0:
        _exponentials(block.relative, tau, block.weights, None)
    return block.weights / block.weights.sum(dim=1, keepdim=True), extras.keys


def _exponentials(relative: Tensor, tau: float, out: Tensor, above: float | None) -> None:
    """exp(relative/τ) into ``out``, which holds those of the temperature ``above``: squared, if
    that is 2τ or 4τ.
    """
    if above is not None and above / tau in (2.0, 4.0):
        for _ in range(int(above / tau) // 2):
            out.square_()
        return
    torch.div(relative, tau, out=out)
    out.exp_()


def to_columns(scores: RowScores, info: TeacherInfo) -> Columns:
    """The cache's columns (NumPy) of one block of scores."""
    assert info.vocabulary_size is not None
    dtype = rank_dtype(info.vocabulary_size)
    rank = np.minimum(scores.gold_rank.cpu().numpy(), np.iinfo(dtype).max).astype(dtype)
    columns: Columns = {
        "gold_log_prob": fixed_point(-scores.gold_log_prob.cpu().numpy()),
        "gold_rank": rank,
        "entropy": fixed_point(scores.entropy.clamp_min(0).cpu().numpy()),
    }
    if scores.counts is not None and scores.ids is not None:
        ids = scores.ids.to(torch.int32).cpu().numpy()
        return columns | {"ids": ids, "counts": scores.counts.cpu().numpy()}
    if scores.log_probs is None:
        return columns
    log_probs = scores.log_probs.cpu().numpy()
    if scores.ids is None or scores.tail_log_odds is None:
        return columns | {"log_probs": log_probs}
    odds = scores.tail_log_odds.cpu().numpy()
    return columns | CODECS[info.codec].encode(
        scores.ids.cpu().numpy(), log_probs, odds, info.vocabulary_size
    )
