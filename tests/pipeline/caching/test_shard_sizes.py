"""Shards of a corpus whose configuration does not say how large they are: decided once."""

import logging

import pytest

from rekindle.data.cache import Cache
from rekindle.data.corpus import packing
from rekindle.data.settings import parse_settings
from rekindle.pipeline.caching.cache_teachers import cache_teachers
from rekindle.pipeline.config import RunConfig
from rekindle.pipeline.plan.run import plan_run

EXPERT = ("classes", "sequence_classification")


@pytest.fixture
def run_of(tmp_path, configure, make_teacher, monkeypatch):
    """run_of(sequences, per_shard): a run with an expert; None: without a limit, or the key."""
    monkeypatch.setattr(packing, "MIN_SHARD_SIZE", 2)
    monkeypatch.setattr(packing, "MIN_SHARDS", 4)
    teacher = make_teacher(*EXPERT)

    def make(sequences, per_shard=None):
        found = configure(tmp_path / "cache", [teacher], {"limit_sequences": sequences})
        values = found.model_dump(mode="json", by_alias=True, exclude_unset=True)
        del values["cache"]["sequences_per_shard"]
        values["cache"] |= {} if per_shard is None else {"sequences_per_shard": per_shard}
        return parse_settings(RunConfig, values)

    return make


def shards(path):
    return [commit.rows for commit in Cache.open(path).corpus.commits]


def test_a_new_cache_has_shards_of_its_own_size_as_planned(run_of, tmp_path, caplog):
    """Without a limit they are estimated, and what is then made is what the plan had said."""
    config = run_of(None)
    plan = plan_run(config, probe=False)
    with caplog.at_level(logging.INFO, logger="rekindle"):
        done = cache_teachers(config)
    size = packing.default_shard_size(done.corpus_sequences)
    assert f"corpus: {size} sequences per shard, a file (cache.sequences_per_shard)" in caplog.text
    assert len(shards(tmp_path / "cache")) == -(-done.corpus_sequences // size) > 4
    assert sum(work.units_to_make for work in plan.teachers) == done.units_done
    assert plan_run(config, probe=False).teachers[0].units_to_make == 0


def test_a_corpus_goes_on_with_the_size_it_has(run_of, tmp_path):
    """With or without the key when it was begun; longer, too."""
    cache_teachers(run_of(4, 3))  # as an older version had 4,096
    assert shards(tmp_path / "cache") == [3, 1]
    plan = plan_run(run_of(12), probe=False)
    done = cache_teachers(run_of(12))
    assert shards(tmp_path / "cache") == [3, 1, 3, 3, 2]
    assert plan.teachers[0].units_to_make == done.units_done == 3
