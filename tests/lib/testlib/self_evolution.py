"""What a model finds hard, run by itself, and one step of a student beside it.

The reference is transformers' own ``model(**inputs).logits`` on one sequence at a time, without
padding; none of our helpers takes part in it.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from rekindle.data.cache import Cache
from rekindle.data.settings import parse_settings
from rekindle.pipeline.config import RunConfig
from rekindle.train.config import ObjectiveConfig, StudentConfig
from rekindle.train.device_batch import split_batch
from rekindle.train.objective.objective import Objective
from rekindle.train.student import build_student
from testlib import caches
from testlib.models import AUTO
from testlib.run_alone import logits_of
from testlib.students import gradients

CPU = torch.device("cpu")
HARD = 0.1
STEP = 1 / 1024  # nats: losses are stored to the nearest multiple of it


def log_probs_of(directory: Path, ids: Any) -> torch.Tensor:
    """Return the model's own log-probabilities [S,V] of one unmasked sequence."""
    return torch.log_softmax(logits_of(directory, AUTO["masked_lm"], input_ids=ids).double(), -1)


def losses_of(directory: Path, ids: Any) -> np.ndarray:
    """Return −log p [S] of every token of a sequence."""
    places = torch.arange(len(ids))
    return -log_probs_of(directory, ids)[places, torch.tensor(list(map(int, ids)))].numpy()


def content_of(ids: np.ndarray) -> np.ndarray:
    """Return the positions of real tokens: [PAD], [UNK], [CLS], [SEP], [MASK] are the tokens 0 to
    4.
    """
    return np.flatnonzero((ids > 4) | (ids == 1))


def masked_rows(cache: Cache, name: str | None = None) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return (masked positions, ids there) of every sequence, read as students read them."""
    batch = cache.gather(np.arange(len(cache)), [], masked_view=cache.masked_view(name).name)
    masked = batch.masked
    out = []
    for row in range(len(batch.index)):
        at = masked.positions[masked.rows == row]
        assert (masked.labels[masked.rows == row] == batch.input_ids[row, at]).all()
        out.append((at, masked.input_ids[row, at]))
    return out


def examples(path: Path) -> list[Any]:
    return list(caches.examples(Cache.open(path)))


def contents(path: Path) -> dict[str, bytes]:
    """Return the bytes of every committed shard of views and targets."""
    return caches.committed(path, "views", "targets")


# --- the student ----------------------------------------------------------------------------------


SELF_EVOLUTION = {
    "hard": {"weight": 0.9},
    "distill": [{"teachers": ["reference"], "weight": 0.1}],
}


def with_student(config: RunConfig, **train: Any) -> RunConfig:
    values = config.model_dump(mode="json", by_alias=True)
    values["student"] = {"model": config.teachers[0].model}
    small = {"steps": 4, "batch_sequences": 3, "warmup_steps": 1, "held_out": 0.3}
    values["train"] = small | {"objective": SELF_EVOLUTION} | train
    return parse_settings(RunConfig, values)


class Step:
    """One step of a student over all sequences of a cache."""

    def __init__(self, cache: Cache, student: Path, objective: Any = SELF_EVOLUTION):
        self.cache = cache
        config = parse_settings(ObjectiveConfig, objective)
        infos = {name: cache.teacher(name).info for t in config.distill for name in t.teachers}
        self.objective = Objective(config, infos, "masked_lm", 10)
        size = cache.corpus.info["tokenizer"]["size"]
        self.student = build_student(StudentConfig(model=str(student)), {}, size, 0).eval()

    def run(self, index: np.ndarray, view: str | None = None, micro: int = 99):
        """Return (loss, terms, gradients) over the sequences ``index``."""
        name = self.cache.masked_view(view).name
        names = self.objective.plan(0).teachers
        batch = self.objective.select_targets(
            self.cache.gather(index, names, masked_view=name), self.objective.plan(0)
        )
        counts = self.objective.counts(batch, self.objective.plan(0))
        self.student.zero_grad(set_to_none=True)
        loss, terms = 0.0, {}
        for part in split_batch(batch, micro):
            result = self.objective.loss(self.student, part, counts, self.objective.plan(0), CPU)
            result.total.backward()  # also for a micro-batch in which nothing is masked
            loss += float(result.total.detach())
            for key, value in result.terms.items():
                terms[key] = terms.get(key, 0.0) + float(value)
        return loss, terms, self.gradients()

    def gradients(self) -> dict[str, torch.Tensor]:
        return gradients(self.student)

    def masked_logits(self, index: np.ndarray, view: str | None = None):
        """Yield per sequence the student's logits [P,V] at masked positions, labels and
        positions.
        """
        rows = masked_rows(self.cache, view)
        size = self.cache.corpus.info["tokenizer"]["size"]
        for number in index.tolist():
            ids = self.cache.example(number).input_ids.astype(np.int64)
            positions, shown = rows[number]
            seen = ids.copy()
            seen[positions] = shown
            logits = self.student.model(input_ids=torch.tensor(seen)[None]).logits[0, :, :size]
            yield number, logits[positions], torch.tensor(ids[positions]), positions


def with_mask(config: RunConfig, **mask: Any) -> RunConfig:
    changed = config.cache.mask.model_copy(update=mask)
    return config.model_copy(update={"cache": config.cache.model_copy(update={"mask": changed})})
