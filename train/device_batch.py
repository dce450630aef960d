"""A batch on the training device: the cache's integers are sent as stored and decoded there.

This module has the parts of a batch that a step's terms need; ``to_device.py`` moves a whole batch.
The decoding (``rekindle.kernels.encoded``) is the twin of ``rekindle.data.targets.codec``; a test
keeps them equal.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rekindle.data.batch import (
    Batch,
    PairInputs,
    TargetBatch,
    TokenLabelBatch,
    TokenTargetBatch,
)
from rekindle.data.corpus.columns import DOCUMENTS
from rekindle.data.errors import InputError
from rekindle.data.targets.codec import high_planes
from rekindle.data.targets.head import StoredHead
from rekindle.data.targets.interpolation import parabola
from rekindle.data.views.registry import view_kind
from rekindle.kernels.blocks import row_blocks
from rekindle.kernels.checks import TargetObjects
from rekindle.kernels.encoded import EncodedTargets, decode, odds_at
from rekindle.kernels.hidden import DenseTargets, HiddenTargets, LogProbBlocks, WholeLogits
from rekindle.kernels.targets import DecodedTargets
from rekindle.train.host.known import copy_to, note
from rekindle.train.model.split_model import OutputHead
from rekindle.train.order.ahead import copy_on, made

T = TypeVar("T", bound=TargetBatch)
Inputs = dict[str, Tensor]  # model inputs by argument name


def send(values: NDArray, device: torch.device) -> Tensor:
    """Return a NumPy array as a tensor on ``device``; pin it first if the copy can then overlap."""
    if (sent := copy_on(values, device)) is not None:
        return sent
    return copy_to(values.view(np.ndarray), device)


def send_columns(values: NDArray, columns: slice | int, device: torch.device) -> Tensor:
    """Return some of the columns of ``values`` [P,K] on the device: cut out of the copy that is
    there, or sent alone.
    """
    if (sent := copy_on(values, device)) is not None:
        return sent[:, columns].contiguous()
    return send(values[:, columns], device)


def model_inputs(
    input_ids: NDArray,
    lengths: NDArray,
    device: torch.device,
    token_types: NDArray | None = None,
    document_numbers: NDArray | None = None,
    mask: NDArray[np.bool_] | None = None,
) -> Inputs:
    """Return ``input_ids`` and ``attention_mask`` [B,S] (and ``token_type_ids``,
    ``document_numbers``) as int64, with what the host knows of them. ``mask``: of the ``lengths``,
    where it is made already.
    """
    if mask is None:
        mask = np.arange(input_ids.shape[1]) < lengths[:, None]
    columns = {"input_ids": input_ids, "attention_mask": mask}
    columns |= {} if token_types is None else {"token_type_ids": token_types}
    columns |= {} if document_numbers is None else {DOCUMENTS: document_numbers}
    return {name: note(send(values, device).long(), values) for name, values in columns.items()}


def clean_inputs(batch: Batch, device: torch.device) -> Inputs:
    """Return the model inputs of a batch's unmasked sequences."""
    return _inputs_with_ids(batch, batch.input_ids, device)


def _inputs_with_ids(batch: Batch, input_ids: NDArray, device: torch.device) -> Inputs:
    token_columns = (batch.token_types, batch.document_numbers)
    return model_inputs(input_ids, batch.lengths, device, *token_columns, text_mask(batch))


def text_mask(batch: Batch) -> NDArray[np.bool_]:
    """Return [B,S]: the real tokens of a batch's text, masked or not."""
    return made(batch, "mask", lambda: batch.attention_mask)


def pair_mask(pairs: PairInputs) -> NDArray[np.bool_]:
    """Return [B,S']: the tokens of each sequence's pair. Sequences without one are shown as one
    padding token, with weight 0.
    """
    width = pairs.input_ids.shape[1]
    return made(pairs, "mask", lambda: np.arange(width) < np.maximum(pairs.lengths, 1)[:, None])


def kd_targets(
    batch: TokenTargetBatch, temperature: float, k: int | None, device: torch.device
) -> TargetObjects:
    """Return what the loss takes: stored values unchanged; decoded for samples and precise codes.

    From hidden states the loss forms the logits itself, in bounded blocks; only their top ``k`` is
    computed here.
    """
    k = batch.used_k(k)
    targets = LOSS_TARGETS[batch.info.kind](batch, temperature, k, device)
    if isinstance(targets, HiddenTargets | DenseTargets) and k is not None and k < batch.kind.size:
        return _decoded(targets, batch.kind.size, temperature, k)
    return targets


def sparse_targets(
    batch: TokenTargetBatch, temperature: float, k: int | None, device: torch.device
) -> DecodedTargets:
    """Return a teacher's targets at ``temperature``, decoded on the device, with at most ``k`` ids.

    Whole distributions become [P,V] ids and probabilities, for uses that cannot work in blocks.
    """
    targets = kd_targets(batch, temperature, k, device)
    if isinstance(targets, EncodedTargets):
        return decode(targets, temperature)
    if isinstance(targets, HiddenTargets | DenseTargets):
        return _decoded(targets, batch.kind.size, temperature, k)
    return targets


# --- what the loss takes of each kind of target ---

SENT_WHOLE = ("ids", "ids_high", "values", "log_prob_max", "log_prob_min")


def _encoded_targets(
    batch: TokenTargetBatch, tau: float, k: int | None, device: torch.device
) -> TargetObjects:
    slots = batch.kind.slots(tau, k, batch.between)
    columns, all_odds = batch.columns, batch.columns["tail_log_odds"]
    tensors = {name: send(columns[name], device) for name in SENT_WHOLE if name in columns}
    odds = [send_columns(all_odds, slot, device) for slot in slots]
    lowest = tensors.pop("log_prob_min", None)  # None for the precise codec's 16-bit values
    planes = high_planes(batch.kind.size)
    is_sampled = batch.kind.is_sample
    targets = EncodedTargets(
        **tensors,
        tail_log_odds=odds[0],
        log_prob_min=lowest,
        planes=planes,
        k=k,
        temperature=tau,
        sampled=is_sampled,
    )
    if len(slots) > 1:
        temperatures = [batch.info.temperatures[slot] for slot in slots]
        at_slots = torch.stack(odds, dim=1)
        targets = odds_at(targets, at_slots, temperatures, parabola(tau, temperatures), tau)
    return decode(targets, tau) if lowest is None else targets


def _drawn_targets(
    batch: TokenTargetBatch, tau: float, k: int | None, device: torch.device
) -> TargetObjects:
    """Return relative frequencies; −1 where fewer ids than draws were drawn, cut to the
    widest row.
    """
    batch.kind.slot(tau, k)
    counts = batch.columns["counts"]
    width = int((counts > 0).sum(axis=1).max(initial=1))
    ids = send_columns(batch.columns["ids"], slice(width), device).long()
    probs = send_columns(counts, slice(width), device).float() / float(batch.kind.k)
    return DecodedTargets(ids, probs, torch.zeros(len(probs), device=device))


def _dense_targets(
    batch: TokenTargetBatch, tau: float, k: int | None, device: torch.device
) -> TargetObjects:
    return DenseTargets(send(batch.columns["log_probs"], device))


def _hidden_targets(
    batch: TokenTargetBatch, tau: float, k: int | None, device: torch.device
) -> TargetObjects:
    assert batch.head is not None
    states, scale = (send(batch.columns[name], device) for name in ("hidden", "hidden_scale"))
    return HiddenTargets(states, scale, *_head_on(batch.head, device))


LOSS_TARGETS: dict[
    str, Callable[[TokenTargetBatch, float, int | None, torch.device], TargetObjects]
] = {
    "topk": _encoded_targets,
    "threshold": _encoded_targets,
    "random": _drawn_targets,
    "dense": _dense_targets,
    "hidden": _hidden_targets,
}


_heads: "WeakKeyDictionary[StoredHead, dict[torch.device, OutputHead]]" = WeakKeyDictionary()


def _head_on(head: StoredHead, device: torch.device) -> OutputHead:
    """Return the output matrix on the device; it is sent once."""
    sent = _heads.setdefault(head, {})
    if device not in sent:
        bias = None if head.bias is None else send(head.bias, device)
        sent[device] = OutputHead(send(head.weight, device), bias, head.softcap, head.scale)
    return sent[device]


def _decoded(
    targets: HiddenTargets | DenseTargets, size: int, temperature: float, k: int | None
) -> DecodedTargets:
    """Return ids and probabilities [P,V], or the top k and the rest, in bounded blocks."""
    device = targets[0].device
    rows = torch.arange(len(targets[0]), device=device)
    teacher = LogProbBlocks(WholeLogits.of(targets), torch.float32, torch.float32)
    if k is None or k >= size:
        probs = teacher.log_probs(rows, temperature).exp_()
        ids = torch.arange(size, device=device).expand_as(probs)
        return DecodedTargets(ids, probs, torch.zeros(len(probs), device=device))
    blocks = row_blocks(len(rows), size, 3 * torch.float32.itemsize, device) or [slice(0)]
    parts = [_top_k(teacher.log_probs(rows[b], temperature).exp_(), k) for b in blocks]
    return DecodedTargets(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _top_k(probs: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the k likeliest ids of each row [C,V], their probabilities, and that of all others
    [C].
    """
    top, ids = torch.topk(probs, k, dim=1)
    return ids, top, probs.scatter_(1, ids, 0.0).sum(dim=1)


@dataclass(frozen=True)
class LanguageRows:
    """The rows of the LM loss: P positions of one pass."""

    inputs: Inputs
    select: Tensor  # [P] flat indices into [B·S]
    labels: Tensor  # [P]
    keys: NDArray[np.int64]  # [P] the same indices on the host, ascending

    def match(self, target: TokenTargetBatch, width: int) -> NDArray[np.int64]:
        """Return the row here of each of the target's positions; raise InputError if one is
        missing.
        """
        return match_keys(self.keys, target, width)


def match_keys(
    row_keys: NDArray[np.int64], target: TokenTargetBatch, width: int
) -> NDArray[np.int64]:
    """Return where in ``row_keys`` [P], ascending, each of the target's positions is; raise
    InputError if one is missing.
    """
    keys = target.rows * width + target.positions
    rows = np.searchsorted(row_keys, keys)
    if not np.array_equal(np.append(row_keys, -1)[rows], keys):
        raise InputError(
            f"teacher {target.info.name!r} has targets at positions where the student has no "
            "loss: their masks differ. Use the cache.mask, seed and replicas it was cached "
            "with"
        )
    return rows


def language_rows(batch: Batch, task: str, device: torch.device) -> LanguageRows:
    """Return the positions with an LM loss: masked ones, or all whose next token is trained."""
    if task == "masked_lm":
        assert batch.masked is not None
        inputs = _inputs_with_ids(batch, batch.masked.input_ids, device)
    else:
        inputs = clean_inputs(batch, device)
    keys, labels = language_keys(batch, task), language_labels(batch, task)
    select = note(send(keys, device), keys)
    return LanguageRows(inputs, select, send(labels, device), keys)


def language_keys(batch: Batch, task: str) -> NDArray[np.int64]:
    """Return [P]: the flat indices into [B·S] of the positions with an LM loss, ascending."""

    def make() -> NDArray[np.int64]:
        rows, positions = _language_places(batch, task)
        return rows * batch.input_ids.shape[1] + positions

    return made(batch, "keys", make)


def language_labels(batch: Batch, task: str) -> NDArray[np.int64]:
    """Return [P]: the true tokens at the positions with an LM loss."""
    if task == "masked_lm":
        assert batch.masked is not None
        return batch.masked.labels

    def make() -> NDArray[np.int64]:
        rows, positions = _language_places(batch, task)
        return batch.input_ids[rows, positions + 1].astype(np.int64)

    return made(batch, "labels", make)


def _language_places(batch: Batch, task: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    if task == "masked_lm":
        assert batch.masked is not None
        return batch.masked.rows, batch.masked.positions
    return batch.next_places


CLEAN_TEXT = ""  # the view of experts that saw the text itself, where inputs are kept by view


def inputs_of(batch: Batch, view: str, device: torch.device) -> Inputs:
    """Return what the student sees for an expert that saw ``view``: that view's sentence pairs, or
    the clean text.
    """
    if not view_kind(view).paired:
        return clean_inputs(batch, device)
    pairs = batch.pairs[view]
    ids, types, mask = pairs.input_ids, pairs.token_types, pair_mask(pairs)
    return model_inputs(ids, pairs.lengths, device, types, mask=mask)


def masked_only(target: T, batch: Batch) -> T:
    """Return the targets at a batch's masked positions; those of whole sequences unchanged."""
    positions = target.positions if isinstance(target, TokenTargetBatch | TokenLabelBatch) else None
    if positions is None:
        return target
    assert batch.masked is not None
    width = batch.input_ids.shape[1]
    masked = batch.masked.rows * width + batch.masked.positions
    return target.keep(np.isin(target.rows * width + positions, masked))


def split_batch(batch: Batch, size: int) -> list[Batch]:
    """Return micro-batches of at most ``size`` sequences, in order."""
    count = len(batch.index)
    if size >= count:
        return [batch]
    return [batch.take(slice(start, start + size)) for start in range(0, count, size)]


def split_evenly(batch: Batch, count: int) -> list[Batch]:
    """Return ``count`` micro-batches of about equally many sequences, in order."""
    edges = [len(batch.index) * number // count for number in range(count + 1)]
    return [batch.take(slice(start, stop)) for start, stop in pairwise(edges)]
