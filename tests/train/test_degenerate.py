"""Settings that come to nothing: refused with what to give, or said in one line."""

import re

import pytest

from rekindle.data.errors import InputError
from rekindle.data.settings import parse_settings
from rekindle.data.views.masking import MaskConfig
from rekindle.pipeline.config import CacheConfig, RunConfig, configure_stage
from rekindle.train.config import TrainConfig
from rekindle.train.objective.objective import Objective
from rekindle.train.order.sequences import choose_sequences

FALLING = {"from": 1.0, "to": 0.0, "over": 0.01}


def config_of(**values):
    return parse_settings(TrainConfig, values)


# --- the warm-up ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (6, 0), (60, 6), (999, 99), (10**6, 100)])
def test_a_warm_up_that_is_not_given_is_a_tenth_of_the_steps_and_at_most_100(steps, warmup):
    assert config_of(steps=steps).warmup_steps == warmup


@pytest.mark.parametrize(("steps", "warmup"), [(6, 100), (6, 6), (1, 1)])
def test_a_warm_up_as_long_as_the_run_is_refused(steps, warmup):
    message = rf"warmup_steps {warmup} of steps {steps}: .* leave it out \(a tenth"
    with pytest.raises(InputError, match=message):
        config_of(steps=steps, warmup_steps=warmup)
    assert config_of(steps=steps + warmup, warmup_steps=warmup).warmup_steps == warmup


def test_a_stage_of_fewer_steps_has_a_warm_up_of_its_own():
    stages = [{"name": "short", "set": {"train.steps": 20}}]
    corpus = {"source": ["a.txt"], "tokenizer": "t"}
    values = {"corpus": corpus, "cache": {"path": "c"}, "train": {"steps": 500}, "stages": stages}
    config = parse_settings(RunConfig, values)
    assert config.train.warmup_steps == 50
    assert configure_stage(config, config.stages[0]).train.warmup_steps == 2


# --- what never acts ------------------------------------------------------------------------------


def test_a_replay_of_nothing_is_refused():
    replay = {"domains": ["a"], "fraction": 0.01}
    message = (
        "replay.fraction 0.01 of 10 steps of 4 sequences is less than one sequence. Give at least "
    )
    with pytest.raises(InputError, match=re.escape(message + "0.025")):
        config_of(steps=10, batch_sequences=4, replay=replay)


@pytest.mark.parametrize(
    "values",
    [
        {"steps": 25, "batch_sequences": 4, "replay": {"domains": ["a"], "fraction": 0.01}},
        {"micro_batch_sequences": 500, "batch_sequences": 4},  # at most so many
        {"steps": 5, "evaluate_every": 500, "checkpoint_every": 500},  # the end has both
    ],
)
def test_what_acts_once_is_not(values):
    config_of(**values)


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"curriculum": {"teacher": "a", "keep": 0.0}}, "curriculum.keep"),
        ({"curriculum": {"teacher": "a", "until": 0.0}}, "curriculum.until"),
        ({"objective": {"distill": [{"teachers": ["a"], "temperature": 0}]}}, "temperature"),
        ({"objective": {"distill": [{"teachers": ["a"], "k": 0}]}}, "distill.0.k"),
        ({"objective": {"distill": [{"teachers": ["a"], "entropy_fraction": 0}]}}, "entropy"),
        ({"objective": {"hard": {"weight": {"over": 0}}}}, "over"),
        ({"steps": 0}, "steps"),
        ({"held_out": 1.0}, "held_out"),
        ({"evaluate_sequences": 0}, "evaluate_sequences"),
    ],
)
def test_nothing_of_something_is_refused(values, key):
    with pytest.raises(InputError, match=key):
        config_of(**values)


LATE = {"schedule": "step", "from": 0.0, "to": 1.0, "over": 0.5}
EARLY = {"from": 1.0, "to": 0.0, "over": 0.3}


@pytest.mark.parametrize(
    ("hard", "distill", "when"),
    [
        (LATE, [], "at step 2"),
        (LATE, [{"teachers": ["a"], "weight": EARLY}], "at step 32"),
        (EARLY, [], "at the end of the run"),
    ],
)
def test_steps_of_which_every_weight_is_0_are_refused(masked_world, hard, distill, when):
    values = {"steps": 100, "objective": {"hard": {"weight": hard}, "distill": distill}}
    infos = {"a": masked_world.open().teacher("big").info}
    with pytest.raises(InputError, match=f"{when} every weight is 0, so nothing is trained"):
        Objective(config_of(**values).objective, infos, "masked_lm", 100)
    rising = {"from": 0.0, "to": 1.0, "over": 0.5}  # of step 1 alone
    Objective(config_of(objective={"hard": {"weight": rising}}).objective, {}, "masked_lm", 100)


def test_masks_that_hide_nothing_or_everything_are_refused():
    with pytest.raises(InputError, match="every chosen token would stay unchanged"):
        parse_settings(MaskConfig, {"mask_token": 0, "random_token": 0})
    with pytest.raises(InputError, match=r"replicas 1 with mask\.policy cover"):
        parse_settings(CacheConfig, {"path": "c", "replicas": 1, "mask": {"policy": "cover"}})


# --- what depends on the corpus -------------------------------------------------------------------


def test_a_curriculum_of_less_than_a_batch_is_refused(causal_world):
    cache = causal_world.open()

    def chosen(**values):
        salt = {"teacher": "lm", "keep": values.pop("keep")}
        return choose_sequences(cache, config_of(held_out=0.1, curriculum=salt, **values))

    size = len(chosen(keep=0.9, batch_sequences=4).order)
    kept = round(size * 0.1)
    message = (
        f"train.curriculum.keep 0.1 of {size} sequences leaves {kept}, fewer than the {kept + 1} "
        f"that a step reads: .* Keep at least {(kept + 1) / size:.2g}, use a smaller"
    )
    with pytest.raises(InputError, match=message):
        chosen(keep=0.1, batch_sequences=kept + 1)
    assert len(chosen(keep=0.1, batch_sequences=kept).order) == size
    with pytest.raises(InputError, match=r"Use a smaller train\.batch_sequences, or"):
        chosen(keep=0.1, batch_sequences=10_000)


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"steps": 60}, "train.warmup_steps is not given: 6 of 60 steps, a tenth"),
        ({"batch_sequences": 5000}, r"batch_sequences is 5000, but only \d+ sequences of"),
        (
            {"objective": {"hard": {"weight": FALLING | {"to": 0.5}}}, "steps": 50},
            r"hard.weight is 1 for one step and 0.5 from then on: over 0.01 of 50 steps is less",
        ),
        (
            {
                "objective": {"methods": [{"method": "replaced_tokens", "weight": FALLING}]},
                "steps": 99,
            },
            r"methods.0.weight is 1 for one step and 0 from then on: over 0.01 of 99 steps",
        ),
        ({"held_out": 0.0}, r"nothing is held out \(train.held_out 0\): nothing is evaluated"),
        (
            {
                "steps": 60,
                "evaluate_every": 20,
                "domains": ["odd"],
                "replay": {"domains": ["even"], "fraction": 0.3},
            },
            "acts from step 60 on .*, and the run has 60: all domains are replayed equally",
        ),
    ],
)
def test_what_follows_from_sizes_is_said_in_a_line(causal_world, caplog, values, line):
    cache = causal_world.open()
    with caplog.at_level("INFO", logger="rekindle"):
        given = {"held_out": 0.2, "batch_sequences": 4, "steps": 20}
        choose_sequences(cache, config_of(**given | values))
    found = [message for message in caplog.messages if re.search(line, message)]
    assert len(found) == 1
    caplog.clear()
    with caplog.at_level("INFO", logger="rekindle"):
        choose_sequences(cache, config_of(held_out=0.2, batch_sequences=4, warmup_steps=5))
    assert [m for m in caplog.messages if not m.startswith("corpus: ")] == []
