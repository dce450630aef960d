"""A cache with a teacher of each kind of target, and a student for it."""

import pytest

from testlib.models import NARROW, STILL
from testlib.replaced_tokens import KINDS


@pytest.fixture(scope="session")
def kinds(tmp_path_factory, make_teacher, make_cache):
    """A cache with a teacher of each kind, all of one model, and a classifier."""
    flat = NARROW | {"initializer_range": 0.2}
    teachers = [make_teacher(k, "masked_lm", 1, flat, targets=t) for k, t in KINDS.items()]
    teachers += [teachers[0] | {"name": "odd", "domains": ["odd"]}]
    teachers += [make_teacher("sense", "sequence_classification", 6, NARROW)]
    path = tmp_path_factory.mktemp("rtd") / "cache"
    make_cache(path, teachers, {"limit_sequences": 24}, {"sequences_per_shard": 16, "mask": {}})
    return path


@pytest.fixture(scope="session")
def student(wordpiece, make_model):
    return make_model("bert", "AutoModelForMaskedLM", wordpiece, 10, **NARROW, **STILL)
