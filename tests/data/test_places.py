"""Places: what is filled in, and what is refused because a folder of that name is not meant."""

import pytest

from rekindle.data.errors import InputError
from rekindle.data.places import expanded


@pytest.mark.parametrize(
    ("given", "place"),
    [
        ("~", "/home/me"),
        ("~/x", "/home/me/x"),
        ("$DATA/x", "/data/x"),
        ("s3://${DATA}b/$DATA", "s3:///datab//data"),
        ("a~/b$.txt", "a~/b$.txt"),
        ("owner/name", "owner/name"),
        ("{first}/cache", "{first}/cache"),
        ("news [$].jsonl", "news [$].jsonl"),
    ],
)
def test_filled_in(monkeypatch, given, place):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("DATA", "/data")
    assert expanded(given) == place
    assert expanded(place) == place


@pytest.mark.parametrize("given", ["$NOWHERE/x", "~no-such-user/x"])
def test_what_is_not_known_is_refused_unless_it_is_there(tmp_path, monkeypatch, given):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NOWHERE", raising=False)
    with pytest.raises(InputError, match=r"NOWHERE.*is not set|'~no-such-user' is no user"):
        expanded(given)
    (tmp_path / given).parent.mkdir()
    (tmp_path / given).touch()
    assert expanded(given) == given


def test_an_empty_variable_is_no_folder(monkeypatch):
    monkeypatch.setenv("SCRATCH", "")
    with pytest.raises(InputError, match=r"SCRATCH .* is empty"):
        expanded("$SCRATCH/cache")
