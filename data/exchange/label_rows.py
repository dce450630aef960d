"""Checks the answers of classifiers and of regressors in rows. P words, C labels."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rekindle.data.corpus.corpus import Corpus
from rekindle.data.errors import InputError, naming
from rekindle.data.exchange.config import ImportConfig
from rekindle.data.exchange.rows import Floats64, Row, check_keys, matrix, numbers, whole_numbers
from rekindle.data.exchange.token_rows import ROUNDING
from rekindle.data.targets.codec import Columns
from rekindle.data.targets.imported import Imported
from rekindle.data.targets.schema import TeacherInfo

LEAST = 1e-12  # of a probability: its logarithm stands for a logit
FIELDS = ("positions", "logits", "probabilities")


@dataclass
class LabelRows:
    """Reads the rows of one task expert: ``logits``, or the ``probabilities`` that they give."""

    corpus: Corpus
    info: TeacherInfo
    allow_missing: bool

    fields = FIELDS

    @classmethod
    def begin(cls, corpus: Corpus, config: ImportConfig, view: str) -> "LabelRows":
        """For the teacher of ``config``."""
        imported = Imported(provenance=config.provenance)
        words = config.task == "token_classification"
        usual = "regression" if config.task == "regression" else "single_label_classification"
        labels = config.labels or ("score",)
        prints = {"provenance": imported.fingerprint}
        info = TeacherInfo.model_validate(
            {
                "name": config.name,
                "task": config.task,
                "kind": "token" if words else "sequence",
                "view": view,
                "num_labels": len(labels),
                "label_names": labels,
                "problem": None if words else config.problem or usual,
                "estimator": {"kind": "dense", "bias": "exact"},
                "fingerprints": prints,
                "imported": imported,
                "model": config.provenance["model"],
            }
        )
        return cls(corpus, info, config.allow_missing)

    def columns(self, row: Row, tokens: NDArray[np.int32], expected: NDArray[np.int64]) -> Columns:
        """The columns of a row's answers. ``expected``: the positions at which words begin."""
        check_keys(row, FIELDS)
        if self.info.kind == "sequence":
            if row.get("positions") is not None:
                raise InputError(f"positions: a {self.info.task} says one thing of a sequence")
            return {"logits": self._logits(row, one=True)}
        with naming("positions"):
            positions = whole_numbers(row.get("positions"))
            strange = positions[~np.isin(positions, expected)]
            if (np.diff(positions) <= 0).any() or len(strange):
                raise InputError(
                    "must be positions of its sequence at which a word begins, rising"
                    + (f"; {int(strange[0])} is none" if len(strange) else "")
                )
        logits = self._logits(row, one=False)
        if len(logits) != len(positions):
            raise InputError(f"it has {len(positions)} positions and {len(logits)} lists of logits")
        return {"positions": positions.astype(np.uint16), "logits": logits}

    def _logits(self, row: Row, one: bool) -> NDArray[np.float32]:
        """Logits [1,C] of a sequence, or [P,C] of its words."""
        name = "logits" if row.get("logits") is not None else "probabilities"
        labels = self.info.num_labels or 0
        with naming(name):
            if one:
                values = numbers(row.get(name), labels, "label")[None]
            else:
                found, counts = matrix(row.get(name), "iuf", 0.0)
                if (counts != labels).any():
                    raise InputError(f"must be {labels} numbers for each position")
                values = found.astype(np.float64).reshape(len(counts), labels)
                if not np.isfinite(values).all():
                    raise InputError("must be finite")
            return (values if name == "logits" else self._of(values)).astype(np.float32)

    def _of(self, probs: Floats64) -> Floats64:
        """The logits that probabilities [N,C] belong to."""
        if self.info.problem == "regression":
            raise InputError("a regression has scores: give them as logits")
        if ((probs < 0) | (probs > 1 + ROUNDING)).any():
            raise InputError("must lie between 0 and 1")
        several = self.info.problem == "multi_label_classification"
        if not several and (np.abs(probs.sum(axis=1) - 1) > ROUNDING).any():
            raise InputError(
                f"must sum to 1 (given: {probs.sum(axis=1).max():.6g}); labels that do not exclude "
                "each other are of the problem multi_label_classification"
            )
        sure = np.clip(probs, LEAST, None)
        return np.log(sure) - (np.log(np.clip(1 - probs, LEAST, None)) if several else 0.0)
