"""Open text files as streams of bytes, unpacked; the first bytes tell the compression, not the
name. Other kinds of files are refused by what they are.
"""

import io
import logging
import os
import re
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa

from rekindle.data.errors import InputError
from rekindle.data.storage.addresses import open_binary, state_of_object
from rekindle.data.storage.client import is_remote

log = logging.getLogger("rekindle")

STDIN = "-"  # standard input, in place of a path
PACKED_SUFFIXES = (".gz", ".zst", ".bz2")
FileState = tuple[int | str, ...] | None
_LFS_POINTER = b"version https://git-lfs"
_HEAD_BYTES = 4096  # the first bytes, in which text has no NUL
_COMPRESSIONS = {  # unpacked while reading
    "gzip": re.compile(rb"\x1f\x8b\x08"),
    "zstd": re.compile(rb"\x28\xb5\x2f\xfd"),
    "bz2": re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)"),
}
_SUFFIX_OF = {"gzip": ".gz", "zstd": ".zst", "bz2": ".bz2"}
_OTHER_FORMATS = {  # refused, with advice
    b"\xfd7zXZ\x00": "is packed with xz, which is not read here; unpack it (xz -d)",
    b"PK\x03\x04": "is a zip archive; unpack it (unzip)",
    b"7z\xbc\xaf\x27\x1c": "is a 7z archive; unpack it",
    b"\x04\x22\x4d\x18": "is packed with lz4, which is not read here; unpack it (lz4 -d)",
    b"PAR1": "is a parquet file; name it .parquet",
    b"ARROW1": "is an Arrow file; name it .arrow",
    b"\xff\xfe": "is UTF-16; convert it to UTF-8 (iconv -f UTF-16 -t UTF-8)",
    b"\xfe\xff": "is UTF-16; convert it to UTF-8 (iconv -f UTF-16 -t UTF-8)",
}


def state_of(path: str | Path) -> FileState:
    """Return a file's state, to tell it from earlier or later contents; None if there is
    no file.
    """
    if is_remote(path):
        return state_of_object(str(path))
    try:
        stat = os.stat(path)
    except OSError:
        return None
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def is_file(path: str) -> bool:
    """Return whether there is a file of that path, or an object of that address."""
    return state_of(path) is not None if is_remote(path) else os.path.isfile(path)


def refuse_pointer(path: str | Path) -> None:
    """Raise InputError if a file is a git-lfs pointer."""
    with open_binary(str(path)) as file:
        _refuse_pointer(path, file.read(len(_LFS_POINTER)))


def _refuse_pointer(path: str | Path, start: bytes) -> None:
    if start.startswith(_LFS_POINTER):
        raise InputError(
            f"{path} is a git-lfs pointer, not the file itself: the repository was cloned without "
            f"its large files. Run `git lfs pull` in {Path(path).parent}"
        )


def surrogate_problem(subject: str, text: str) -> str | None:
    """Return what is wrong with ``subject`` if it has half of a surrogate pair, as JSON may write:
    it can be neither tokenized nor written.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return (
            f"character {error.start + 1} of the {subject} is half of a surrogate pair, which is "
            f"not a Unicode character; repair the {subject} where it was made"
        )
    return None


def compression_of(path: str) -> str | None:
    """Return a file's compression: gzip, zstd, bz2, or None."""
    with open_binary(path) as file:
        return _compression(file.read(16))


def _compression(head: bytes) -> str | None:
    return next((name for name, magic in _COMPRESSIONS.items() if magic.match(head)), None)


def open_text(path: str) -> BinaryIO:
    """Return the bytes of a text file, unpacked; standard input for ``STDIN``. A pipe is read once.

    Raises InputError for what is not text, OSError for what cannot be read.
    """
    raw = os.fdopen(os.dup(0), "rb") if path == STDIN else open_binary(path)
    try:
        head = raw.peek(_HEAD_BYTES)[:_HEAD_BYTES]
        _refuse_pointer(path, head)
        compression = _compression(head)
        if compression is None:
            _refuse_other_formats(path, head)
            return raw
        if path != STDIN and not path.lower().endswith(_SUFFIX_OF[compression]):
            log.info("%s is packed with %s, although its name does not say so", path, compression)
        stream = io.BufferedReader(pa.input_stream(raw, compression=compression))
        _refuse_other_formats(path, stream.peek(_HEAD_BYTES)[:_HEAD_BYTES])
        return stream
    except BaseException:
        raw.close()
        raise


def _refuse_other_formats(path: str, head: bytes) -> None:
    for magic, advice in _OTHER_FORMATS.items():
        if head.startswith(magic):
            raise InputError(f"{path} {advice}")
    if any(magic.match(head) for magic in _COMPRESSIONS.values()):
        raise InputError(f"{path} is packed twice; unpack it once")
    if b"\0" in head:
        raise InputError(
            f"{path} has a NUL byte at byte {head.index(0) + 1}: it is not UTF-8 text, but "
            "binary, UTF-16, or a file whose disk was full; convert or replace it"
        )
