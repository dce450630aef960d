"""Local copies of objects: one bounded folder for all processes of a node, whoever is killed."""

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from rekindle.data.errors import InputError
from rekindle.data.storage.copies import (
    FOLDER_VARIABLE,
    GIGABYTES_VARIABLE,
    Copies,
    copies,
    copy_key,
)

SIZE = 1000
KEYS = [copy_key("object", number) for number in range(20)]


@pytest.fixture
def few(tmp_path, monkeypatch) -> Copies:
    """Room for three copies."""
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "copies"))
    monkeypatch.setenv(GIGABYTES_VARIABLE, str(3.5 * SIZE / 1e9))
    return copies()


def fill(folder: Path) -> None:
    (folder / "a").write_bytes(b"x" * SIZE)


def fill_b(folder: Path) -> None:
    (folder / "b").write_bytes(b"y" * 3 * SIZE)


def refuse(folder: Path) -> None:
    raise AssertionError("it is there")


def there(few: Copies) -> set[str]:
    return {path.name for path in few.root.iterdir() if path.is_dir()}


def test_a_copy_is_fetched_once_and_the_least_recently_used_goes_first(few):
    for key in KEYS[:3]:
        with few.using(key, SIZE, fill) as folder:
            assert folder is not None
            assert (folder / "a").read_bytes() == b"x" * SIZE
    os.utime(few.root / KEYS[1], (1, 1))
    os.utime(few.root / KEYS[2], (2, 2))
    os.utime(few.root / KEYS[0], (3, 3))
    with few.using(KEYS[1], SIZE, refuse):
        pass  # it is the youngest now
    with few.using(KEYS[3], SIZE, fill):
        assert there(few) == {KEYS[0], KEYS[1], KEYS[3]}


def test_what_is_in_use_stays_and_then_there_is_no_room(few):
    for key in KEYS[:3]:
        assert few.take(key, SIZE, fill) is not None
    assert few.take(KEYS[3], SIZE, refuse) is None
    assert "running processes use" in few.problem
    assert there(few) == {*KEYS[:3]}
    few.take(KEYS[0], SIZE, refuse)
    few.release(KEYS[0])
    assert few.take(KEYS[3], SIZE, refuse) is None  # it is used once more than it was let go of
    few.release(KEYS[0])
    assert few.take(KEYS[3], SIZE, fill) is not None
    assert there(few) == {*KEYS[1:4]}


def test_an_owner_that_goes_lets_its_copy_go(few):
    class Owner:
        pass

    owners = [Owner() for _ in range(3)]
    for owner, key in zip(owners, KEYS, strict=False):
        few.take(key, SIZE, fill)
        few.release_with(owner, key)
    assert few.take(KEYS[3], SIZE, refuse) is None
    del owner
    owners.pop()
    assert few.take(KEYS[3], SIZE, fill) is not None


def test_what_else_is_in_the_folder_stays(few):
    """Somebody may name a folder that has other things in it."""
    for name in ("mine", ".mine.part", "0" * 31):
        (few.root / name).mkdir(parents=True)
        (few.root / name / "a").write_bytes(b"x" * 10 * SIZE)
    for key in KEYS[:6]:
        with few.using(key, SIZE, fill) as folder:
            assert folder is not None
    assert there(few) > {"mine", ".mine.part", "0" * 31}
    assert (few.root / "mine" / "a").stat().st_size == 10 * SIZE


def test_larger_than_all_room_removes_nothing(few):
    few.take(KEYS[0], SIZE, fill)
    few.release(KEYS[0])
    assert few.take(KEYS[1], 4 * SIZE, refuse) is None
    assert there(few) == {KEYS[0]}


def test_an_error_leaves_nothing_and_is_the_callers(few):
    def fail(folder: Path) -> None:
        fill(folder)
        raise InputError("away")

    with pytest.raises(InputError, match="away"):
        few.take(KEYS[0], SIZE, fail)
    assert there(few) == set()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_disk_that_takes_nothing_means_no_copy(few, number):
    def full(folder: Path) -> None:
        fill(folder)
        raise OSError(number, os.strerror(number))

    assert few.take(KEYS[0], SIZE, full) is None
    assert os.strerror(number) in few.problem
    assert there(few) == set()


def test_a_full_disk_means_no_copy(few):
    """One of the system's own, whose every write fails."""

    def on_a_full_disk(folder: Path) -> None:
        (folder / "a").symlink_to("/dev/full")
        (folder / "a").write_bytes(b"x" * SIZE)

    assert few.take(KEYS[0], SIZE, on_a_full_disk) is None
    assert "No space left on device" in few.problem
    assert there(few) == set()


def test_a_folder_that_cannot_be_made_means_no_copy(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "file" / "copies"))
    assert copies().take(KEYS[0], SIZE, refuse) is None
    assert "Not a directory" in copies().problem


def test_a_folder_of_another_user_is_refused(few, monkeypatch):
    few.root.mkdir()
    monkeypatch.setattr(os, "getuid", lambda: few.root.stat().st_uid + 1)
    with pytest.raises(InputError, match="belongs to another user"):
        few.take(KEYS[0], SIZE, refuse)


def test_a_bound_that_is_no_number_is_refused(few, monkeypatch):
    monkeypatch.setenv(GIGABYTES_VARIABLE, "lots")
    with pytest.raises(InputError, match="REKINDLE_COPIES_GB=lots"):
        few.take(KEYS[0], SIZE, refuse)


def test_threads_fetch_a_copy_once(few):
    fetched = list[Path]()

    def slow(folder: Path) -> None:
        fetched.append(folder)
        time.sleep(0.05)
        fill(folder)

    threads = [threading.Thread(target=few.take, args=(KEYS[0], SIZE, slow)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(fetched) == 1


def test_a_fork_neither_holds_nor_lets_go_of_what_its_parent_does(few):
    class Owner:
        pass

    owner = Owner()
    for key in KEYS[:3]:
        few.take(key, SIZE, fill)
    few.release_with(owner, KEYS[0])
    child = os.fork()
    if not child:
        sound = few.take(KEYS[3], SIZE, refuse) is None
        del owner
        few.take(KEYS[0], SIZE, refuse)
        few.release(KEYS[0])
        os._exit(0 if sound and few.take(KEYS[3], SIZE, refuse) is None else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert few.take(KEYS[3], SIZE, refuse) is None


OTHER = """
import sys, time
from pathlib import Path
from rekindle.data.storage.copies import copies, copy_key
wanted = sys.argv[1]
def fetch(folder: Path) -> None:
    (folder / "a").write_bytes(b"x" * 500)
    print("fetching", flush=True)
    if wanted == "fetching":
        time.sleep(60)
    (folder / "a").write_bytes(b"x" * 1000)
for number in range(3):
    copies().take(copy_key("object", number), 1000, fetch)
print("taken", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("wanted", ["fetching", "taken"])
def test_another_process_is_respected_until_it_is_killed(few, wanted):
    other = subprocess.Popen(
        [sys.executable, "-c", OTHER, wanted], stdout=subprocess.PIPE, text=True
    )
    assert other.stdout is not None
    try:
        while other.stdout.readline() != f"{wanted}\n":
            assert other.poll() is None
        if wanted == "taken":
            assert few.take(KEYS[3], SIZE, refuse) is None  # all three are in use
            assert few.take(KEYS[2], SIZE, refuse) is not None  # and may be used by us, too
            few.release(KEYS[2])
        else:
            (part,) = there(few)
            assert few.take(KEYS[3], 3 * SIZE, refuse) is None  # its room is set aside
            assert there(few) == {part}
    finally:
        other.send_signal(signal.SIGKILL)
        other.wait()
    assert few.take(KEYS[3], 3 * SIZE, fill_b)
    assert there(few) == {KEYS[3]}
    assert (few.root / KEYS[3] / "b").stat().st_size == 3 * SIZE
