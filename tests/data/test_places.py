"""Places: what is filled in, and what is refused because a folder of that name is not meant."""

import pytest

from rekindle.data.errors import InputError
from rekindle.data.places import expanded, same_place


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
    with pytest.raises(InputError, match=r"NOWHERE.*is not set|'~no-such-user' is not a user"):
        expanded(given)
    (tmp_path / given).parent.mkdir()
    (tmp_path / given).touch()
    assert expanded(given) == given


def test_a_folder_that_an_older_version_made_of_a_variable_is_gone_on_with(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SCRATCH", "/elsewhere")
    assert expanded("$SCRATCH/run") == "/elsewhere/run"
    (tmp_path / "$SCRATCH/run").mkdir(parents=True)
    assert expanded("$SCRATCH/run") == "$SCRATCH/run"


def test_places_that_are_written_otherwise(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("T", "texts")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    whole = str(tmp_path / "texts/*.txt")
    for other in ("~/texts/*.txt", "texts/*.txt", "./$T/*.txt", "real/../texts/*.txt"):
        assert same_place(whole, other)
        assert same_place([other, 1], [whole, 1])
    assert same_place("~/gone", f"{tmp_path}/gone")
    assert same_place("link", "real")
    assert same_place("link/*.txt", "real/*.txt")
    for one, other in (("a/*.txt", "b/*.txt"), ("gone", "./gone"), ("$U/x", "/x"), ("x", None)):
        assert not same_place(one, other)


def test_an_empty_variable_is_no_folder(monkeypatch):
    monkeypatch.setenv("SCRATCH", "")
    with pytest.raises(InputError, match=r"SCRATCH .* is empty"):
        expanded("$SCRATCH/cache")
