"""An objective of one's own: wherever a cached masked LM is sure of a token, the student is to be.

L = Σ -log p(best id of the teacher), over masked positions where the teacher gives it `sure` or
more. A run file names it as train.objective.methods: [{method: sure_tokens, teacher: NAME}].
"""

from collections.abc import Iterable, Mapping

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from rekindle.data.batch import Batch
from rekindle.train.config import MethodSettings
from rekindle.train.method import Method
from rekindle.train.model.network import StudentNetwork
from rekindle.train.to_device import to_device


class SureTokensSettings(MethodSettings):
    """Settings of ``method: sure_tokens``."""

    teacher: str = Field(description="a cached masked LM")
    sure: float = Field(0.9, gt=0, lt=1, description="the least probability of its best id")


class SureTokens(Method):
    """The cross-entropy on what the teacher is sure of."""

    Settings = SureTokensSettings
    settings: SureTokensSettings

    @property
    def teachers(self) -> tuple[str, ...]:
        return (self.settings.teacher,)

    def sure(self, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        """Of the teacher's positions [P] those where it is sure, and its best ids [P]."""
        ids, log_probs, _ = batch.targets[self.settings.teacher].decode()  # by falling probability
        return log_probs[:, 0] >= np.log(self.settings.sure), ids[:, 0]

    def count(self, batch: Batch) -> Mapping[str, int]:
        return {"loss": int(self.sure(batch)[0].sum())}

    def losses(
        self, student: StudentNetwork, batch: Batch, step: int, device: torch.device
    ) -> Iterable[tuple[str, Tensor, Tensor]]:
        sure, ids = (torch.from_numpy(values).to(device) for values in self.sure(batch))
        target = to_device(batch, device).targets[self.settings.teacher]
        inputs = student.with_domains(target.inputs, batch.domains)
        hidden, head = student(inputs, target.select[sure]).hidden, student.output_head
        logits = F.linear(hidden, head.weight, head.bias)
        loss = F.cross_entropy(logits, ids[sure].long(), reduction="sum")
        yield "loss", loss, loss.detach()
