"""From logits to what the cache keeps, on the teacher's device, in float32. No models, no files.

N rows (positions), V ids of the corpus, K kept, T temperatures; W = V + F with the F tokens that
only the teacher has, for targets with a tail (else W = V). A logit of −inf marks an id that is no
token.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rekindle.data.errors import InputError
from rekindle.data.targets.codec import Columns, encode_odds, fixed_point
from rekindle.data.targets.head import encode_hidden
from rekindle.data.targets.kinds.registry import KINDS
from rekindle.data.targets.schema import MAPPED_MASS, TeacherInfo, rank_dtype
from rekindle.pipeline.caching.encoding import on_device
from rekindle.pipeline.caching.in_flight import Finish
from rekindle.pipeline.caching.sampling import random_sample, threshold_sample, uniforms
from rekindle.pipeline.caching.vocabulary import TokenColumns
from rekindle.train.model.split_model import OutputHead

# At most this much [rows, V] float32 at once. On a CPU it is small enough for the allocator to
# reuse the block: larger ones are mapped and unmapped at every operation, and page faults then cost
# more than the arithmetic.
LOGITS_BYTES = {"cpu": 16 << 20, "cuda": 512 << 20}
# On a GPU, blocks whose scores are no larger together are encoded and copied at once: every
# operation and every copy costs the host some microseconds, however little it has to do.
TOGETHER_BYTES = 64 << 20
LOWEST = -1e5  # stands for −inf below the largest logit: its exponential is 0, and 0 · LOWEST is 0

# The log-probability of an id that is no token, where all are stored: zero in any sum, but finite
# for a reverse divergence, which multiplies it by the student's probability of the id.
NO_TOKEN = -100.0

NOT_FINITE = "not_finite"  # beside scores: whether the teacher's logits are NaN or +inf

# What some kinds need of each row besides its logits: the keys [N,2] that draw a sample, or the ids
# [N,K] already stored, for tails.
Extra = Tensor | None


def score_hidden(
    hidden: Tensor,
    head: OutputHead,
    gold: Tensor,
    info: TeacherInfo,
    extra: Extra = None,
    tokens: TokenColumns | None = None,
) -> Iterator[Columns]:
    """Yield the cache's columns of ``hidden`` [N,H], a bounded block of rows at a time.

    Like ``scored_blocks``, but waits for the device.
    """
    for finish, scores in scored_blocks(hidden, head, gold, info, extra, tokens):
        yield finish({name: values.cpu().numpy() for name, values in scores.items()})


def scored_blocks(
    hidden: Tensor,
    head: OutputHead,
    gold: Tensor,
    info: TeacherInfo,
    extra: Extra = None,
    tokens: TokenColumns | None = None,
) -> Iterator[tuple[Finish, dict[str, Tensor]]]:
    """Yield, for a bounded number of rows of ``hidden`` [N,H] at a time, what makes columns of them
    on the host, and what is kept of them on the device: encoded there if it is no CPU (on which
    NumPy encodes, whose bytes define the format). Does not wait for the device.

    ``gold`` [N] are the true ids. ``tokens``: which logits belong to which ids; None: row i belongs
    to id i, each a token.

    The head is cut to the corpus's vocabulary before any normalisation: rows that pad it to a round
    size (30,522 → 30,528) are not tokens and get no probability.
    """
    assert info.vocabulary_size is not None
    if tokens is None:
        tokens = TokenColumns(info.vocabulary_size, np.zeros(0, np.int64), np.zeros(0, np.int64))
    head_of_tokens, scorer = tokens.cut(head), SCORERS[info.kind](info)
    device = head.weight.device  # for a model over several devices, the last one
    hidden, gold = hidden.to(device), gold.to(device)
    extra = None if extra is None else extra.to(device)
    step = max(1, LOGITS_BYTES[device.type] // (4 * info.vocabulary_size))

    def blocks() -> Iterator[dict[str, Tensor]]:
        for start in range(0, len(hidden), step):
            states, truth = hidden[start : start + step], gold[start : start + step]
            block_extra = None if extra is None else extra[start : start + step]
            logits = head_of_tokens.logits(states)
            mass = {} if tokens.rows is None else {MAPPED_MASS: tokens.mapped_mass(logits)}
            yield mass | scorer.compute(states, tokens.arranged(logits), truth, block_extra)

    if _may_read(hidden):
        yield from ((scorer.encode, scores) for scores in blocks())
    else:
        for scores in _together(blocks()):
            yield scorer.to_host, scorer.encode_on_device(scores)


def _together(blocks: Iterator[dict[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """Join the scores of consecutive blocks, up to TOGETHER_BYTES."""
    waiting, size = list[dict[str, Tensor]](), 0
    for scores in blocks:
        block_size = sum(values.nbytes for values in scores.values())
        if waiting and size + block_size > TOGETHER_BYTES:
            yield _joined(waiting)
            waiting, size = [], 0
        waiting.append(scores)
        size += block_size
        del scores
        if size >= TOGETHER_BYTES:  # not held while the next block is made
            yield _joined(waiting)
            waiting, size = [], 0
    if waiting:
        yield _joined(waiting)


def _joined(blocks: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return scores one after another; of ``not_finite``, whether it holds of any."""
    if len(blocks) == 1:
        return blocks[0]
    joined = {n: torch.cat([one[n] for one in blocks]) for n in blocks[0] if n != NOT_FINITE}
    return joined | {NOT_FINITE: torch.stack([one[NOT_FINITE] for one in blocks]).any()}


def _may_read(values: Tensor) -> bool:
    """Return whether the values of tensors may be read: on a GPU, that would wait for the
    device.
    """
    return values.device.type == "cpu"


@dataclass(frozen=True)
class Block:
    """A block of logits on the device, as the kinds of targets take it."""

    relative: Tensor  # [N,W] logits less the row's largest
    weights: Tensor  # [N,W] their exponentials, which may be overwritten
    normaliser: Tensor  # [N,1] log Σ weights
    ids: Tensor  # [N,K] the likeliest ids
    top_logits: Tensor  # [N,K] their logits less the row's largest
    tail_log_odds: Tensor  # [N,T] log(mass of `ids` / mass outside), for kinds with a tail


class Scorer:
    """Computes one kind of target from logits; this base class only the scalars."""

    def __init__(self, info: TeacherInfo):
        self.info, self.kind = info, KINDS[info.kind](info)

    def compute(
        self, hidden: Tensor, logits: Tensor, gold: Tensor, extra: Extra
    ) -> dict[str, Tensor]:
        """Return the input of ``encode`` for a block: ``hidden`` [N,H], ``logits`` [N,W], ``gold``
        [N].
        """
        return self.scores(logits, gold, extra)

    def scores(self, logits: Tensor, gold: Tensor, extra: Extra) -> dict[str, Tensor]:
        """Return the scalars [N] and what is kept of a block of float32 ``logits`` [N,W].

        The logits are overwritten. ``gold`` [N] are the true ids. Masses outside the kept ids are
        sums over those outside, never 1 − kept. Raises InputError if the teacher's logits are NaN
        or +inf; on a GPU, ``to_host`` does that, so as not to wait here.
        """
        with_tail = self.kind.has_tail
        corpus_logits = logits[:, : self.info.vocabulary_size]
        top, ids = torch.topk(corpus_logits, self.info.k if with_tail and self.info.k else 1, dim=1)
        gold_logit = logits.gather(1, gold[:, None])
        gold_rank = (logits > gold_logit).sum(dim=1)
        highest = top[:, :1].clone() if corpus_logits.shape == logits.shape else _largest(logits)
        not_finite = self._check_finite(logits, highest)
        relative = _relative(logits, highest)
        odds, weights = _tail_log_odds(relative, ids if with_tail else None, self.info.temperatures)
        weight_sum = weights.sum(dim=1)
        entropy = weight_sum.log() - torch.einsum("nv,nv->n", weights, relative) / weight_sum
        normaliser = weight_sum.log()[:, None]
        gold_log_prob = (gold_logit - highest - normaliser)[:, 0]
        scalars = {"gold_log_prob": gold_log_prob, "gold_rank": gold_rank, "entropy": entropy}
        block = Block(relative, weights, normaliser, ids, top - highest, odds)
        return scalars | self.kept_columns(block, extra) | not_finite

    def _check_finite(self, logits: Tensor, highest: Tensor) -> dict[str, Tensor]:
        """Raise InputError for logits that are NaN or +inf; on a GPU, return whether they are, so
        as not to wait.
        """
        if not _may_read(logits):
            return {NOT_FINITE: ~torch.isfinite(highest).all() | torch.isnan(logits).any()}
        if not bool(torch.isfinite(highest).all()) or bool(torch.isnan(logits).any()):
            raise self._not_finite()
        return {}

    def _not_finite(self) -> InputError:
        precision = self.info.precision
        advice = "Try `precision: fp32` for it, and check" if precision != "fp32" else "Check"
        return InputError(
            f"teacher {self.info.name!r} produced logits that are NaN or infinite in {precision}; "
            f"its targets would be worthless. {advice} the model: its weights may hold NaN"
        )

    def to_host(self, scores: Mapping[str, Tensor | NDArray]) -> Columns:
        """Return scores, or encoded columns, on the host; raise InputError if the teacher's logits
        were NaN or +inf.
        """
        host_arrays = {
            n: v.cpu().numpy() if isinstance(v, Tensor) else v for n, v in scores.items()
        }
        if host_arrays.pop(NOT_FINITE, False):
            raise self._not_finite()
        return host_arrays

    def kept_columns(self, block: Block, extra: Extra) -> dict[str, Tensor]:
        """Return what is kept of the rows."""
        return {}

    def encode(self, scores: Mapping[str, Tensor | NDArray]) -> Columns:
        """Return the cache's columns (NumPy) of scores."""
        columns = self.to_host(scores)
        dtype = rank_dtype(self.info.vocabulary_size or 0)
        return columns | {
            "gold_log_prob": fixed_point(-columns["gold_log_prob"]),
            "gold_rank": np.minimum(columns["gold_rank"], np.iinfo(dtype).max).astype(dtype),
            "entropy": fixed_point(np.maximum(columns["entropy"], 0)),
        }

    def encode_on_device(self, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the same columns made on the device."""
        return {**scores, **on_device.encode_scalars(scores, self.info.vocabulary_size or 0)}


class TopKScorer(Scorer):
    """The K likeliest ids and the mass outside them."""

    def kept_columns(self, block: Block, extra: Extra) -> dict[str, Tensor]:
        """Return ids and log-probabilities [N,K], log(kept mass / mass outside) [N,T]."""
        log_probs = block.top_logits - block.normaliser
        return {"log_probs": log_probs, "ids": block.ids, "tail_log_odds": block.tail_log_odds}

    def encode(self, scores: Mapping[str, Tensor | NDArray]) -> Columns:
        """Return the cache's columns (NumPy) of scores."""
        columns = super().encode(scores)
        parts = [columns.pop(name) for name in ("ids", "log_probs", "tail_log_odds")]
        codec = self.kind.codec
        return columns | codec.encode(parts[0], parts[1], parts[2], self.info.vocabulary_size or 0)

    def encode_on_device(self, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the same columns made on the device."""
        columns = super().encode_on_device(scores)
        ids, log_probs, odds = (columns.pop(n) for n in ("ids", "log_probs", "tail_log_odds"))
        encode = on_device.ENCODERS[self.info.codec]
        return columns | encode(ids, log_probs, odds, self.info.vocabulary_size or 0)


class ThresholdScorer(TopKScorer):
    """An unbiased sample of K distinct ids."""

    def kept_columns(self, block: Block, extra: Extra) -> dict[str, Tensor]:
        """Return ids, and values that give their probabilities; no mass lies outside."""
        assert self.info.k is not None
        probs, keys = _tempered_probs(block, self.info, extra)
        ids, values = threshold_sample(probs, self.info.k, uniforms(keys, 1)[:, 0])
        # Readers divide by the temperature: log q · τ gives q at τ.
        log_probs = values.log() * self.info.temperatures[0]
        odds = torch.full((len(ids), 1), torch.inf, device=ids.device)
        return {"log_probs": log_probs, "ids": ids, "tail_log_odds": odds}


class RandomScorer(Scorer):
    """K draws with replacement."""

    def kept_columns(self, block: Block, extra: Extra) -> dict[str, Tensor]:
        """Return the drawn ids [N,K] and their counts."""
        assert self.info.k is not None
        probs, keys = _tempered_probs(block, self.info, extra)
        ids, counts = random_sample(probs, self.info.k, uniforms(keys, self.info.k))
        return {"ids": ids.to(torch.int32), "counts": counts}


class DenseScorer(Scorer):
    """The whole distribution."""

    def kept_columns(self, block: Block, extra: Extra) -> dict[str, Tensor]:
        """Return every log-probability [N,V]."""
        log_probs = (block.relative - block.normaliser).masked_fill_(
            block.relative <= LOWEST, NO_TOKEN
        )
        return {"log_probs": log_probs[:, : self.info.vocabulary_size]}


class HiddenScorer(Scorer):
    """The hidden states that the output matrix multiplies."""

    def compute(
        self, hidden: Tensor, logits: Tensor, gold: Tensor, extra: Extra
    ) -> dict[str, Tensor]:
        """Return the scalars and the states."""
        return super().compute(hidden, logits, gold, extra) | {"hidden": hidden.float()}

    def encode(self, scores: Mapping[str, Tensor | NDArray]) -> Columns:
        """Return the columns of the scalars and of the states."""
        columns = super().encode(scores)
        stored, scale = encode_hidden(columns.pop("hidden"))
        return columns | {"hidden": stored, "hidden_scale": scale}

    def encode_on_device(self, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the same columns made on the device."""
        columns = super().encode_on_device(scores)
        return columns | on_device.encode_hidden(columns["hidden"])


class TailsScorer(Scorer):
    """Tail masses of ids already stored."""

    def compute(
        self, hidden: Tensor, logits: Tensor, gold: Tensor, extra: Extra
    ) -> dict[str, Tensor]:
        """Return log(kept mass / mass outside) [N,T]."""
        assert extra is not None
        highest = _largest(logits)
        not_finite = self._check_finite(logits, highest)
        odds, _ = _tail_log_odds(_relative(logits, highest), extra, self.info.temperatures)
        return {"tail_log_odds": odds} | not_finite

    def encode(self, scores: Mapping[str, Tensor | NDArray]) -> Columns:
        """Return the odds as they are stored."""
        return {"tail_log_odds": encode_odds(self.to_host(scores)["tail_log_odds"])}

    def encode_on_device(self, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the same made on the device."""
        return {**scores, "tail_log_odds": on_device.encode_odds(scores["tail_log_odds"])}


SCORERS: dict[str, type[Scorer]] = {
    "topk": TopKScorer,
    "threshold": ThresholdScorer,
    "random": RandomScorer,
    "dense": DenseScorer,
    "hidden": HiddenScorer,
    "tails": TailsScorer,
}


def _largest(logits: Tensor) -> Tensor:
    return logits.max(dim=1, keepdim=True).values


def _relative(logits: Tensor, highest: Tensor) -> Tensor:
    return logits.sub_(highest).clamp_(min=LOWEST)


def _tail_log_odds(
    relative: Tensor, kept_ids: Tensor | None, temperatures: tuple[float, ...]
) -> tuple[Tensor, Tensor]:
    """Return log(kept mass / mass outside) [N,T] at each temperature, and exp(relative) [N,V].

    Without ``kept_ids``, only the latter.
    """
    weights, written_tau = torch.empty_like(relative), None
    odds = {}
    for tau in sorted({1.0, *(temperatures if kept_ids is not None else ())}, reverse=True):
        _exponentials(relative, tau, weights, written_tau)
        written_tau = tau
        if kept_ids is not None:
            inside = weights.gather(1, kept_ids)
            outside = weights.scatter_(1, kept_ids, 0.0).sum(dim=1)
            weights.scatter_(1, kept_ids, inside)
            odds[tau] = inside.sum(dim=1).log() - outside.log()
    if written_tau != 1.0:  # temperatures below 1 come after it
        _exponentials(relative, 1.0, weights, None)
    if kept_ids is None:
        return relative[:, :0], weights
    return torch.stack([odds[tau] for tau in temperatures], dim=1), weights


def _tempered_probs(block: Block, info: TeacherInfo, extra: Extra) -> tuple[Tensor, Tensor]:
    """Return probabilities [N,V] at a sample's one temperature, and the keys to draw with."""
    assert extra is not None
    (tau,) = info.temperatures
    if tau != 1.0:
        _exponentials(block.relative, tau, block.weights, None)
    return block.weights / block.weights.sum(dim=1, keepdim=True), extra


def _exponentials(relative: Tensor, tau: float, out: Tensor, written_tau: float | None) -> None:
    """Write exp(relative/τ) into ``out``, which holds those of the temperature ``written_tau``;
    they are squared if that is 2τ or 4τ.
    """
    if written_tau is not None and written_tau / tau in (2.0, 4.0):
        for _ in range(int(written_tau / tau) // 2):
            out.square_()
        return
    torch.div(relative, tau, out=out)
    out.exp_()
