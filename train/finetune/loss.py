"""The loss of a batch in fine-tuning, for each kind of task."""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from rekindle.train.finetune.config import FinetuneConfig
from rekindle.train.finetune.encoded import EncodedTexts
from rekindle.train.finetune.label_lists import SEVERAL, TAGS
from rekindle.train.finetune.task_data import TaskData
from rekindle.train.ranking.losses import ranking_loss


def loss_of(
    logits: Tensor, data: TaskData, encoded: EncodedTexts, rows: np.ndarray, config: FinetuneConfig
) -> Tensor:
    """Return the mean loss of ``rows`` [B] of a split, from the fp32 logits of
    ``classifier_logits`` [B,C], or [P,C] for the words that were read.

    Cross-entropy for classes and for tags (each word counts equally), the binary one for each label
    if several may hold, squared error for scores; ``config.loss`` for documents in groups, of which
    ``rows`` has whole ones.
    """
    labels = data.labels[rows if data.problem != TAGS else encoded.kept_word_indices(rows)]
    target = torch.from_numpy(labels).to(logits.device)
    if data.groups is not None:
        groups = torch.from_numpy(data.groups[rows]).to(logits.device)
        return ranking_loss(
            logits.reshape(target.shape),
            target,
            groups,
            config.loss,
            temperature=config.grade_temperature,
            clicks=bool(np.isin(data.labels, (0, 1)).all()),
        )
    if data.problem == "regression":
        return functional.mse_loss(logits.reshape(target.shape), target)
    if data.problem == SEVERAL:
        return functional.binary_cross_entropy_with_logits(logits, target.float())
    total = functional.cross_entropy(logits, target, reduction="sum")
    return total / max(len(target), 1)  # a batch may have no word that is read
