"""A cache with teachers of every kind."""

import shutil

import pytest

from rekindle.data.cache import Cache
from testlib.cache_format import PER_SHARD, SMALL
from testlib.disk import without_fsync


@pytest.fixture(scope="session")
def made(tmp_path_factory, corpus_file, wordpiece, make_model):
    """A finished cache with a teacher of every kind of target; no test writes into it."""
    import torch

    from rekindle.pipeline.caching.cache_teachers import cache_teachers
    from rekindle.pipeline.config import RunConfig

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # models this small only wait for each other's threads
    path = tmp_path_factory.mktemp("format") / "cache"

    def teacher(name, family, auto, task, seed=0, **values):
        extra = values.pop("extra", {})
        model = make_model(family, f"AutoModelFor{auto}", wordpiece, seed, **SMALL, **extra)
        return {"name": name, "model": str(model), "task": task, **values}

    labels = {"num_labels": 3, "hidden_dropout_prob": 0.2}
    teachers = [
        teacher("mlm", "bert", "MaskedLM", "masked_lm", targets={"kind": "topk", "k": 9}),
        teacher("dense", "bert", "MaskedLM", "masked_lm", 1, targets={"kind": "dense"}),
        teacher(
            "clm",
            "llama",
            "CausalLM",
            "causal_lm",
            targets={"kind": "topk", "k": 5, "temperatures": [3.0]},
        ),
        teacher(
            "expert",
            "bert",
            "SequenceClassification",
            "sequence_classification",
            extra=labels,
            monte_carlo={"passes": 2},
            domains=["even"],
        ),
        teacher(
            "pairs",
            "bert",
            "SequenceClassification",
            "sequence_classification",
            2,
            extra={"num_labels": 2},
            pairs="adjacent",
        ),
        teacher("tags", "bert", "TokenClassification", "token_classification", extra=labels),
    ]
    config = RunConfig.model_validate(
        {
            "corpus": {
                "source": str(corpus_file),
                "tokenizer": str(wordpiece),
                "sequence_length": 12,
                "domain_field": "domain",
            },
            "cache": {"path": str(path), "sequences_per_shard": PER_SHARD, "replicas": 2},
            "teachers": teachers,
        }
    )
    with without_fsync():
        cache_teachers(config)
    torch.set_num_threads(threads)
    return path


@pytest.fixture(scope="session")
def cache(made):
    return Cache.open(made)


@pytest.fixture
def copied(made, tmp_path):
    """A copy of the cache to damage."""
    shutil.copytree(made, tmp_path / "cache")
    return tmp_path / "cache"
