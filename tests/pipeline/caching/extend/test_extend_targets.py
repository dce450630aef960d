"""Temperatures and candidates are added to a teacher's targets."""

import itertools

import numpy as np
import pytest
import torch

from rekindle.data.cache import Cache
from rekindle.pipeline.caching.cache_teachers import StageOne, cache_teachers
from rekindle.train.device_batch import kd_targets, sparse_targets
from testlib.run_alone import NOISE
from testlib.stage_one.extending import (
    CPU,
    UNITS,
    assert_kept,
    assert_same_targets,
    assert_sound,
    assert_tails_are_the_models,
    files_of,
    logits_at,
    units,
)


@pytest.mark.parametrize("task", ["causal_lm", "masked_lm"])
def test_further_temperatures(make, whole, copied, models, ran, task):
    """Tail masses of the ids that are stored; nothing else is made."""
    path = copied(task)
    before, size = files_of(path), Cache.open(path).teachers["lm"].bytes
    taus = (1.0, 4.0, 0.5)  # 2 stays, though it is not asked for
    result = cache_teachers(make(path, task=task, taus=taus))
    assert result == StageOne(12, UNITS[task], UNITS[task])
    parts = {part for _, part, _ in ran}
    assert len(parts) == 1
    assert "" not in parts
    assert [unit for _, _, unit in ran] == units(task, range(3))
    assert_kept(before, path)
    assert_sound(path)
    cache = Cache.open(path)
    assert set(cache.teachers["lm"].info.temperatures) == {0.5, 1.0, 2.0, 4.0}
    assert cache.teachers["lm"].info.k == 4
    added = [p for p in path.rglob("*.arrow") if p not in before]
    assert len(added) == UNITS[task]
    positions = cache.teachers["lm"].positions
    assert cache.teachers["lm"].bytes - size < UNITS[task] * 6000 + 8 * positions
    assert_tails_are_the_models(cache, models[task], task, {0.5, 1.0, 2.0, 4.0})
    assert_same_targets(cache, whole(task=task, taus=(0.5, 1.0, 2.0, 4.0)))


@pytest.mark.parametrize("codec", ["default", "precise", "compact"])
def test_further_temperatures_and_candidates_in_every_codec(tmp_path, make, whole, models, codec):
    path = tmp_path / "cache"
    cache_teachers(make(path, codec=codec))
    for step in ({"taus": (1.0, 3.0)}, {"k": 9, "taus": (1.0, 2.0)}, {"k": 9, "taus": (8.0,)}):
        before = files_of(path)
        result = cache_teachers(make(path, codec=codec, **step))
        assert result.units_done == 3
        assert_kept(before, path)
        assert_sound(path)
    cache = Cache.open(path)
    assert cache.teachers["lm"].info.codec == codec
    assert cache.teachers["lm"].info.k == 9
    assert_tails_are_the_models(cache, models["causal_lm"], "causal_lm", {1.0, 2.0, 3.0, 8.0})
    assert_same_targets(cache, whole(codec=codec, k=9, taus=(1.0, 2.0, 3.0, 8.0)))


@pytest.mark.parametrize("task", ["causal_lm", "masked_lm"])
def test_a_larger_k(make, whole, copied, models, ran, task):
    path = copied(task)
    before = files_of(path)
    result = cache_teachers(make(path, task=task, k=9))
    assert result == StageOne(12, UNITS[task], 0)
    assert [unit for _, _, unit in ran] == units(task, range(3))
    assert_kept(before, path)
    assert_sound(path)
    cache = Cache.open(path)
    assert cache.teachers["lm"].info.k == 9
    assert_tails_are_the_models(cache, models[task], task, {1.0, 2.0})
    assert_same_targets(cache, whole(task=task, k=9))


@pytest.mark.parametrize("task", ["causal_lm", "masked_lm"])
def test_a_larger_k_and_further_temperatures_at_once(make, whole, copied, models, ran, task):
    path = copied(task)
    before = files_of(path)
    assert cache_teachers(make(path, task=task, k=9, taus=(8.0,))).units_done == UNITS[task]
    assert_kept(before, path)
    assert_sound(path)
    cache = Cache.open(path)
    # What could be read before can be read now.
    assert_tails_are_the_models(cache, models[task], task, {1.0, 2.0, 8.0})
    assert_same_targets(cache, whole(task=task, k=9, taus=(1.0, 2.0, 8.0)))


STEPS = {
    "temperature": {"taus": (1.0, 4.0)},
    "candidates": {"k": 9},
    "text": {"limit": 17},
}
ROUND = [tuple([*STEPS][turn:] + [*STEPS][:turn]) for turn in range(3)]


# Quick are three in which each step is once the first, once the second and once the last.
ORDERS = [
    pytest.param(order, marks=[] if order in {*ROUND} else pytest.mark.slow)
    for order in itertools.permutations(STEPS)
]


@pytest.mark.parametrize("order", ORDERS)
def test_in_every_order(make, whole, copied, ran, order):
    """Each step asks for all that the steps before it asked for; the end is the same."""
    path, asked = copied("causal_lm"), {}
    for name in order:
        asked |= STEPS[name]
        before = files_of(path)
        ran.clear()
        result = cache_teachers(make(path, **asked))
        assert len(ran) == result.units_done > 0
        assert len(set(ran)) == len(ran)
        assert_kept(before, path)
        assert_sound(path)
    cache = Cache.open(path)
    assert cache.teachers["lm"].coverage == 1
    assert_same_targets(cache, whole(k=9, taus=(1.0, 2.0, 4.0), limit=17))
    ran.clear()
    assert cache_teachers(make(path, **asked)).units_done == 0
    assert ran == []


def test_temperatures_twice_in_a_row(make, copied, models, ran):
    """Only those that are new, each time; a part of their own each time."""
    path = copied("causal_lm")
    for taus, done in (((1.0, 4.0), 3), ((1.0, 4.0, 8.0), 3), ((8.0, 0.5, 4.0), 3), ((0.5,), 0)):
        before = files_of(path)
        ran.clear()
        assert cache_teachers(make(path, taus=taus)).units_done == len(ran) == done
        assert_kept(before, path)
        assert_sound(path)
    cache = Cache.open(path)
    assert_tails_are_the_models(cache, models["causal_lm"], "causal_lm", {0.5, 1.0, 2.0, 4.0, 8.0})


def test_k_twice_in_a_row(make, copied, models, ran):
    path = copied("causal_lm")
    for k, done in ((6, 3), (9, 3), (7, 0), (4, 0), (1, 0)):
        before = files_of(path)
        ran.clear()
        assert cache_teachers(make(path, k=k)).units_done == len(ran) == done
        assert_kept(before, path)
    assert_sound(path)
    assert Cache.open(path).teachers["lm"].info.k == 9


def test_k_of_the_whole_vocabulary_is_exact_when_it_is_added(make, copied):
    path = copied("causal_lm")
    assert cache_teachers(make(path, k=100_000)).units_done == 3
    info = Cache.open(path).teachers["lm"].info
    assert (info.k, info.estimator["bias"]) == (info.vocabulary_size, "exact")
    assert cache_teachers(make(path, k=100_000)).units_done == 0


def test_many_temperatures_at_once(make, copied, models):
    """Their number is not limited by what makes a readable name."""
    path = copied("causal_lm")
    taus = tuple(1 + n / 8 for n in range(24))
    assert cache_teachers(make(path, taus=taus)).units_done == 3
    assert_sound(path)
    assert_tails_are_the_models(
        Cache.open(path), models["causal_lm"], "causal_lm", {*taus, 1.0, 2.0}
    )


def test_temperatures_that_differ_in_the_eighth_digit(make, copied):
    path = copied("causal_lm")
    for tau in (3.0, 3.0000001, 0.00001):
        assert cache_teachers(make(path, taus=(1.0, tau))).units_done == 3
    assert set(Cache.open(path).teachers["lm"].info.temperatures) == {
        1.0,
        2.0,
        3.0,
        3.0000001,
        0.00001,
    }


@pytest.mark.parametrize(
    "less", [{"k": 2}, {"taus": (1.0,)}, {"k": 1, "taus": (2.0,)}, {"k": 4, "taus": ()}]
)
def test_less_than_there_is_asks_for_nothing(make, copied, ran, less):
    path = copied("causal_lm")
    before = files_of(path)
    assert cache_teachers(make(path, **less)) == StageOne(12, 0, 3)
    assert ran == []
    assert files_of(path) == before
    info = Cache.open(path).teachers["lm"].info
    assert (info.k, info.temperatures) == (4, (1.0, 2.0))


def test_less_than_was_added_makes_new_text_as_rich(make, copied, ran):
    """A longer corpus gets the candidates and temperatures that the rest of it has."""
    path = copied("causal_lm")
    cache_teachers(make(path, k=9, taus=(1.0, 4.0)))
    ran.clear()
    cache_teachers(make(path, limit=17))
    cache = Cache.open(path)
    assert cache.teachers["lm"].info.k == 9
    assert set(cache.teachers["lm"].info.temperatures) == {1.0, 2.0, 4.0}
    assert len(ran) == 1
    assert_sound(path)
    assert cache.example(16).targets["lm"][0].ids.shape[1] == 9


def test_new_text_keeps_temperatures_that_are_not_asked_for(make, copied, ran):
    """The union stays readable: a temperature is not lost because the next run leaves it out."""
    path = copied("causal_lm")
    cache_teachers(make(path, taus=(1.0, 4.0)))
    assert set(Cache.open(path).teachers["lm"].info.temperatures) == {1.0, 2.0, 4.0}
    cache_teachers(make(path, limit=17))
    assert set(Cache.open(path).teachers["lm"].info.temperatures) == {1.0, 2.0, 4.0}


# --- students -------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["causal_lm", "masked_lm"])
def test_students_read_the_new_temperature_and_k(make, copied, models, task):
    path = copied(task)
    cache_teachers(make(path, task=task, k=9, taus=(4.0,)))
    cache_teachers(make(path, task=task, k=9, taus=(8.0,)))
    cache = Cache.open(path)
    view = cache.teachers["lm"].info.view
    masked = view if view.startswith("masked-") else None
    batch = cache.gather(np.arange(12), ["lm"], masked_view=masked)
    for tau, k in itertools.product((1.0, 2.0, 4.0, 8.0), (None, 9, 6, 1)):
        kd_targets(batch.targets["lm"], tau, k, CPU)
        found = sparse_targets(batch.targets["lm"], tau, k, CPU)
        at = 0
        for index in range(12):
            target = cache.example(index).targets["lm"][0]
            exact = torch.softmax(torch.from_numpy(logits_at(target, models[task], task)) / tau, 1)
            mine = slice(at, at + len(target.positions))
            at = mine.stop
            assert found.ids[mine].shape == (len(target.positions), k or 9)
            p = exact.gather(1, found.ids[mine])
            error = (found.probs[mine].double() / p).log().abs()
            span = (target.log_probs[:, :1] - target.log_probs[:, -1:]).clip(0, 32)
            bound = 2 * (span / 510 + 1 / 1024) / tau + 1 / 2048 + NOISE / tau
            assert (error.numpy() <= bound)[p.numpy() > 1e-12].all()
        assert at == len(found.ids)


def test_a_student_trains_on_a_grown_cache(tmp_path, make, copied, models):
    from rekindle.data.settings import parse_settings
    from rekindle.train.config import StudentConfig, TrainConfig
    from rekindle.train.loop import train_student

    path = copied("masked_lm")
    cache_teachers(make(path, task="masked_lm", k=9, taus=(1.0, 4.0), limit=17))
    config = parse_settings(
        TrainConfig,
        {
            "steps": 3,
            "batch_sequences": 6,
            "warmup_steps": 1,
            "evaluate_sequences": 4,
            "objective": {"distill": [{"teachers": ["lm"], "temperature": 4.0, "k": 7}]},
        },
    )
    student = StudentConfig(model=str(models["masked_lm"]), task="masked_lm")
    result = train_student(Cache.open(path), student, config, tmp_path / "run")
    assert result.coverage["sequences_with_kd"] > 0
    assert result.coverage["sequences_ce_only"] == result.coverage["sequences_neither"] == 0
    # A teacher's own weights: what is left is the other masks' and dropout's doing.
    assert np.isfinite(result.evaluation["kl/lm"])
