"""Which epoch of a seed is kept, and why the seed ends. Knows no loop."""

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from transformers import PreTrainedModel

# Why a seed ended, as metrics.json says it.
DONE, MAX_STEPS, PATIENCE = "all epochs", "max_steps", "patience"
Scores = dict[str, float]


@dataclass
class BestEpoch:
    """The scores, logits and weights of the epoch with the best score on dev, the first of equals;
    without ``patience`` those of the last one.
    """

    patience: int | None
    epoch: int = 0  # from 1; 0: none yet
    score: float = -math.inf
    scores: Scores = field(default_factory=dict)
    logits: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))
    last: int = 0
    _weights: dict[str, torch.Tensor] = field(default_factory=dict)

    def look(self, metric: str, scores: Scores, logits: np.ndarray, model: PreTrainedModel) -> None:
        """Take the next epoch over, if it is to be kept; its weights lie in memory, on the CPU."""
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

    @property
    def ran_out(self) -> bool:
        """Whether so many epochs were no better that the seed ends."""
        return self.patience is not None and self.last - self.epoch >= self.patience

    def restore(self, model: PreTrainedModel) -> None:
        """Give the weights of the kept epoch back to the model, if it has gone on since."""
        if self.epoch != self.last:
            model.load_state_dict(self._weights)
        self._weights = {}


def told_end(kept: int, ran: int, planned: int, stopped: str | None, chosen: bool) -> str:
    """Say which epoch is kept, of how many, and why there were no more; ``chosen``: by dev."""
    which = f"epoch {kept} of {planned}, {'best on dev' if chosen else 'the last'}"
    if stopped == PATIENCE:
        return f"{which}; ended after {ran}: {ran - kept} in a row no better"
    return f"{which}; ended in {ran} by max_steps" if stopped == MAX_STEPS else which
