"""A disk that will not last is told of once, before it is full."""

import logging
import shutil
from types import SimpleNamespace

import pytest

from rekindle.train.record.disk_room import DiskRoom, folder_size, free_bytes_near


@pytest.fixture
def free(monkeypatch):
    """free(bytes): so many are free on every disk."""

    def of(size):
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=size))

    return of


def test_the_nearest_folder_that_is_there(tmp_path, free):
    free(7)
    (tmp_path / "file").touch()
    assert free_bytes_near(tmp_path / "a" / "b") == (tmp_path, 7)
    assert free_bytes_near(tmp_path / "file") == (tmp_path, 7)


def test_what_takes_the_place_of_an_older_one_needs_room_for_one(tmp_path, free, caplog):
    caplog.set_level(logging.WARNING, "rekindle")
    room = DiskRoom(tmp_path, "checkpoint")
    free(1000)
    room.after(1000)
    assert not caplog.messages
    free(999)
    room.after(1000)
    room.after(1000)
    (told,) = caplog.messages
    assert f"{tmp_path}: 999 bytes are free" in told
    assert "the last checkpoint took 1.0 kB: there is no room for another one" in told


def test_what_stays_needs_room_for_all_that_are_to_come(tmp_path, free, caplog):
    caplog.set_level(logging.WARNING, "rekindle")
    free(2500)
    room = DiskRoom(tmp_path, "unit", remaining=4)
    room.after(800)  # three to come
    assert not caplog.messages
    room.after(1300)  # two
    (told,) = caplog.messages
    assert "no room for more than 1 of the 2 to come" in told
    last = DiskRoom(tmp_path, "unit", remaining=1)
    last.after(10**9)
    DiskRoom(None, "unit", remaining=5).after(10**9)
    assert len(caplog.messages) == 1


def test_the_size_of_a_folder_is_that_of_all_files_in_it(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").write_bytes(b"12345")
    (tmp_path / "c").write_bytes(b"678")
    assert folder_size(tmp_path) == 8
    assert folder_size(tmp_path / "none") == 0
