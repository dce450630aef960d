"""A cache with a teacher of each kind of target, and a student for it."""

import pytest
import torch

from rekindle.data.settings import parse_settings
from rekindle.pipeline.caching.cache_teachers import cache_teachers
from rekindle.pipeline.config import RunConfig
from testlib.replaced_tokens import KINDS, NARROW, STILL


@pytest.fixture(scope="session")
def kinds(tmp_path_factory, corpus_file, wordpiece, make_model):
    """A cache with a teacher of each kind, all of one model, and a classifier."""
    torch.set_num_threads(1)
    flat = {"initializer_range": 0.2}
    model = str(make_model("bert", "AutoModelForMaskedLM", wordpiece, 1, **NARROW, **flat))
    expert = str(make_model("bert", "AutoModelForSequenceClassification", wordpiece, 6, **NARROW))
    lm = {"model": model, "task": "masked_lm"}
    teachers = [lm | {"name": name, "targets": targets} for name, targets in KINDS.items()]
    teachers += [lm | {"name": "odd", "targets": KINDS["topk"], "domains": ["odd"]}]
    teachers += [{"name": "sense", "model": expert, "task": "sequence_classification"}]
    path = tmp_path_factory.mktemp("rtd") / "cache"
    values = {
        "corpus": {
            "source": str(corpus_file),
            "tokenizer": str(wordpiece),
            "domain_field": "domain",
            "sequence_length": 24,
            "limit_sequences": 24,
        },
        "cache": {"path": str(path), "sequences_per_shard": 16, "replicas": 2},
        "teachers": teachers,
    }
    cache_teachers(parse_settings(RunConfig, values))
    return path


@pytest.fixture(scope="session")
def student(wordpiece, make_model):
    return make_model("bert", "AutoModelForMaskedLM", wordpiece, 10, **STILL)
