"""Check the answers of classifiers and regressors in rows. P words, C labels."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from rekindle.data.corpus.corpus import Corpus
from rekindle.data.counted import counted
from rekindle.data.errors import InputError, naming
from rekindle.data.exchange.config import ImportConfig
from rekindle.data.exchange.rows import Floats64, Row, check_keys, matrix, numbers, whole_numbers
from rekindle.data.exchange.token_rows import MASS_TOLERANCE
from rekindle.data.targets.codec import Columns
from rekindle.data.targets.imported import Imported
from rekindle.data.targets.schema import TeacherInfo

MIN_PROBABILITY = 1e-12  # least probability whose logarithm stands for a logit
LARGEST = float(np.finfo(np.float32).max)
FIELDS = ("positions", "logits", "probabilities")


@dataclass
class LabelRows:
    """Reads the rows of one task expert: ``logits``, or the ``probabilities`` they give."""

    corpus: Corpus
    info: TeacherInfo
    allow_missing: bool
    missing_words: int = field(
        default=0, init=False
    )  # words without an answer, in sequences with a row

    fields = FIELDS

    @classmethod
    def begin(cls, corpus: Corpus, config: ImportConfig, view: str) -> "LabelRows":
        """Return a reader for the teacher of ``config``."""
        imported = Imported(provenance=config.provenance)
        is_per_word = config.task == "token_classification"
        default_problem = (
            "regression" if config.task == "regression" else "single_label_classification"
        )
        labels = config.labels or ("score",)
        fingerprints = {"provenance": imported.fingerprint}
        info = TeacherInfo.model_validate(
            {
                "name": config.name,
                "task": config.task,
                "kind": "token" if is_per_word else "sequence",
                "view": view,
                "num_labels": len(labels),
                "label_names": labels,
                "problem": None if is_per_word else config.problem or default_problem,
                "estimator": {"kind": "dense", "bias": "exact"},
                "fingerprints": fingerprints,
                "imported": imported,
                "model": config.provenance["model"],
            }
        )
        return cls(corpus, info, config.allow_missing)

    def columns(self, row: Row, tokens: NDArray[np.int32], expected: NDArray[np.int64]) -> Columns:
        """Return the columns of a row's answers. ``expected``: the positions at which
        words begin.
        """
        check_keys(row, FIELDS)
        self._check_names(row.get("labels"))
        if self.info.kind == "sequence":
            if row.get("positions") is not None:
                raise InputError(f"positions: a {self.info.task} has one answer per sequence")
            return {"logits": self._logits(row, is_sequence=True)}
        with naming("positions"):
            positions = whole_numbers(row.get("positions"))
            unexpected = positions[~np.isin(positions, expected)]
            if (np.diff(positions) <= 0).any() or len(unexpected):
                raise InputError(
                    "must be ascending positions of its sequence at which a word begins"
                    + (f"; {int(unexpected[0])} is not one" if len(unexpected) else "")
                )
        logits = self._logits(row, is_sequence=False)
        if len(logits) != len(positions):
            raise InputError(f"it has {len(positions)} positions but {len(logits)} lists of logits")
        missing = np.setdiff1d(expected, positions)
        if len(missing) and not self.allow_missing:
            raise InputError(
                f"{len(missing)} of its {counted(len(expected), 'word')} have no answer (the "
                f"first begins at {int(missing[0])}). Give them all, or allow that some are "
                "missing (allow_missing, --allow-missing)"
            )
        self.missing_words += len(missing)
        return {"positions": positions.astype(np.uint16), "logits": logits}

    def notes(self) -> list[str]:
        """Return notes about all rows."""
        words = counted(self.missing_words, "word")
        note = f"without an answer, in sequences that have a row: {words}"
        return [note] if self.missing_words else []

    def _check_names(self, row_names: object) -> None:
        """Refuse numbers whose order differs from the teacher's labels."""
        expected_names = [*self.info.label_names]
        if row_names is None or len(expected_names) == 1:
            return
        given_names = (
            [*row_names]
            if isinstance(row_names, Sequence) and not isinstance(row_names, str)
            else [row_names]
        )
        if given_names != expected_names:
            raise InputError(
                f"labels: its numbers are for {', '.join(map(str, given_names))}, but the labels "
                f"were given as {', '.join(expected_names)}: each number would go to another "
                "label. Give them in the rows' order (labels, --label)"
            )

    def _logits(self, row: Row, is_sequence: bool) -> NDArray[np.float32]:
        """Return logits [1,C] of a sequence, or [P,C] of its words."""
        name = "logits" if row.get("logits") is not None else "probabilities"
        labels = self.info.num_labels or 0
        with naming(name):
            if is_sequence:
                values = numbers(row.get(name), labels, "label")[None]
            else:
                values_found, counts = matrix(row.get(name), "iuf", 0.0)
                if (counts != labels).any():
                    raise InputError(f"must be {labels} numbers for each position")
                values = values_found.astype(np.float64).reshape(len(counts), labels)
                if not np.isfinite(values).all():
                    raise InputError("must be finite")
            logits = values if name == "logits" else self._logits_of(values)
            if (np.abs(logits) > LARGEST).any():
                raise InputError(f"must lie within ±{LARGEST:.2g}, the range of float32")
            return logits.astype(np.float32)

    def _logits_of(self, probs: Floats64) -> Floats64:
        """Return the logits that probabilities [N,C] belong to."""
        if self.info.problem == "regression":
            raise InputError("a regression has scores: give them as logits")
        if ((probs < 0) | (probs > 1 + MASS_TOLERANCE)).any():
            raise InputError("must lie between 0 and 1")
        is_multi_label = self.info.problem == "multi_label_classification"
        sums = probs.sum(axis=1)
        wrong_sums = sums[np.abs(sums - 1) > MASS_TOLERANCE]
        if not is_multi_label and len(wrong_sums):
            raise InputError(
                f"must sum to 1 (given: {wrong_sums[0]:.6g}); labels that do not exclude each "
                "other belong to the problem multi_label_classification"
            )
        positive = np.clip(probs, MIN_PROBABILITY, None)
        return np.log(positive) - (
            np.log(np.clip(1 - probs, MIN_PROBABILITY, None)) if is_multi_label else 0.0
        )
