"""Small caches of both tasks, and students without dropout."""

import pytest

from rekindle.data.cache import Cache
from testlib.models import AUTO, NARROW, STILL

TARGETS = {"targets": {"kind": "topk", "k": 8, "temperatures": [1.0, 2.0]}}


def lm(make_teacher, task, name, seed, **more):
    return make_teacher(name, task, seed, NARROW, **TARGETS, **more)


@pytest.fixture(scope="session", params=["masked_lm", "causal_lm"])
def taught(request, tmp_path_factory, make_teacher, make_cache, make_model, wordpiece):
    """The task, the cache's path, and the student's: two teachers, one of half the text."""
    task = request.param
    path = tmp_path_factory.mktemp(task) / "cache"
    pair = [("big", 1, {}), ("odd.lm", 2, {"domains": ["odd"]})]
    make_cache(path, [lm(make_teacher, task, *rest, **more) for *rest, more in pair])
    family, still = ("bert", STILL) if task == "masked_lm" else ("llama", {})
    student = make_model(family, AUTO[task], wordpiece, 10, **NARROW, **still)
    return task, path, student


@pytest.fixture
def cache(taught):
    return Cache.open(taught[1])


@pytest.fixture
def new_student(taught):
    import transformers

    kind = getattr(transformers, AUTO[taught[0]])
    return lambda: kind.from_pretrained(str(taught[2]))
