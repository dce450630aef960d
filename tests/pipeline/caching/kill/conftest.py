"""Teachers of each kind, and the caches of uninterrupted runs over them."""

from pathlib import Path
from typing import Any

import pytest

from rekindle.pipeline.caching.cache_teachers import cache_teachers
from testlib.killing import CORPUS, Journal, Teachers, forked


@pytest.fixture(scope="session")
def every(make_model, wordpiece) -> Teachers:
    """A teacher of each kind."""

    def teacher(name: str, family: str, auto: str, task: str, **more: Any) -> dict[str, Any]:
        model = make_model(family, f"AutoModelFor{auto}", wordpiece)
        return {"name": name, "model": str(model), "task": task} | more

    causal = ("llama", "CausalLM", "causal_lm")
    classes = ("bert", "SequenceClassification", "sequence_classification")
    return [
        teacher("lm", "bert", "MaskedLM", "masked_lm", targets={"kind": "topk", "k": 4}),
        teacher("hidden", *causal, targets={"kind": "hidden"}),
        teacher("packed", *causal, targets={"kind": "topk", "k": 4, "codec": "compact"}),
        teacher("classes", *classes, monte_carlo={"passes": 2}),
        teacher("words", "bert", "TokenClassification", "token_classification"),
        teacher("pairs", *classes, pairs="adjacent"),
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
