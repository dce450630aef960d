"""A world for each task: the targets of one model, of every kind and in every codec."""

import pytest

from rekindle.pipeline.caching.cache_teachers import cache_teachers
from testlib.estimators import CODECS, CODED, FAMILY, TARGETS, TASKS, World, teachers_of
from testlib.models import AUTO


@pytest.fixture(scope="session", params=TASKS)
def world(request, tmp_path_factory, configure, make_model, wordpiece) -> World:
    task = request.param
    model = make_model(FAMILY[task], AUTO[task], wordpiece, seed=3, initializer_range=0.3)
    folder = tmp_path_factory.mktemp(task)
    corpus, cache = {"limit_sequences": 24}, {"sequences_per_shard": 10}
    configs = {
        codec: configure(
            folder / codec,
            teachers_of(model, task, list(TARGETS) if codec == "default" else CODED, codec),
            corpus=corpus,
            cache=cache,
        )
        for codec in CODECS
    }
    for config in configs.values():
        cache_teachers(config)
    folders = {codec: folder / codec for codec in CODECS}
    return World(task, model, folders, configs["default"])
