"""Files and folders that are there whole or not at all, whatever fails on the way."""

import os
import shutil
from pathlib import Path

import pytest

from rekindle.data.storage import atomic
from rekindle.data.storage.atomic import (
    new_file,
    new_files,
    new_folder,
    publish_folder,
    remove_leftovers,
    write_bytes,
    write_json,
    write_lines,
    write_text,
)

OLD, NEW = b"what was there" * 50, b"what comes now" * 70


def tree(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder, hidden names included; None for a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


# --- the system calls -----------------------------------------------------------------------------


class Calls:
    """Records what touches the disk, in its order, and lets the ``failing``-th of them fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, failing: int = 0):
        self.names: list[str] = []
        self.failing = failing
        for name in ("rename", "replace", "link", "fsync"):
            monkeypatch.setattr(os, name, self._counted(name, getattr(os, name)))
        monkeypatch.setattr(atomic, "open", self._open, raising=False)

    def _counted(self, name: str, call):
        def counted(*arguments):
            kind = name
            if name == "fsync" and Path(f"/proc/self/fd/{arguments[0]}").resolve().is_dir():
                kind = "fsync folder"
            self._note(kind)
            return call(*arguments)

        return counted

    def _note(self, name: str) -> None:
        self.names.append(name)
        if len(self.names) == self.failing:
            raise OSError(28, f"no room to {name}")

    def _open(self, path, mode):
        self._note("open")
        file = open(path, mode)  # noqa: SIM115
        write = file.write

        class Written:
            def write(_, content):
                write(content[: len(content) // 2])
                file.flush()
                self._note("write")
                return write(content[len(content) // 2 :])

            def __getattr__(_, name):
                return getattr(file, name)

            def __enter__(_):
                return _

            def __exit__(_, *error):
                file.close()

        return Written()


FILE_CALLS = ["open", "write", "fsync", "replace", "fsync folder"]
FOLDER_CALLS = ["fsync", "fsync folder", "rename", "rename", "fsync folder"]


def write_folder(path: Path) -> None:
    with new_folder(path) as staged:
        (staged / "content").write_bytes(NEW)


def write_files(folder: Path) -> None:
    with new_files(folder) as staged:
        for name in ("a", "b"):
            (staged / name).write_bytes(NEW)
        (staged / "scratch").mkdir()


def test_what_is_written_reaches_the_disk_before_its_name(tmp_path, monkeypatch):
    calls = Calls(monkeypatch)
    write_bytes(tmp_path / "file", NEW)
    assert calls.names == FILE_CALLS
    assert tree(tmp_path) == {"file": NEW}


def test_a_folder_reaches_the_disk_before_its_name(tmp_path, monkeypatch):
    calls = Calls(monkeypatch)
    with new_folder(tmp_path / "folder") as staged:
        (staged / "inner").mkdir()
        (staged / "inner" / "content").write_bytes(NEW)
    inner, outer = "fsync folder", "fsync folder"
    assert calls.names == [inner, "fsync", outer, "rename", "fsync folder"]
    calls.names.clear()
    write_folder(tmp_path / "folder")
    assert calls.names == FOLDER_CALLS
    assert tree(tmp_path) == {"folder": None, "folder/content": NEW}


@pytest.mark.parametrize("number", range(1, len(FILE_CALLS) + 1))
@pytest.mark.parametrize("before", [None, OLD])
def test_whatever_call_fails_a_file_is_the_old_one_or_the_new(
    tmp_path, monkeypatch, number, before
):
    path = tmp_path / "file"
    if before is not None:
        path.write_bytes(before)
    with monkeypatch.context() as patched:
        Calls(patched, number)
        with pytest.raises(OSError, match="no room to"):
            write_bytes(path, NEW)
    placed = number == len(FILE_CALLS)  # all but the last sync of the name
    content = NEW if placed else before
    assert tree(tmp_path) == ({} if content is None else {"file": content})


@pytest.mark.parametrize("number", range(1, len(FOLDER_CALLS) + 1))
def test_whatever_call_fails_a_folder_is_the_old_one_or_the_new(tmp_path, monkeypatch, number):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "content").write_bytes(OLD)
    with monkeypatch.context() as patched:
        Calls(patched, number)
        with pytest.raises(OSError, match="no room to"):
            write_folder(tmp_path / "folder")
    found = tree(tmp_path)
    kept = {name: content for name, content in found.items() if not name.startswith(".")}
    placed = number == len(FOLDER_CALLS)
    assert kept == {"folder": None, "folder/content": NEW if placed else OLD}
    assert placed or kept == found


@pytest.mark.parametrize("number", range(1, 6))
def test_whatever_call_fails_each_of_several_files_is_whole(tmp_path, monkeypatch, number):
    (tmp_path / "a").write_bytes(OLD)
    with monkeypatch.context() as patched:
        Calls(patched, number)
        with pytest.raises(OSError, match="no room to"):
            write_files(tmp_path)
    found = tree(tmp_path)
    assert set(found) <= {"a", "b"}
    assert found["a"] in (OLD, NEW)
    assert found.get("b") in (None, NEW)


def test_several_files_are_on_the_disk_before_the_first_has_its_name(tmp_path, monkeypatch):
    calls = Calls(monkeypatch)
    write_files(tmp_path)
    assert calls.names == ["fsync", "fsync", "replace", "replace", "fsync folder"]
    assert tree(tmp_path) == {"a": NEW, "b": NEW}


# --- what callers see -----------------------------------------------------------------------------


def test_an_exception_of_the_writer_leaves_nothing(tmp_path):
    (tmp_path / "file").write_bytes(OLD)
    for writing, path in ((new_file, "file"), (new_folder, "file"), (new_files, "")):
        with pytest.raises(KeyboardInterrupt), writing(tmp_path / path):
            raise KeyboardInterrupt
    assert tree(tmp_path) == {"file": OLD}


def test_a_link_takes_a_free_name_alone(tmp_path, monkeypatch):
    calls = Calls(monkeypatch)
    write_bytes(tmp_path / "file", OLD, publish=os.link)
    assert calls.names == ["open", "write", "fsync", "link", "fsync folder"]
    with pytest.raises(FileExistsError):
        write_bytes(tmp_path / "file", NEW, publish=os.link)
    assert tree(tmp_path) == {"file": OLD}


def test_an_error_names_the_file_and_not_its_temporary_name(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError) as raised:
        write_text(tmp_path / "folder", "x")
    assert raised.value.filename == str(tmp_path / "folder")
    assert tree(tmp_path) == {"folder": None}


def test_texts_and_records(tmp_path):
    write_text(tmp_path / "deep" / "er" / "text", "ä\n")
    assert (tmp_path / "deep/er/text").read_bytes() == "ä\n".encode()
    write_json(tmp_path / "json", {"a": [1]})
    assert (tmp_path / "json").read_text() == '{\n "a": [\n  1\n ]\n}\n'
    write_lines(tmp_path / "lines", ({"a": "ä", "n": n} for n in range(2)))
    lines = '{"a": "ä", "n": 0}\n{"a": "ä", "n": 1}\n'
    assert (tmp_path / "lines").read_bytes() == lines.encode()


def test_a_made_folder_takes_its_name(tmp_path):
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "content").write_bytes(NEW)
    publish_folder(tmp_path / "made", tmp_path / "there" / "folder")
    assert tree(tmp_path) == {"there": None, "there/folder": None, "there/folder/content": NEW}


def test_what_killed_processes_left_is_removed_and_nothing_else(tmp_path, monkeypatch):
    with monkeypatch.context() as patched:  # neither removes anything, like a killed process
        patched.setattr(Path, "unlink", lambda *_, **__: None)
        patched.setattr(shutil, "rmtree", lambda *_, **__: None)
        for writing in (new_file, new_folder):
            for name in ("one", "other"):
                with pytest.raises(KeyboardInterrupt), writing(tmp_path / name):
                    raise KeyboardInterrupt
    kept = [".hidden", ".one.tmp", ".x.12345678.txt", "one.12345678.tmp"]
    for name in kept:
        (tmp_path / name).write_bytes(OLD)
    assert len(tree(tmp_path)) == 4 + len(kept)
    remove_leftovers(tmp_path, "one")
    assert len(tree(tmp_path)) == 2 + len(kept)
    remove_leftovers(tmp_path)
    assert sorted(tree(tmp_path)) == kept
