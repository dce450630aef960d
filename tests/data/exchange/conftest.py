"""Caches to import into and to export from."""

import shutil
from pathlib import Path

import pytest

from rekindle.data.cache import Cache


@pytest.fixture(scope="session")
def bare(tmp_path_factory, configure, make_model, wordpiece):
    """A cache of text and masks without a teacher: 12 sequences in shards of 5, 5 and 2."""
    from rekindle.pipeline.caching.cache_teachers import cache_teachers
    from rekindle.train.config import StudentConfig

    path = tmp_path_factory.mktemp("bare") / "cache"
    model = str(make_model("bert", "AutoModelForMaskedLM", wordpiece))
    student = StudentConfig.model_validate({"model": model, "task": "masked_lm"})
    cache_teachers(configure(path, []).model_copy(update={"student": student}))
    return path


@pytest.fixture
def empty(bare, tmp_path) -> Path:
    """A copy of ``bare`` to import into."""
    shutil.copytree(bare, tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture
def cache(empty) -> Cache:
    return Cache.open(empty)
