"""Vectors in fp16 and int8: what storing turns them by lies below the stated bound."""

import numpy as np
import pytest

from rekindle.data.errors import CacheFormatError, InputError
from rekindle.data.targets.kinds.embedding import Embedding
from rekindle.data.targets.kinds.registry import kind_of
from rekindle.data.targets.schema import TeacherInfo


def kind(vectors: str, dimensions: int = 48) -> Embedding:
    about = {"name": "e", "task": "embedding", "kind": "embedding", "view": "text"}
    found = kind_of(TeacherInfo(**about, dimensions=dimensions, vectors=vectors))
    assert isinstance(found, Embedding)
    assert found.contradiction() is None
    return found


def drawn(size: int, width: int = 48) -> np.ndarray:
    """Of many lengths, some with one large value, some zero."""
    rng = np.random.default_rng(3)
    vectors = rng.normal(size=(size, width)) * 10.0 ** rng.uniform(-2, 3, (size, 1))
    vectors[::5, 0] *= 40
    vectors[::50] = 0
    return vectors.astype(np.float32)


@pytest.mark.parametrize("vectors", ["fp16", "int8"])
def test_the_error_lies_below_its_bound(vectors):
    exact, made = drawn(2000), kind(vectors)
    columns = made.encode(exact)
    error, bound = made.errors(exact, columns), made.bounds(exact)
    assert (error <= bound).all()
    direct = made.decode(columns).astype(np.float64)
    cosine = (exact * direct).sum(1) / np.maximum(
        np.linalg.norm(exact.astype(np.float64), axis=1) * np.linalg.norm(direct, axis=1), 1e-30
    )
    some = exact.any(axis=1)
    assert np.abs(1 - cosine - error)[some].max() < 1e-7
    assert error.max() > bound.max() / 100  # the bound says something
    assert made.stored(exact)[1]["cosine_error_mean"] == pytest.approx(error.mean())


@pytest.mark.parametrize("vectors", ["fp16", "int8"])
def test_rows_come_back_and_those_without_a_vector_stay_without(vectors):
    made, exact = kind(vectors), drawn(7)
    columns, rows = made.encode(exact), np.array([0, 2, 3, 4, 300, 301, 302])
    digests = [f"{n:032d}" for n in range(303)]
    parts = [made.read(b) for b in made.batches(made.schema({}), digests, rows, columns)]
    counts = np.concatenate([np.diff(offsets) for offsets, _ in parts])
    assert np.array_equal(np.flatnonzero(counts), rows)
    found = np.concatenate([made.decode(columns) for _, columns in parts])
    assert np.array_equal(found, made.decode(columns))


def test_what_cannot_be_stored_is_refused():
    large, small = np.full((1, 48), 7e4, np.float32), np.full((1, 48), 1e-8, np.float32)
    for wrong in (large, small):
        with pytest.raises(InputError, match=r"targets\.vectors to int8"):
            kind("fp16").encode(wrong)
        kind("int8").encode(wrong)
    with pytest.raises(InputError, match="NaN"):
        kind("int8").encode(large * np.nan)


def test_what_no_writer_of_ours_writes_is_damage():
    made = kind("int8", 2)
    columns = made.encode(np.ones((2, 2), np.float32))
    for name, value in (("vectors", -128), ("scale", np.nan), ("scale", -1)):
        spoilt = {k: v.copy() for k, v in columns.items()}
        spoilt[name][-1] = value
        (batch,) = made.batches(made.schema({}), ["a", "b"], np.array([0, 1]), spoilt)
        with pytest.raises(CacheFormatError):
            made.read(batch)
    (batch,) = made.batches(made.schema({}), ["a", "b"], np.array([0, 0]), columns)
    with pytest.raises(CacheFormatError, match="several"):
        made.read(batch)
