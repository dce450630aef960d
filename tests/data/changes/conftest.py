"""A cache with teachers that can be changed, and the same as made otherwise at once."""

import shutil
from pathlib import Path

import pytest

SMALL = {"hidden_size": 16, "intermediate_size": 24}
KEPT = ({"k": 4, "temperatures": [1.0]}, {"k": 6, "temperatures": [1.0]})
KEPT += ({"k": 6, "temperatures": [1.0, 2.0]},)


@pytest.fixture(scope="session")
def make_changed(tmp_path_factory, make_teacher, make_cache):
    """make_changed(name, codec) -> a cache of 7 sequences in two shards, with a masked LM of that
    name and codec, another part of it with a larger k and one with a further temperature; and an
    expert beside it.
    """

    def make(name: str = "a", codec: str = "default") -> Path:
        path = tmp_path_factory.mktemp("changes") / "cache"
        expert = make_teacher("expert", "sequence_classification", config=SMALL | {"num_labels": 3})
        for kept in KEPT:
            targets = {"kind": "topk", "codec": codec, **kept}
            lm = make_teacher(name, "masked_lm", config=SMALL, targets=targets)
            make_cache(path, [lm, expert], {"limit_sequences": 7})
        return path

    return make


@pytest.fixture(scope="session")
def plain(make_changed) -> Path:
    """With the teacher ``a`` in the default codec; no test writes into it."""
    return make_changed()


@pytest.fixture(scope="session")
def compact(make_changed) -> Path:
    """With the teacher ``a`` in the compact codec; no test writes into it."""
    return make_changed(codec="compact")


@pytest.fixture(scope="session")
def called_b(make_changed) -> Path:
    """With the teacher ``b`` in place of ``a``; no test writes into it."""
    return make_changed("b")


@pytest.fixture
def cache(plain, tmp_path) -> Path:
    """A copy of ``plain`` to change."""
    shutil.copytree(plain, tmp_path / "cache")
    return tmp_path / "cache"
