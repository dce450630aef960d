"""Records of older versions in the words of this one."""

import logging
from typing import Annotated

import pytest
from pydantic import Field, field_validator

from rekindle.data.errors import InputError
from rekindle.data.former import FormerDefault, with_defaults, with_recorded_defaults
from rekindle.data.settings import Settings


class Item(Settings):
    name: str
    size: int = 1


class Part(Settings):
    length: Annotated[int | None, FormerDefault(128)] = None
    kept: int = Field(2, alias="keep", lt=10)

    @field_validator("kept")
    @classmethod
    def _allowed(cls, value: int) -> int:
        if value == 7:
            raise InputError("no 7")
        return value


class Whole(Settings):
    place: str
    part: Part = Part()
    items: tuple[Item, ...] = ()
    seed: int = 0


@pytest.mark.parametrize(
    "recorded",
    [
        {"place": "x", "part": {"length": 128}, "items": [{"name": "a"}]},
        {"place": "x", "part": {"length": 128, "keep": 99}, "items": [{"name": "a"}]},
        {"place": "x", "part": {"length": 128, "keep": 7}, "items": [{"name": "a"}]},
        {"place": 3, "part": {"length": 128}, "items": [{"name": "a", "old": 1}]},
        {"part": {"length": 128}, "items": [{"name": "a"}], "other": 2},
    ],
    ids=["good", "refused", "refused by us", "unknown below", "unknown and missing"],
)
def test_younger_keys_have_their_defaults_and_the_rest_stays(recorded):
    part, items = recorded["part"], recorded["items"]
    expected = {"seed": 0} | recorded | {"part": {"keep": 2} | part}
    assert with_defaults(Whole, recorded) == expected | {"items": [{"size": 1} | items[0]]}


def test_a_former_default_goes_on_where_the_key_is_not_given(caplog):
    caplog.set_level(logging.INFO, "rekindle")
    recorded = {"place": "x", "part": {"length": 128, "keep": 4}, "seed": 3}
    begun = with_recorded_defaults(Whole(place="x"), recorded)
    assert begun == Whole(place="x", part=Part(length=128))
    assert "part.length is not given: 128 is used, as when it was begun (now None)" in caplog.text
    for given in (Whole(place="x", part=Part(length=None)), Whole(place="x", part=Part(length=5))):
        assert with_recorded_defaults(given, recorded) is given
    assert with_recorded_defaults(Whole(place="x"), {"part": {"length": 64}}) == Whole(place="x")
