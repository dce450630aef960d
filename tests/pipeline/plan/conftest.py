"""Teachers of each kind, and the plans of the cache that they then fill."""

from typing import Any

import pytest

from rekindle.pipeline.caching.cache_teachers import cache_teachers
from rekindle.pipeline.plan.run import plan_run
from testlib.planned import WHOLE, Teachers


@pytest.fixture(scope="session")
def teachers(make_model, wordpiece) -> Teachers:
    """A teacher of each kind of target."""

    def teacher(name: str, family: str, auto: str, task: str, **more: Any) -> dict[str, Any]:
        labels = {} if "LM" in auto else {"num_labels": 40}
        model = make_model(family, f"AutoModelFor{auto}", wordpiece, **labels)
        return {"name": name, "model": str(model), "task": task} | more

    classes = ("SequenceClassification", "sequence_classification")
    return [
        teacher("lm", "bert", "MaskedLM", "masked_lm", targets={"kind": "topk", "k": 64}),
        teacher("causal", "llama", "CausalLM", "causal_lm", targets={"kind": "topk", "k": 32}),
        teacher("dense", "llama", "CausalLM", "causal_lm", targets={"kind": "dense"}),
        teacher("classes", "bert", *classes),
        teacher("mc", "bert", *classes, monte_carlo={"passes": 2}),
        teacher("pairs", "bert", *classes, pairs="adjacent"),
        teacher("words", "bert", "TokenClassification", "token_classification"),
        teacher("even", "bert", "MaskedLM", "masked_lm", domains=["even"]),
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
