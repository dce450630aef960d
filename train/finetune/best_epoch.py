"""Which epoch of a seed is kept, and why the seed ended. Knows no training loop."""

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from transformers import PreTrainedModel

# Why a seed ended, in the words of metrics.json.
DONE, MAX_STEPS, PATIENCE = "all epochs", "max_steps", "patience"
Scores = dict[str, float]


@dataclass
class BestEpoch:
    """The scores, logits and weights of the epoch with the best score on dev, the first among
    equals; without ``patience`` those of the last one.
    """

    patience: int | None
    epoch: int = 0  # from 1; 0: none yet
    score: float = -math.inf
    scores: Scores = field(default_factory=dict)
    logits: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))
    last: int = 0
    _weights: dict[str, torch.Tensor] = field(default_factory=dict)

    def update(
        self, metric: str, scores: Scores, logits: np.ndarray, model: PreTrainedModel
    ) -> None:
        """Take the next epoch's, if it is to be kept; its weights are kept in memory, on
        the CPU.
        """
        self.last += 1
        if self.patience is not None and not scores[metric] > self.score:
            return
        self.epoch, self.score = self.last, scores[metric]
        self.scores, self.logits = scores, logits
        if self.patience is not None:
            self._weights = {
                name: value.detach().to("cpu", copy=True)
                for name, value in model.state_dict().items()
            }

    def skip(self) -> None:
        """Take the next epoch, which is not scored, so it is not kept."""
        self.last += 1

    @property
    def ran_out(self) -> bool:
        """Return whether the seed ends, after ``patience`` epochs that were no better."""
        return self.patience is not None and self.last - self.epoch >= self.patience

    def restore(self, model: PreTrainedModel) -> None:
        """Load the weights of the kept epoch into the model, if it was trained further since."""
        if self.epoch != self.last:
            model.load_state_dict(self._weights)
        self._weights = {}


def describe_end(
    kept_epoch: int, epochs_run: int, planned_epochs: int, stopped: str | None, by_dev: bool
) -> str:
    """Return which epoch is kept, of how many, and why there were no more. ``by_dev``: dev chose
    it.
    """
    epoch_text = (
        f"epoch {kept_epoch} of {planned_epochs}, {'best on dev' if by_dev else 'the last'}"
    )
    if stopped == PATIENCE:
        no_better = epochs_run - kept_epoch
        return f"{epoch_text}; ended after {epochs_run}: {no_better} in a row were no better"
    if stopped == MAX_STEPS:
        return f"{epoch_text}; ended in {epochs_run} by max_steps"
    return epoch_text
