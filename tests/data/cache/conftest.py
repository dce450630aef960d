"""A cache with teachers of every kind."""

import shutil

import pytest

from rekindle.data.cache import Cache
from testlib.cache_format import PER_SHARD, SMALL


@pytest.fixture(scope="session")
def made(tmp_path_factory, make_teacher, make_cache):
    """A finished cache with a teacher of every kind of target; no test writes into it."""
    path = tmp_path_factory.mktemp("format") / "cache"
    lm, causal, classes = "masked_lm", "causal_lm", "sequence_classification"
    three = SMALL | {"num_labels": 3, "hidden_dropout_prob": 0.2}
    five = {"kind": "topk", "k": 5, "temperatures": [3.0]}
    passes = {"monte_carlo": {"passes": 2}, "domains": ["even"]}
    teachers = [
        make_teacher("mlm", lm, config=SMALL, targets={"kind": "topk", "k": 9}),
        make_teacher("dense", lm, 1, SMALL, targets={"kind": "dense"}),
        make_teacher("clm", causal, config=SMALL, targets=five),
        make_teacher("expert", classes, config=three, **passes),
        make_teacher("pairs", classes, 2, SMALL | {"num_labels": 2}, pairs="adjacent"),
        make_teacher("tags", "token_classification", config=three),
    ]
    corpus = {"sequence_length": 12, "limit_sequences": None}
    where = {"sequences_per_shard": PER_SHARD, "mask": {}}
    make_cache(path, teachers, corpus, where)
    return path


@pytest.fixture(scope="session")
def cache(made):
    return Cache.open(made)


@pytest.fixture
def copied(made, tmp_path):
    """A copy of the cache to damage."""
    shutil.copytree(made, tmp_path / "cache")
    return tmp_path / "cache"
