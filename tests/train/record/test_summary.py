"""summary.json is read whole, or refused by its key."""

import json

import pytest

from rekindle.data.errors import CheckpointError
from rekindle.train.record.summary import read_summary

SOUND = {"steps": 2, "seconds": 0.5, "evaluation": {"loss": 1.5}, "coverage": {"positions": 3}}


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"steps": -1}, "steps"),
        ({"seconds": "0.5"}, None),
        ({"seconds": "long"}, "seconds"),
        ({"evaluation": {"kl/lm": [1.5]}}, "evaluation"),
        ({"evaluation": {"kl/lm": float("nan")}}, None),
        ({"coverage": [3]}, "coverage"),
        ({"best": 2}, "best"),
    ],
)
def test_a_value_of_another_type_is_named(tmp_path, change, key):
    path = tmp_path / "summary.json"
    assert read_summary(tmp_path) == {}
    path.write_text(json.dumps(SOUND | change))
    if key is None:
        assert read_summary(tmp_path).keys() == SOUND.keys()
        return
    with pytest.raises(CheckpointError, match=rf"summary\.json is damaged \({key}: .*leave it out"):
        read_summary(tmp_path, "leave it out")
