"""Every kind of target has all its parts: on disk, from logits, to the loss, in a configuration."""

from typing import get_args

import pytest

from rekindle.data.targets.codec_registry import CODECS
from rekindle.data.targets.kinds.registry import KINDS, VOCABULARY_KINDS, kind_of
from rekindle.data.targets.schema import Codec, Kind, TeacherInfo, VocabularyKindName
from rekindle.pipeline.caching.scoring import SCORERS
from rekindle.train.device_batch import LOSS_TARGETS


def test_every_name_of_teacher_json_is_registered():
    assert set(KINDS) == set(get_args(Kind))
    assert set(VOCABULARY_KINDS) == set(get_args(VocabularyKindName))
    assert set(CODECS) == set(get_args(Codec))
    assert all(name == kind.name for name, kind in KINDS.items())


def test_every_vocabulary_kind_is_taken_from_logits_and_reaches_the_loss():
    assert set(SCORERS) == {*VOCABULARY_KINDS, "tails"}
    assert set(LOSS_TARGETS) == set(VOCABULARY_KINDS)


def test_a_sample_is_read_at_its_own_temperature_and_has_no_part():
    for kind in VOCABULARY_KINDS.values():
        assert kind.needs_temperatures == ("k" in kind.needs) == (not kind.has_all_probabilities)
        assert not (
            kind.is_sample and (kind.has_tail or kind.can_grow or kind.has_all_probabilities)
        )


@pytest.mark.parametrize("name", VOCABULARY_KINDS)
def test_what_a_configuration_keeps_is_a_sound_description(name):
    """`settings`, `contradiction`, the schema and a position's width agree, in every codec."""
    for codec in VOCABULARY_KINDS[name].codecs:
        kept = VOCABULARY_KINDS[name].settings(9, (2.0,), codec, 70_000, 16)
        about = {"name": "t", "task": "causal_lm", "view": "clean", "vocabulary_size": 70_000}
        info = TeacherInfo.model_validate(about | kept)
        kind = kind_of(info)
        assert kind.has_sizes
        assert kind.contradiction() is None
        assert kind.readable_temperature == (1.0 if kind.has_all_probabilities else 2.0)
        assert kind.schema({}).names[0] == "digest"
        assert set(kind.schema({}).names[1:]) == {*kind.stored_columns(), *kind.entry_columns()}
        assert kind.bytes_per_position >= 2 + 2 + 4 + 2
        assert [len(flat) for flat in kind.empty_columns().values()] == [0] * len(
            kind.empty_columns()
        )
        broken = info.model_copy(update={kind.needs[-1]: None})
        assert kind_of(broken).contradiction() == "its size is missing"
