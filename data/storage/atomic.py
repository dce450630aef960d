"""Write local files and folders so that each appears whole or not at all.

Whatever fails, and whenever the process or the machine stops, a name stands for the old content or
for the new. Unfinished work has a hidden name beside it: ``.NAME.0123abcd.tmp`` for a file,
``.NAME.0123abcd.new`` for a folder. An error removes it. A killed process leaves it, and
``remove_leftovers`` removes it later.
"""

import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

_ATTEMPT = "[0-9a-f]" * 8
_ENDINGS = (".tmp", ".new", ".old")


def new_attempt() -> str:
    """Return eight hexadecimal digits that make a name unique to one attempt."""
    return uuid.uuid4().hex[:8]


Publish = Callable[[Path, Path], None]


@contextmanager
def new_file(path: Path, publish: Publish | None = None) -> Iterator[BinaryIO]:
    """Open a file that becomes ``path`` at the end, replacing what exists.

    ``publish`` gives the temporary file its name in another way.
    """
    temporary = _temporary(path, ".tmp")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        (publish or os.replace)(temporary, path)
        sync(path.parent)
    except OSError as error:
        # None, or a name that would mean nothing to the reader of the message.
        if error.filename is None or str(error.filename) == str(temporary):
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes, publish: Publish | None = None) -> None:
    """Write ``content``; ``publish`` as in ``new_file``."""
    with new_file(path, publish) as file:
        file.write(content)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` in UTF-8."""
    write_bytes(path, text.encode())


def write_json(path: Path, content: object, publish: Publish | None = None) -> None:
    """Write ``content`` as readable JSON; ``publish`` as in ``new_file``."""
    write_bytes(path, f"{json.dumps(content, indent=1)}\n".encode(), publish)


def write_lines(
    path: Path, records: Iterable[Mapping[str, object]], publish: Publish | None = None
) -> None:
    """Write ``records`` as JSON lines; ``publish`` as in ``new_file``."""
    with new_file(path, publish) as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder that becomes ``path`` at the end, replacing what exists."""
    with _staged(path) as staged:
        yield staged
        publish_folder(staged, path)


def publish_folder(staged: Path, path: Path) -> None:
    """Rename the folder ``staged`` to ``path``, replacing what exists.

    If that fails, the old content comes back. A process killed between two renames leaves both
    under their hidden names.
    """
    for entry in sorted(staged.rglob("*")):
        sync(entry)
    sync(staged)
    replaced = _temporary(path, ".old")
    if path.exists():
        os.rename(path, replaced)
    try:
        os.rename(staged, path)
    except BaseException:
        if replaced.exists():
            os.rename(replaced, path)
        raise
    sync(path.parent)
    remove(replaced)


@contextmanager
def new_files(folder: Path) -> Iterator[Path]:
    """Yield an empty folder whose files move into ``folder`` at the end, each of them whole."""
    with _staged(folder / "files") as staged:
        yield staged
        files = sorted(path for path in staged.rglob("*") if path.is_file())
        for file in files:
            sync(file)
        for file in files:
            target = folder / file.relative_to(staged)
            target.parent.mkdir(exist_ok=True)
            os.replace(file, target)
        sync(folder)


@contextmanager
def _staged(path: Path) -> Iterator[Path]:
    staged = _temporary(path, ".new")
    staged.mkdir()
    try:
        yield staged
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _temporary(path: Path, ending: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.parent / f".{path.name}.{new_attempt()}{ending}"


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_temporary(name: str) -> bool:
    """Return whether ``name`` is a name of unfinished work."""
    return name.startswith(".") and name.endswith(_ENDINGS)


def remove_leftovers(folder: Path, name: str = "*") -> None:
    """Remove what killed processes left in ``folder`` while writing ``name`` (or anything).

    Only for a process that works there alone: another one may be about to publish its work.
    """
    for ending in _ENDINGS:
        for leftover in folder.glob(f".{name}.{_ATTEMPT}{ending}"):
            remove(leftover)


def remove(path: Path) -> None:
    """Remove a file, or a folder with all its content, as far as possible. Of a link, remove only
    the link: its target is not ours.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()
