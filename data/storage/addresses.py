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

BLOCK_BYTES = 4 << 20  # bytes that a reader requests at a time
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

    def list_objects() -> list[str]:
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
        paths = client.request(place, list_objects, FileNotFoundError)
    except FileNotFoundError:
        paths = []
    if not paths and (bucket := client.bucket_missing):
        raise InputError(
            f"there is no bucket {bucket!r} for {place} (or these credentials may not see it); "
            "correct the address"
        )
    # The client of memory:// has a slash before each path.
    return [str(fs.unstrip_protocol(path)).replace(":///", "://") for path in paths]


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

    def list_below() -> dict[str, Info]:
        client.fs.invalidate_cache()
        infos: dict[str, Info] = client.fs.find(path, detail=True)
        return infos

    try:
        infos = client.request(place, list_below, FileNotFoundError)
    except FileNotFoundError:
        return {}
    start = f"{path.rstrip('/')}/"
    return {
        name.removeprefix(start): (int(info["size"]), tag_of(info))
        for name, info in infos.items()
        if name.startswith(start) and name[-1] != "/"
    }


def _states_in(folder: str, places: Sequence[str]) -> dict[str, tuple[int, str]]:
    client, path = _client(folder)
    infos: dict[str, Info] = {}
    if len(places) > 1:
        list_folder = partial(client.fs.ls, path, detail=True, refresh=True)
        infos = {
            entry["name"]: entry for entry in client.request(folder, list_folder, FileNotFoundError)
        }
    states = {}
    for place in places:
        object_path = str(client.fs._strip_protocol(place))
        info = infos.get(object_path) or client.info(place, object_path)
        states[place] = int(info["size"]), tag_of(info)
    return states


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
    return io.BufferedReader(_Object(place), BLOCK_BYTES)


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
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = start + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any, /) -> int:
        end = min(self._position + len(buffer), self._size)
        content = self._client.read(self._place, self._path, self._position, end)
        buffer[: len(content)] = content
        self._position += len(content)
        return len(content)
