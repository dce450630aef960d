"""``embedding``: one vector of D values a sequence, from a sentence encoder.

On disk, each row is a list with one entry, or with none if the teacher does not apply: ``vectors``
float16 [D]; or ``vectors`` int8 [D] and ``scale`` float32, whose product is the value. Read as
stored; ``decode`` gives float32.

The error of storing is bounded. A vector v becomes v + e; the sine of the angle between the two is
at most r = |e| / |v|, so their cosine is at least √(1 − r²). For fp16, r is 2⁻¹¹ (and √D · 2⁻²⁵ /
|v| for values below 6e-5); for int8, √D · max|v| / (254 · |v|).
"""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rekindle.data.errors import CacheFormatError, InputError
from rekindle.data.storage.columns import flat_lists
from rekindle.data.targets.codec import Columns, Floats
from rekindle.data.targets.codec_compact import Widths
from rekindle.data.targets.kinds.base import TargetKind

LARGEST = {"fp16": float(np.finfo(np.float16).max), "int8": float(np.finfo(np.float32).max)}
STEPS = 127  # of int8 on either side of 0
# 1 − cosine above which vectors are refused in fp16: they are too small for it.
LARGEST_FP16_ERROR = 1e-4
# Facts of a unit's record: 1 − cosine between its vectors and their stored form.
LARGEST_ERROR, MEAN_ERROR = "cosine_error_largest", "cosine_error_mean"


class Embedding(TargetKind):
    """Vectors of whole sequences."""

    name = "embedding"
    template = "a vector of {dimensions:,} values in {vectors}"
    tasks = ("embedding",)
    needs = ("vectors", "dimensions")
    per_sequence = True

    @property
    def summary(self) -> str:
        """What is kept of each target, in two words."""
        return f"{self.width} {self.info.vectors}"

    def memory_columns(self) -> Widths:
        """Return the columns in use: those stored."""
        if self.info.vectors == "int8":
            return {"vectors": (pa.int8(), self.info.dimensions), "scale": (pa.float32(), None)}
        return {"vectors": (pa.float16(), self.info.dimensions)}

    def stored_columns(self) -> Widths:
        """Return the columns on disk: there are no positions."""
        return self.memory_columns()

    def _pack(self, columns: Columns) -> Columns:
        return columns

    def read(self, batch: pa.RecordBatch) -> tuple[NDArray[np.int32], Columns]:
        """Return offsets [R+1], one more after each row that has a vector, and the columns."""
        offsets, columns = flat_lists(batch, [*self.stored_columns()])
        if (np.diff(offsets) > 1).any():
            raise CacheFormatError("a sequence has several vectors")
        for problem in self.problems(columns):
            raise CacheFormatError(f"a record batch has {problem}")
        return offsets, columns

    def problems(self, columns: Columns) -> Iterator[str]:
        """Yield what is wrong with columns that Rekindle cannot have written."""
        if not np.isfinite(columns["scale" if "scale" in columns else "vectors"]).all():
            yield "NaN or infinity in its vectors"
        if "scale" in columns:
            if (columns["vectors"] == -STEPS - 1).any():
                yield "values below −127 in 'vectors'"
            if (columns["scale"] < 0).any():
                yield "a scale below 0"

    def encode(self, vectors: Floats) -> Columns:
        """Return the stored form of ``vectors`` [R,D].

        Raises InputError for values that it cannot hold.
        """
        kind = self.info.vectors or "fp16"
        vectors = np.ascontiguousarray(vectors, np.float32)
        if not np.isfinite(vectors).all():
            raise InputError(f"teacher {self.info.name!r} gives vectors with NaN or infinity")
        peak = np.abs(vectors).max(axis=1, initial=0)
        if peak.max(initial=0) > LARGEST[kind]:
            raise InputError(
                f"teacher {self.info.name!r} gives values up to {peak.max():.6g}, but fp16 holds "
                f"none above {LARGEST[kind]:,.0f}. Set its targets.vectors to int8, which has a "
                "scale for each vector"
            )
        if kind == "fp16":
            columns = {"vectors": vectors.astype(np.float16)}
            if len(vectors) and self.errors(vectors, columns).max() > LARGEST_FP16_ERROR:
                raise InputError(
                    f"teacher {self.info.name!r} gives vectors whose values are as small as "
                    f"{peak.min():.2g} at most, too small for fp16. Set its targets.vectors to "
                    "int8, which has a scale for each vector"
                )
            return columns
        scale = (peak / np.float32(STEPS)).astype(np.float32)
        steps = vectors / np.where(scale > 0, scale, 1)[:, None]
        return {"vectors": np.rint(steps).clip(-STEPS, STEPS).astype(np.int8), "scale": scale}

    def stored(self, vectors: Floats) -> tuple[Columns, dict[str, float]]:
        """Return the stored form of ``vectors`` [R,D], and its error for the record."""
        columns = self.encode(vectors)
        errors = self.errors(vectors, columns)
        return columns, {LARGEST_ERROR: float(errors.max()), MEAN_ERROR: float(errors.mean())}

    def decode(self, columns: Columns) -> Floats:
        """Return the vectors [R,D] as float32."""
        vectors = columns["vectors"].astype(np.float32)
        if "scale" in columns:
            vectors *= columns["scale"].astype(np.float32)[:, None]
        return vectors

    def errors(self, vectors: Floats, columns: Columns) -> NDArray[np.float64]:
        """Return 1 − cosine [R] between ``vectors`` [R,D] and their stored form, ``columns``.

        1 if a vector is lost altogether; 0 for vectors that are 0 themselves.
        """
        return cosine_distances(vectors, self.decode(columns))

    def bounds(self, vectors: Floats) -> NDArray[np.float64]:
        """Return the upper bounds [R] of ``errors``."""
        exact = vectors.astype(np.float64)
        length = np.linalg.norm(exact, axis=1)
        length = np.where(length > 0, length, 1.0)
        width = np.sqrt(exact.shape[1])
        if self.info.vectors == "int8":
            # Above by a float32 rounding: the scale, and its product, are rounded as well.
            share = width * np.abs(exact).max(axis=1, initial=0) / (2 * STEPS * length) * (1 + 1e-4)
        else:
            share = 2.0**-11 + width * 2.0**-25 / length
        return np.where(share < 1, 1 - np.sqrt(1 - np.minimum(share, 1) ** 2), 2.0)


def cosine_distances(a: Floats, b: Floats) -> NDArray[np.float64]:
    """Return 1 − cosine [R] between the rows of ``a`` and ``b`` [R,D]; 0 for two zeros."""
    units = [one.astype(np.float64) for one in (a, b)]
    for one in units:
        length = np.linalg.norm(one, axis=1, keepdims=True)
        one /= np.where(length > 0, length, 1)
    # Half the squared chord: 1 − a·b would lose differences below 1e-16.
    distances = ((units[0] - units[1]) ** 2).sum(axis=1) / 2
    one_is_zero = units[0].any(axis=1) != units[1].any(axis=1)
    return np.where(one_is_zero, 1.0, distances)
