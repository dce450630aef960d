"""What an expert's metrics.json says is read again whole, or refused by its key."""

import json

import pytest

from rekindle.data.errors import InputError
from rekindle.train.answers.recorded import ExpertRecord, read_expert_record
from rekindle.train.finetune.result import WRITER

SOUND = {"written_by": WRITER, "metric": "f1", "pairs": None, "config": {"max_length": 4}}


def write(folder, values):
    (folder / "metrics.json").write_text(json.dumps(values))


def test_what_was_written_is_read(tmp_path):
    write(tmp_path, SOUND)
    found = read_expert_record(tmp_path)
    assert (found.metric, found.pairs, found.settings["max_length"]) == ("f1", None, 4)


@pytest.mark.parametrize("values", [[], {"accuracy": 0.9}, {"written_by": "me", "metric": "f1"}])
def test_a_file_of_somebody_else_says_nothing(tmp_path, values):
    assert read_expert_record(tmp_path) == ExpertRecord()
    write(tmp_path, values)
    assert read_expert_record(tmp_path) == ExpertRecord()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"metric": 3}, "metric must be a name"),
        ({"config": [4]}, "config an object"),
        ({"pairs": "no"}, "pairs is 'no'"),
        ({"config": {"max_lenght": 4}}, "unknown key config.max_lenght; did you mean 'max_length'"),
        ({"config": {"max_length": "four"}}, "max_length: Input should be a valid integer"),
        ({"written_by": "rekindle", "per_seed": []}, "written_by is 'rekindle'"),
    ],
)
def test_what_is_damaged_is_named(tmp_path, change, told):
    """Texts would be cut elsewhere, and labels judged otherwise, without a word."""
    write(tmp_path, SOUND | change)
    with pytest.raises(InputError, match=rf"metrics\.json.* is damaged.*{told}"):
        read_expert_record(tmp_path)


def test_a_file_that_was_cut_short_is_named(tmp_path):
    write(tmp_path, SOUND)
    path = tmp_path / "metrics.json"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(InputError, match=r"metrics\.json, which .*it is not JSON"):
        read_expert_record(tmp_path)
