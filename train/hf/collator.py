"""Make a batch of a cache for a transformers model: inputs, labels, and the stored targets."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from rekindle.data.batch import Batch
from rekindle.data.cache import Cache
from rekindle.data.errors import InputError
from rekindle.train.device_batch import model_inputs
from rekindle.train.hf.dataset import Place
from rekindle.train.objective.language_loss import IGNORED
from rekindle.train.objective.selection import at_masked_positions

log = logging.getLogger("rekindle")

TARGETS = "distillation"  # the key of the targets in a collator's output
WARN_UNUSED_AFTER = 50  # warn after this many batches if no loss has been computed
CPU = torch.device("cpu")


class TargetCollator:
    """Turn places of a data set (``rekindle.train.hf.dataset``) into the inputs of model and loss.

    The result is a dict of ``input_ids`` and ``attention_mask`` [B,S] (and ``token_type_ids`` for
    pairs), for masked LMs those of the masked view; ``labels`` [B,S], −100 where there is no
    cross-entropy: for masked LMs the true token at each masked position, for causal ones the tokens
    themselves (the model shifts them); and ``distillation``: the ``Batch`` with its targets as the
    cache stores them, which the loss sends to the device. It can be made in a DataLoader worker.
    """

    def __init__(
        self,
        cache: Cache,
        teachers: Sequence[str],
        task: str,
        masked_view: str | None,
        allow_missing: Sequence[str] = (),
    ):
        self.cache, self.teachers, self.task = cache, list(teachers), task
        self.masked_view, self.allow_missing = masked_view, tuple(allow_missing)
        self.batch_count = 0
        self.is_used = False  # whether a loss was ever computed on a batch

    def __call__(self, places: Sequence[Place]) -> dict[str, Any]:
        """Read a batch. Raise InputError for items of another data set or another cache."""
        if not places or not all(isinstance(place, Place) for place in places):
            kind = type(places[0]).__name__ if places else "nothing"
            raise InputError(
                f"a batch of cached targets was to be made from items that are {kind}, but the "
                "targets belong to the sequences of the cache. Use CacheDataset or "
                "IterableCacheDataset of rekindle.train.hf.dataset as the data set"
            )
        if any(place.corpus not in (None, self.cache.corpus.fingerprint) for place in places):
            raise InputError(
                "the data set is of another cache's sequences than the targets "
                f"({self.cache.store.location}): its numbers would mean other texts there. Make "
                "the data set from the cache that Distillation was given"
            )
        self._warn_unused()
        counting_places = [place for place in places if place.counts]
        batch = self._read(counting_places or places[:1])
        labels = labels_of(batch, self.task)
        if not counting_places:
            labels.fill_(IGNORED)
            none = slice(0)
            targets = {name: target.keep(none) for name, target in batch.targets.items()}
            batch = replace(batch, targets=targets)
        return {**student_inputs(batch), "labels": labels, TARGETS: batch}

    def _warn_unused(self) -> None:
        """Warn once if no loss uses the targets. A worker's copy never learns of a loss, so it is
        silent.
        """
        self.batch_count += 1
        if self.batch_count == WARN_UNUSED_AFTER and not self.is_used and get_worker_info() is None:
            log.warning(
                "%d batches of cached targets were made, but no loss was computed on them: a "
                "Trainer without DistillationMixin trains on its own loss only. Put the mixin "
                "first: class KDTrainer(DistillationMixin, Trainer)",
                WARN_UNUSED_AFTER,
            )

    def _read(self, places: Sequence[Place]) -> Batch:
        batch = self.cache.gather(
            np.array([place.sequence for place in places], np.int64),
            self.teachers,
            epoch=places[0].epoch,
            masked_view=self.masked_view,
            allow_missing=self.allow_missing,
            scalars=False,
        )
        return batch if batch.masked is None else at_masked_positions(batch)


def student_inputs(batch: Batch) -> dict[str, Tensor]:
    """Return the student's inputs for a batch, on the CPU."""
    ids = batch.input_ids if batch.masked is None else batch.masked.input_ids
    return model_inputs(ids, batch.lengths, CPU, batch.token_types)


def labels_of(batch: Batch, task: str) -> Tensor:
    """Return labels [B,S] as transformers models take them; −100: no cross-entropy."""
    if task == "causal_lm":
        is_trained = batch.attention_mask if batch.trained is None else batch.trained
        token_labels = np.where(is_trained, batch.input_ids, IGNORED)
        return torch.from_numpy(token_labels).long()
    assert batch.masked is not None
    labels = np.full(batch.input_ids.shape, IGNORED, np.int64)
    labels[batch.masked.rows, batch.masked.positions] = batch.masked.labels
    return torch.from_numpy(labels)
