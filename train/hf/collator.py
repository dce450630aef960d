"""A batch of a cache for a model of transformers: its inputs, labels, and the targets as stored."""

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

TARGETS = "distillation"  # the key of the targets in what a collator gives
TELL_UNREAD = 50  # batches that are made without a loss being asked for
CPU = torch.device("cpu")


class TargetCollator:
    """Places of a data set of ``rekindle.train.hf.dataset`` → what a model and the loss take.

    A dict of ``input_ids`` and ``attention_mask`` [B,S] (and ``token_type_ids`` of pairs), of
    masked LMs those of the masked view; ``labels`` [B,S], −100 where there is no cross-entropy: of
    masked LMs the true token at each masked position, of causal ones the tokens as they are (the
    model shifts them); and ``distillation``: the ``Batch`` with its targets as the cache stores
    them, which the loss sends to the device. It may be made in a worker of a DataLoader.
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
        self.made, self.read = 0, False  # batches; whether a loss was ever asked of one

    def __call__(self, places: Sequence[Place]) -> dict[str, Any]:
        """Read a batch. InputError for items that are of another data set, or another cache's."""
        if not places or not all(isinstance(place, Place) for place in places):
            kind = type(places[0]).__name__ if places else "nothing"
            raise InputError(
                f"a batch of cached targets was to be made of items that are {kind}: the targets "
                "belong to the sequences of the cache. Use CacheDataset or IterableCacheDataset of "
                "rekindle.train.hf.dataset as the data set"
            )
        if any(place.corpus not in (None, self.cache.corpus.fingerprint) for place in places):
            raise InputError(
                "the data set is of the sequences of another cache than the targets "
                f"({self.cache.store.location}): its numbers would be other texts there. Make the "
                "data set of the cache that Distillation was given"
            )
        self._tell_unread()
        counted = [place for place in places if place.counts]
        batch = self._read(counted or places[:1])
        labels = labels_of(batch, self.task)
        if not counted:
            labels.fill_(IGNORED)
            none = slice(0)
            targets = {name: target.keep(none) for name, target in batch.targets.items()}
            batch = replace(batch, targets=targets)
        return {**shown(batch), "labels": labels, TARGETS: batch}

    def _tell_unread(self) -> None:
        """Say once that the targets seem to teach nobody. A worker's copy hears of no loss."""
        self.made += 1
        if self.made == TELL_UNREAD and not self.read and get_worker_info() is None:
            log.warning(
                "%d batches of cached targets were made, and no loss was asked of them: a Trainer "
                "without DistillationMixin, which comes first (class KDTrainer(DistillationMixin, "
                "Trainer)), trains on its own loss alone",
                TELL_UNREAD,
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


def shown(batch: Batch) -> dict[str, Tensor]:
    """Return what the student is shown of a batch, on the CPU."""
    ids = batch.input_ids if batch.masked is None else batch.masked.input_ids
    return model_inputs(ids, batch.lengths, CPU, batch.token_types)


def labels_of(batch: Batch, task: str) -> Tensor:
    """Return labels [B,S] as the models of transformers take them; −100: no cross-entropy."""
    if task == "causal_lm":
        learnt = batch.attention_mask if batch.trained is None else batch.trained
        clean = np.where(learnt, batch.input_ids, IGNORED)
        return torch.from_numpy(clean).long()
    assert batch.masked is not None
    labels = np.full(batch.input_ids.shape, IGNORED, np.int64)
    labels[batch.masked.rows, batch.masked.positions] = batch.masked.labels
    return torch.from_numpy(labels)
