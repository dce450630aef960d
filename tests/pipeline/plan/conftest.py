"""Teachers of each kind, and the plans of the cache that they then fill."""

from typing import Any

import pytest

from rekindle.pipeline.caching.cache_teachers import cache_teachers
from rekindle.pipeline.plan.run import plan_run
from testlib.stage_one.planned import WHOLE, Teachers


@pytest.fixture(scope="session")
def teachers(make_teacher) -> Teachers:
    """A teacher of each kind of target."""
    classes, forty = "sequence_classification", {"num_labels": 40}
    return [
        make_teacher("lm", "masked_lm", targets={"kind": "topk", "k": 64}),
        make_teacher("causal", "causal_lm", targets={"kind": "topk", "k": 32}),
        make_teacher("dense", "causal_lm", targets={"kind": "dense"}),
        make_teacher("classes", classes, config=forty),
        make_teacher("mc", classes, config=forty, monte_carlo={"passes": 2}),
        make_teacher("pairs", classes, config=forty, pairs="adjacent"),
        make_teacher("words", "token_classification", config=forty),
        make_teacher("even", "masked_lm", domains=["even"]),
    ]


@pytest.fixture(scope="session")
def made(tmp_path_factory, configure, teachers) -> dict[str, Any]:
    """The same configuration planned, planned with a probe, made, and planned again."""
    path = tmp_path_factory.mktemp("planned") / "cache"
    # A probability of masks as the sample has it, and shards that are not all frame.
    where = {"sequences_per_shard": 64, "mask": {"policy": "random", "probability": 0.5}}
    config = configure(path, teachers, corpus=WHOLE, cache=where)
    before = {"plain": plan_run(config, probe=False), "probed": plan_run(config)}
    assert not path.exists()
    cache_teachers(config)
    return {"config": config, "path": path, **before, "after": plan_run(config)}
