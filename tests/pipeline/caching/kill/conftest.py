"""Teachers of each kind, and the caches of uninterrupted runs over them."""

from pathlib import Path

import pytest

from rekindle.pipeline.caching.cache_teachers import cache_teachers
from testlib.killing import CORPUS, Journal, Teachers, forked


@pytest.fixture(scope="session")
def every(make_teacher) -> Teachers:
    """A teacher of each kind."""
    causal, classes = "causal_lm", "sequence_classification"
    return [
        make_teacher("lm", "masked_lm", targets={"kind": "topk", "k": 4}),
        make_teacher("hidden", causal, targets={"kind": "hidden"}),
        make_teacher("packed", causal, targets={"kind": "topk", "k": 4, "codec": "compact"}),
        make_teacher("classes", classes, monte_carlo={"passes": 2}),
        make_teacher("words", "token_classification"),
        make_teacher("pairs", classes, pairs="adjacent"),
        make_teacher("vectors", "embedding", pooling="mean", normalise=True),
    ]


@pytest.fixture(scope="session")
def few(every) -> Teachers:
    """Masks, and a matrix beside the targets."""
    return every[:2]


def made(tmp_path_factory, configure, teachers: Teachers) -> Path:
    path = tmp_path_factory.mktemp("whole") / "cache"
    cache_teachers(configure(path, teachers, CORPUS))
    return path


@pytest.fixture(scope="session")
def whole(tmp_path_factory, configure, few) -> Path:
    """The cache of an uninterrupted run."""
    return made(tmp_path_factory, configure, few)


@pytest.fixture(scope="session")
def whole_of_every(tmp_path_factory, configure, every) -> Path:
    return made(tmp_path_factory, configure, every)


@pytest.fixture(scope="session")
def steps(tmp_path_factory, configure, few) -> list[str]:
    """All that a run over ``few`` does, in its order."""
    folder = tmp_path_factory.mktemp("steps")
    journal = Journal(folder / "journal", folder / "cache")
    child = forked(configure(folder / "cache", few, CORPUS), journal)
    assert child.wait() == 0, child.errors
    return journal.lines()
