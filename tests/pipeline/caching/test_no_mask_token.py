"""Where nothing is masked no mask token is needed: a student that learns from classifiers alone."""

import pytest

from rekindle.data.cache import Cache
from rekindle.data.errors import InputError
from rekindle.data.settings import parse_settings
from rekindle.pipeline.caching.cache_teachers import cache_teachers
from rekindle.pipeline.config import RunConfig
from rekindle.pipeline.plan.run import plan_run
from rekindle.pipeline.train_student import train_from_config


@pytest.fixture
def classifiers_only(tmp_path, configure, make_model, bytelevel):
    """classifiers_only(hard=…, teachers=…, **term) -> a run beside one expert, of models whose
    tokenizer is GPT-2's, which has no mask token.
    """
    expert = make_model("roberta", "AutoModelForSequenceClassification", bytelevel, num_labels=3)
    teacher = {"name": "expert", "model": str(expert), "task": "sequence_classification"}
    student = str(make_model("roberta", "AutoModelForMaskedLM", bytelevel))

    def make(*, hard=0.0, teachers=(teacher,), **term):
        corpus = {"tokenizer": str(bytelevel)}
        config = configure(tmp_path / "cache", teachers, corpus=corpus)
        values = config.model_dump(mode="json", by_alias=True, exclude_unset=True)
        objective = {"hard": {"weight": hard}, "distill": [{"teachers": ["expert"]} | term]}
        train = {"steps": 3, "batch_sequences": 4, "held_out": 0.2, "objective": objective}
        values |= {"student": {"model": student}, "train": train}
        return parse_settings(RunConfig, values)

    return make


def test_a_run_without_masks_needs_no_mask_token(tmp_path, classifiers_only):
    config = classifiers_only()
    assert plan_run(config, probe=False).views == ()
    cache_teachers(config)
    assert not Cache.open(tmp_path / "cache").views
    result = train_from_config(config, tmp_path / "out")
    assert {"kl/expert", "agreement/expert", "loss"} <= result.evaluation.keys()
    assert "ce" not in result.evaluation
    assert result.coverage["sequences_with_kd"] == 12
    assert result.coverage["positions_neither"] == 0
    again = train_from_config(config, tmp_path / "out", resume=True)
    assert again.was_finished


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"hard": 1.0}, "a masked_lm student (train.objective.hard.weight is above 0)"),
        ({"view": "masked"}, "train.objective.distill.0 of a masked_lm student"),
        ({"hard": {"schedule": "linear", "from": 0, "to": 1}}, "hard.weight is above 0"),
    ],
)
def test_what_masks_text_needs_one_and_says_what_it_is(tmp_path, classifiers_only, given, told):
    with pytest.raises(InputError) as caught:
        cache_teachers(classifiers_only(**given))
    assert told in str(caught.value)
    assert "has no mask token" in str(caught.value)
    assert not (tmp_path / "cache").exists()
    cache_teachers(classifiers_only())
    with pytest.raises(InputError, match="has no mask token, but the objective is a masked LM"):
        train_from_config(classifiers_only(**given), tmp_path / "out")
    assert not (tmp_path / "out").exists()
