"""Check the vectors of sentence encoders in rows. D values of a vector."""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from rekindle.data.corpus.corpus import Corpus
from rekindle.data.errors import InputError, naming
from rekindle.data.exchange.config import ImportConfig
from rekindle.data.exchange.rows import Row, check_keys, numbers
from rekindle.data.targets.codec import Columns
from rekindle.data.targets.imported import Imported
from rekindle.data.targets.kinds.embedding import LARGEST, Embedding
from rekindle.data.targets.schema import TeacherInfo

FIELDS = ("vector",)


@dataclass
class VectorRows:
    """Reads the rows of one sentence encoder: a ``vector`` each, all of the first one's length."""

    corpus: Corpus
    info: TeacherInfo
    errors: list[float] = field(default_factory=list, init=False)  # 1 − cosine, for each row

    @classmethod
    def begin(cls, corpus: Corpus, config: ImportConfig, view: str, row: Row) -> "VectorRows":
        """Return a reader for the teacher of ``config``, whose first row is ``row``."""
        imported = Imported(provenance=config.provenance)
        vector = row.get("vector")
        if not isinstance(vector, list | tuple | np.ndarray) or not len(vector):
            raise InputError("must have a vector: a list of numbers, as long in every row")
        info = TeacherInfo.model_validate(
            {
                "name": config.name,
                "task": config.task,
                "kind": Embedding.name,
                "view": view,
                "dimensions": len(vector),
                "vectors": config.vectors or "fp16",
                "estimator": {"kind": "dense", "bias": "exact"},
                "fingerprints": {"provenance": imported.fingerprint},
                "imported": imported,
                "model": config.provenance["model"],
            }
        )
        return cls(corpus, info)

    def columns(self, row: Row, tokens: NDArray[np.int32], expected: NDArray[np.int64]) -> Columns:
        """Return the columns of a row's vector."""
        check_keys(row, FIELDS)
        kind = Embedding(self.info)
        with naming("vector"):
            vector = numbers(row.get("vector"), self.info.dimensions or 0, "value of the first")
            if (np.abs(vector) > LARGEST["int8"]).any():
                raise InputError(f"must lie within ±{LARGEST['int8']:.2g}, the range of float32")
            exact = vector.astype(np.float32)[None]
            columns = kind.encode(exact)
        self.errors += kind.errors(exact, columns).tolist()
        return columns

    def notes(self) -> list[str]:
        """Return notes about all rows."""
        if not self.errors:
            return []
        return [
            f"storing them in {self.info.vectors} turns them by 1 − cosine "
            f"{np.mean(self.errors):.1e} on average, {max(self.errors):.1e} at most"
        ]
