"""One opener of output folders: new, one to go on with, or refused; one process at a time."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from rekindle.data.errors import CheckpointError, InputError
from rekindle.train.record.run_folder import (
    LOCK_FILE,
    check_same_settings,
    is_continued,
    locked_folder,
    open_folder,
    reading_record,
)

HOLDER = """
import sys, pathlib
from rekindle.train.record.run_folder import locked_folder
with locked_folder(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def holder(tmp_path):
    """Another process that works in ``tmp_path``."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


# --- what is in the folder ------------------------------------------------------------------------


def test_a_folder_is_new_or_gone_on_with_or_refused(tmp_path):
    def found(name, resume):
        return is_continued(tmp_path / name, "run.json", "run", resume)

    (tmp_path / "empty").mkdir()
    (tmp_path / "killed").mkdir()
    for name in (LOCK_FILE, ".run.json.tmp", ".run.json.01234567.tmp", ".x.01234567.new"):
        (tmp_path / "killed" / name).touch()
    for name in ("absent", "empty", "killed"):
        for resume in (False, True):
            assert found(name, resume) is False
    assert not (tmp_path / "absent").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "run.json").touch()
    assert found("mine", resume=True) is True
    with pytest.raises(InputError, match="or --resume to continue the run in it"):
        found("mine", resume=False)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    for resume in (False, True):
        for name in ("other", "other/file"):
            with pytest.raises(InputError, match="is not empty and holds no run; give another"):
                found(name, resume)


def test_a_setting_that_there_is_no_more_asks_for_the_version_that_had_it():
    before = {"many": [{"x": 1, "old": 0}, {"x": 2, "old": None}]}
    now = {"many": [{"x": 1, "old": 0}, {"x": 2}]}
    check_same_settings(Path("here"), before, now, "Do so")
    before["many"][1]["old"] = 5
    with pytest.raises(
        CheckpointError, match=r"older version.*\(many\.1\.old: 5 there, none here\)"
    ):
        check_same_settings(Path("here"), before, now, "Do so")


@pytest.mark.parametrize(
    ("now", "words"),
    [
        ({"a": 2}, "a: 1 there, 2 here"),
        ({"b": {"c": [1, 2], "d": 1}}, r"b\.d: None there, 1 here"),
        ({"b": {"c": None}}, r"b\.c: \[1, 2\] there, None here"),
        ({"b": {"c": (1, 3)}}, r"b\.c: \[1, 2\] there, \[1, 3\] here"),
        ({"many": [{"x": 1}, {"x": 3}]}, r"many\.1\.x: 2 there, 3 here"),
        ({"many": [{"x": 1}]}, r"many: \[.*\] there, \[.*\] here"),
        ({"free": {"other": 1}}, r"free\.other: None there, 1 here"),
    ],
)
def test_the_key_that_differs_is_named(now, words):
    before = {"a": 1, "b": {"c": [1, 2]}, "many": [{"x": 1}, {"x": 2}], "free": {"key": 1}}
    with pytest.raises(CheckpointError, match=rf"here was begun.*\({words}\)\. Do so"):
        check_same_settings(Path("here"), before, before | now, "Do so", free=("free.key",))


def test_what_is_free_may_differ_and_tuples_are_lists():
    before = {"a": [1, 2], "free": {"key": 1}, "key": {"key": 3}}
    check_same_settings(
        Path("here"), before, before | {"a": (1, 2), "free": {"key": 2}}, "", ("free.key",)
    )
    with pytest.raises(CheckpointError, match=r"key\.key"):
        check_same_settings(
            Path("here"), before, before | {"key": {"key": 4}}, "", ("free.key", "key2")
        )


@pytest.mark.parametrize("error", [OSError("x"), ValueError("x"), KeyError("x"), TypeError("x")])
def test_a_damaged_record_is_named(error):
    words = r"run\.json is damaged \(.*\); do so"
    with pytest.raises(CheckpointError, match=words), reading_record(Path("run.json"), "do so"):
        raise error


# --- one process at a time ------------------------------------------------------------------------


def test_the_folder_is_looked_at_before_anything_is_written_and_again_alone(tmp_path):
    out = tmp_path / "out"
    seen = []

    def look():
        seen.append(names(out) if out.exists() else None)
        return len(seen)

    with open_folder(out, look) as found:
        (out / ".x.01234567.tmp").touch()
    assert (seen, found) == ([None, [LOCK_FILE]], 2)
    with open_folder(out, lambda: None):
        assert names(out) == [LOCK_FILE]  # what a killed process left is gone
    assert names(out) == []

    def refuse():
        raise InputError("no")

    with pytest.raises(InputError, match="no"), open_folder(tmp_path / "other", refuse):
        pass
    assert not (tmp_path / "other").exists()


def test_a_second_process_is_refused_and_told_who_works_there(tmp_path, holder):
    (tmp_path / ".x.01234567.tmp").touch()
    before = names(tmp_path)
    with (
        pytest.raises(InputError, match=rf"another process works on .*process {holder.pid} on "),
        open_folder(tmp_path, lambda: None),
    ):
        pass
    assert names(tmp_path) == before


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, None])
def test_the_lock_ends_with_the_process(tmp_path, holder, number):
    if number is None:
        holder.stdin.close()
    else:
        holder.send_signal(number)
    holder.wait()
    assert names(tmp_path) == ([] if number is None else [LOCK_FILE])
    with locked_folder(tmp_path) as held:
        assert held
        assert (tmp_path / LOCK_FILE).read_text().startswith(f"process {os.getpid()} on ")
    assert names(tmp_path) == []


def test_who_waits_comes_next_although_the_file_was_removed(tmp_path, holder):
    code = HOLDER.replace("sys.argv[1])", "sys.argv[1]), wait=True")
    command = [sys.executable, "-c", code, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as waiting:
        holder.stdin.close()
        assert waiting.stdout.readline() == "held\n"
        with pytest.raises(InputError, match=f"process {waiting.pid} on "), locked_folder(tmp_path):
            pass
        waiting.stdin.close()
    assert names(tmp_path) == []


def test_a_file_system_without_locks_is_worked_on_all_the_same(tmp_path, monkeypatch, caplog):
    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    with locked_folder(tmp_path) as held, locked_folder(tmp_path) as other:
        assert (held, other) == (False, False)
    assert names(tmp_path) == []
    assert "cannot be locked (No locks available)" in caplog.text


def test_folders_within_a_folder_are_held_apart(tmp_path):
    with locked_folder(tmp_path), locked_folder(tmp_path / "student") as held:
        assert held


def test_what_the_caller_knows_may_lie_beside_a_new_run(tmp_path):
    (tmp_path / "made").mkdir()
    assert not is_continued(tmp_path, "run.json", "run", resume=True, other_files=("made",))
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="holds no run"):
        is_continued(tmp_path, "run.json", "run", resume=True, other_files=("made",))
