"""Single objects by address: files in a store that others have put there."""

import glob
import hashlib
import io
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rekindle.data.errors import InputError
from rekindle.data.storage.client import Client, client_of, is_remote, refuse_credentials, tag_of

if TYPE_CHECKING:
    from rekindle.data.storage.client import FileSystem

BLOCK = 4 << 20  # bytes that a reader requests at a time
REQUESTS = 32  # at the same time

Info = dict[str, Any]


def _client(place: str) -> tuple[Client, str]:
    """Return the client for an address, and the object's path there."""
    refuse_credentials(place)
    kind, _, rest = place.partition("://")
    client = client_of(f"{kind}://{rest.partition('/')[0]}")
    return client, str(client.fs._strip_protocol(place))


def find_objects(place: str) -> list[str]:
    """Return the sorted addresses of the objects that ``place`` is, or matches as a glob; with a
    final slash, of those directly below. Empty if there are none.

    Raise InputError if the bucket is missing or cannot be reached.
    """
    client, path = _client(place)
    fs = client.fs

    def ask() -> list[str]:
        fs.invalidate_cache()
        if place.endswith("/"):
            entries = {entry["name"]: entry for entry in fs.ls(path, detail=True)}
        elif _is_file(fs, path):
            return [path]
        elif glob.has_magic(path):
            entries = fs.glob(path, detail=True)
        else:
            return []
        # Consoles make "folders" as empty objects whose names end in a slash.
        return sorted(n for n, e in entries.items() if e["type"] == "file" and n[-1:] != "/")

    try:
        found = client.asked(place, ask, FileNotFoundError)
    except FileNotFoundError:
        found = []
    if not found and (bucket := client.bucket_missing):
        raise InputError(
            f"there is no bucket {bucket!r} for {place} (or these credentials may not see it); "
            "correct the address"
        )
    # The client of memory:// has a slash before each path.
    return [str(fs.unstrip_protocol(path)).replace(":///", "://") for path in found]


def _is_file(fs: "FileSystem", path: str) -> bool:
    """Like ``fs.isfile``, but an unreachable server does not count as a missing object."""
    with suppress(FileNotFoundError):
        return bool(fs.info(path)["type"] == "file")
    return False


def states_of_objects(places: Sequence[str]) -> dict[str, tuple[int, str]]:
    """Return bytes and tag (checksum or time) of objects, with one listing per folder.

    Raise FileNotFoundError if one is missing.
    """
    folders: defaultdict[str, list[str]] = defaultdict(list)
    for place in places:
        folders[place.rpartition("/")[0]].append(place)
    with ThreadPoolExecutor(REQUESTS) as pool:
        found = list(pool.map(_states_in, folders, folders.values()))
    return {place: state for states in found for place, state in states.items()}


def states_below(place: str) -> dict[str, tuple[int, str]]:
    """Return bytes and tag of every object below a folder, by its name there; empty if none."""
    client, path = _client(place)

    def ask() -> dict[str, Info]:
        client.fs.invalidate_cache()
        found: dict[str, Info] = client.fs.find(path, detail=True)
        return found

    try:
        found = client.asked(place, ask, FileNotFoundError)
    except FileNotFoundError:
        return {}
    start = f"{path.rstrip('/')}/"
    return {
        name.removeprefix(start): (int(info["size"]), tag_of(info))
        for name, info in found.items()
        if name.startswith(start) and name[-1] != "/"
    }


def _states_in(folder: str, places: Sequence[str]) -> dict[str, tuple[int, str]]:
    client, path = _client(folder)
    listed: dict[str, Info] = {}
    if len(places) > 1:
        ask = partial(client.fs.ls, path, detail=True, refresh=True)
        listed = {entry["name"]: entry for entry in client.asked(folder, ask, FileNotFoundError)}
    found = {}
    for place in places:
        inside = str(client.fs._strip_protocol(place))
        info = listed.get(inside) or client.info(place, inside)
        found[place] = int(info["size"]), tag_of(info)
    return found


def state_of_object(place: str) -> tuple[int, str] | None:
    """Return bytes and tag of an object; None if there is none."""
    try:
        return states_of_objects([place])[place]
    except FileNotFoundError:
        return None


def fetch_object(place: str, size: int, into: Path) -> None:
    """Write an object of ``size`` bytes into a new file."""
    client, path = _client(place)
    with open(into, "xb") as file:
        client.fetch(place, path, size, file)


def open_binary(place: str) -> io.BufferedReader:
    """Open a local file, or an object read block by block. Raise OSError if it does not exist."""
    if not is_remote(place):
        return open(place, "rb")
    return io.BufferedReader(_Object(place), BLOCK)


def sha256_of(place: str | Path) -> str:
    """Return the sha256 of a local file's or an object's content, in hexadecimal digits."""
    with open_binary(str(place)) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class _Object(io.RawIOBase):
    """An object as a file; each read is a request that is retried after server faults."""

    def __init__(self, place: str):
        self._place = place
        self._client, self._path = _client(place)
        self._size = int(self._client.info(place, self._path)["size"])
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = start + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any, /) -> int:
        end = min(self._at + len(buffer), self._size)
        content = self._client.read(self._place, self._path, self._at, end)
        buffer[: len(content)] = content
        self._at += len(content)
        return len(content)
