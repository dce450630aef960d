"""Masks and lessons of self-evolution that make no sense are refused."""

import pytest

from rekindle.data.cache import Cache
from rekindle.data.errors import CacheMismatchError, InputError
from rekindle.data.settings import parse_settings
from rekindle.data.views.masking import MaskConfig
from rekindle.pipeline.caching.cache_teachers import cache_teachers
from rekindle.pipeline.config import dump_config, load_config
from testlib.self_evolution import Step


def test_the_teacher_may_be_in_the_cache_alone(tmp_path, evolve, configure):
    config = evolve(tmp_path)
    cache_teachers(config)
    mask = {"policy": "hard", "teacher": "reference", "loss_above": 1.0}
    cache_teachers(configure(tmp_path, [], cache={"mask": mask}))
    assert len(Cache.open(tmp_path).views) == 2


BAD_MASKS = [
    ({"teacher": "nobody"}, {}, "there is no teacher 'nobody'"),
    ({}, {"view": None}, "give it view: clean"),
    ({}, {"view": "masked"}, "give it view: clean"),
    ({}, {"domains": ["odd"]}, "domains: null"),
]


@pytest.mark.parametrize(("mask", "first", "message"), BAD_MASKS)
def test_masks_that_cannot_be_made_are_refused(tmp_path, evolve, mask, first, message):
    with pytest.raises(InputError, match=message):
        cache_teachers(evolve(tmp_path, mask, **first))
    assert not (tmp_path / "targets").exists()


def test_experts_do_not_say_which_tokens_are_hard(tmp_path, configure, make_model, wordpiece):
    path = make_model("bert", "AutoModelForSequenceClassification", wordpiece)
    expert = {"name": "sense", "model": str(path), "task": "sequence_classification"}
    mask = {"mask": {"policy": "hard", "teacher": "sense"}}
    with pytest.raises(InputError, match="masked_lm teacher with view: clean"):
        cache_teachers(configure(tmp_path, [expert], cache=mask))


BAD_KEYS = [
    ({"mask": {"policy": "hard"}}, "needs teacher"),
    ({"mask": {"policy": "hard", "teacher": "a", "unit": "word"}}, "unit has no meaning"),
    ({"mask": {"policy": "hard", "teacher": "a", "probability": 0.3}}, "probability has no"),
    ({"mask": {"policy": "random", "teacher": "a"}}, "teacher has no meaning"),
    ({"mask": {"loss_above": 0.3}}, "loss_above has no meaning"),
    ({"mask": {"policy": "cover", "limit": 0.3}}, "limit has no meaning"),
]


@pytest.mark.parametrize(("cache", "message"), BAD_KEYS)
def test_keys_of_other_policies_are_refused(tmp_path, configure, cache, message):
    with pytest.raises(InputError, match=message):
        configure(tmp_path, [], cache=cache)


@pytest.mark.parametrize("task", ["causal_lm", "sequence_classification", "token_classification"])
def test_a_view_is_for_masked_lms(tmp_path, configure, task):
    with pytest.raises(InputError, match="view is for masked_lm teachers"):
        configure(tmp_path, [{"name": "a", "model": "m", "task": task, "view": "clean"}])


def test_a_dumped_configuration_is_the_same(tmp_path, evolve):
    for mask in ({}, {"mask_token": 0.7}, {"random_token": 0.1, "mask_token": 0.8}):
        config = evolve(tmp_path / "c", mask)
        (tmp_path / "run.yaml").write_text(dump_config(config))
        assert load_config(tmp_path / "run.yaml") == config


@pytest.mark.parametrize(
    ("values", "shares"),
    [
        ({}, (1.0, 0.0)),
        ({"mask_token": 1.0}, (1.0, 0.0)),
        ({"mask_token": 0.7}, (0.7, 0.0)),
        ({"random_token": 0.25}, (0.75, 0.25)),
        ({"mask_token": 0.8, "random_token": 0.1}, (0.8, 0.1)),
    ],
)
def test_what_is_not_given_of_the_replacements_is_as_described(values, shares):
    hard = {"policy": "hard", "teacher": "reference"}
    config = parse_settings(MaskConfig, hard | values)
    assert (config.mask_token, config.random_token) == shares


def test_another_view_under_the_same_name_is_refused(tmp_path, evolve, configure, model):
    cache_teachers(evolve(tmp_path))
    masked = {
        "name": "reference",
        "model": str(model),
        "task": "masked_lm",
        "targets": {"kind": "topk", "k": 12},
    }
    with pytest.raises(CacheMismatchError, match="view: 'clean' there"):
        cache_teachers(configure(tmp_path, [masked]))


BAD_TERMS = [
    (
        [{"teachers": ["reference", "second"], "combine": "mixture"}],
        "saw different views",
    ),
    ([{"teachers": ["reference"], "temperature": 7.0}], "stores the temperatures"),
]


@pytest.mark.parametrize(("terms", "message"), BAD_TERMS)
def test_lessons_that_make_no_sense_are_refused(tmp_path, evolve, second, student, terms, message):
    config = evolve(tmp_path, teachers=[second], corpus={"limit_sequences": 2})
    cache_teachers(config)
    with pytest.raises(InputError, match=message):
        Step(Cache.open(tmp_path), student, {"distill": terms})
