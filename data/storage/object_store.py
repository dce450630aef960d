"""A store in a bucket."""

import errno
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache, partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, TypeVar

from rekindle.data.errors import InputError
from rekindle.data.hub.places import is_hub
from rekindle.data.storage.base import Store, safe_name
from rekindle.data.storage.client import Client, changed_at
from rekindle.data.storage.copies import copies, copy_key
from rekindle.data.storage.patience import is_transient
from rekindle.data.storage.shard_bytes import MappedBytes, Region, RequestedBytes, ShardBytes
from rekindle.data.storage.uploads import upload_folder

if TYPE_CHECKING:
    from rekindle.data.storage.client import FileSystem

log = logging.getLogger("rekindle")

T = TypeVar("T")

REQUESTS = 32  # at the same time
CONDITIONAL = ("s3", "gs", "s3a", "gcs", "memory")  # their clients can create an object exclusively
CONFLICT_DELAYS = (0.1, 0.2, 0.4, 0.8)  # seconds, when two conditional puts collide


def refuse_unconditional(address: str) -> None:
    """Raise InputError for a kind of store that cannot be written to."""
    if is_hub(address):
        raise InputError(
            f"{address} can be read, not written to: a hub takes whole things. Write to a local "
            "folder (or s3://, gs://), and send what is finished: `pipeline push DIR OWNER/NAME`"
        )
    if (kind := address.partition("://")[0]) not in CONDITIONAL:
        raise InputError(
            f"{address} can be read, not written to: no conditional put is known for {kind}://, "
            "and without it two writers may both believe they were first. Use "
            f"{' or '.join(f'{one}://' for one in CONDITIONAL[:2])}, or a local folder"
        )


class ObjectStore(Store):
    """A bucket with conditional puts, through fsspec. Data objects pass through local files.

    A shard is written completely to a local file and then uploaded, because closing an object-store
    stream after an exception would publish a partial object. A reader maps a copy that all
    processes of the node share (``copies``), or requests single regions. Raise InputError if the
    bucket cannot be reached (credentials, endpoint, network).
    """

    def __init__(self, url: str):
        self._client = Client(url, pin=True)
        self.root, self.location = self._client.root, self._client.location
        self._scratch = upload_folder(self)
        self._create_tested = False  # whether exclusive creation was tested on its server

    def __reduce__(self) -> tuple[type["ObjectStore"], tuple[str], dict[str, object]]:
        """Reopen in another process, with its own client and temporary folder."""
        state = {"overlay": self.overlay, "location": self.location}
        return ObjectStore, (self._client.address,), state

    @property
    def fs(self) -> "FileSystem":
        """The fsspec file system of this process."""
        return self._client.fs

    def _path(self, name: str) -> str:
        return f"{self.root}/{safe_name(self.overlay.place(name))}"

    def _request(self, name: str, call: Callable[[str], T], *unwrapped: type[Exception]) -> T:
        """Return the result of ``call`` for the object's path, with patience. Errors other than
        ``unwrapped`` become one message.
        """
        path = self._path(name)
        return self._client.request(f"{self.location}/{name}", lambda: call(path), *unwrapped)

    @property
    def bucket_missing(self) -> str | None:  # noqa: D102
        return self._client.bucket_missing

    def read_bytes(self, name: str) -> bytes:  # noqa: D102
        return self._request(name, lambda path: bytes(self.fs.cat_file(path)), FileNotFoundError)

    def read_many(self, names: Sequence[str]) -> list[bytes]:  # noqa: D102
        pool = ThreadPoolExecutor(REQUESTS)  # a request takes long but needs little work
        try:
            return list(pool.map(self.read_bytes, names))
        finally:  # after an error or Ctrl-C nobody waits for retries
            pool.shutdown(wait=False, cancel_futures=True)

    def listing(self, folder: str) -> dict[str, str]:  # noqa: D102
        return {
            name: str(entry.get("ETag") or (entry.get("size"), changed_at(entry)))
            for name, entry in self._list_entries(folder, "file")
        }

    def _entries(self, folder: str, folders: bool) -> list[str]:
        return [name for name, _ in self._list_entries(folder, "directory" if folders else "file")]

    def _list_entries(self, folder: str, kind: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield name and description of each entry of that kind."""
        path = self._path(folder) if folder else self.root
        is_pinned = self._client.is_pinned
        try:
            list_folder = partial(self.fs.ls, path, detail=True, refresh=not is_pinned)
            address = f"{self.location}/{folder}"
            entries = self._client.request(address, list_folder, FileNotFoundError)
        except FileNotFoundError:
            return
        if not is_pinned:
            self.fs.invalidate_cache(path)  # a million descriptions that are not needed again
        for entry in entries:
            name = entry["name"].rstrip("/").removeprefix(path)
            # Consoles make "folders" as empty objects with the folder's name; these are not
            # entries.
            if entry["type"] == kind and name[:1] == "/" and name[1:2] != ".":
                yield name[1:], entry

    def create(self, name: str, content: bytes) -> bool:  # noqa: D102
        refuse_unconditional(self.location)
        created = self._put_new(name, content)
        if created and not self._create_tested:  # some servers ignore the condition, and overwrite
            if self._put_new(name, content):
                raise InputError(
                    f"the server of {self.location} overwrites objects that must not be "
                    "(If-None-Match: *): commits would not be safe there. Use a newer version of "
                    "it, or another store"
                )
            self._create_tested = True
        return created

    def _put_new(self, name: str, content: bytes) -> bool:
        path = self._path(name)
        with self._client.reaching(f"{self.location}/{name}"):
            for delay in (*CONFLICT_DELAYS, None):
                try:
                    put = partial(self.fs.pipe_file, path, content, mode="create")
                    self._client.patience.retry(put)
                    return True
                except FileExistsError:
                    return False
                except OSError as error:
                    if delay is None or is_transient(error) or not _is_conflict(error):
                        raise
                    time.sleep(delay)
        raise AssertionError  # the last conflict is raised

    @property
    def writable(self) -> bool:  # noqa: D102
        return self.location.partition("://")[0] in CONDITIONAL

    def replace(self, name: str, content: bytes) -> None:  # noqa: D102
        refuse_unconditional(self.location)
        self._request(name, lambda path: self.fs.pipe_file(path, content))

    def upload(self, file: Path, name: str) -> None:
        """Write a local file over whatever exists."""
        refuse_unconditional(self.location)
        self._request(name, lambda path: self.fs.put_file(str(file), path))

    def download(self, name: str, into: Path) -> None:
        """Write an object into a new local file."""
        size = self.state(name)[0]
        with open(into, "xb") as file:
            self._client.fetch(f"{self.location}/{name}", self._path(name), size, file)

    def _local(self, name: str) -> Path:
        return self._scratch / safe_name(name)

    def finish(self, name: str) -> None:  # noqa: D102
        refuse_unconditional(self.location)
        self._request(name, lambda path: self.fs.put_file(str(self._local(name)), path))
        self._local(name).unlink()  # a whole teacher may exceed the local disk

    def discard(self, name: str) -> None:  # noqa: D102
        refuse_unconditional(self.location)
        self._local(name).unlink(missing_ok=True)
        with suppress(FileNotFoundError):
            self._request(name, self.fs.rm_file, FileNotFoundError)

    def remove_folder(self, folder: str) -> None:  # noqa: D102
        refuse_unconditional(self.location)
        self.fs.invalidate_cache()  # others write there, too
        with suppress(FileNotFoundError):
            self._request(folder, partial(self.fs.rm, recursive=True), FileNotFoundError)
        self.fs.invalidate_cache()

    def state(self, name: str) -> tuple[int, float]:  # noqa: D102
        info = self._client.info(f"{self.location}/{name}", self._path(name))
        return int(info["size"]), changed_at(info)

    def open_bytes(  # noqa: D102
        self, name: str, size: int, sha256: str, regions: Sequence[Region], direct: bool = False
    ) -> ShardBytes:
        address = f"{self.location}/{name}"
        if not direct:
            local_copies, key = copies(), copy_key(address, size, sha256)
            file = PurePosixPath(name).name
            with suppress(_NotAsCommitted):  # if it is damaged, its regions will show it
                folder = local_copies.take(
                    key, size, lambda into: self._fetch(name, into / file, size, sha256)
                )
                if folder is not None:
                    mapped = MappedBytes(folder / file, address)
                    local_copies.release_with(mapped, key)
                    return mapped
                _warn_without_copies(local_copies.problem)
        return RequestedBytes(
            address, self.state(name)[0], regions, partial(self._read, name), own_cache=direct
        )

    def _read(self, name: str, begin: int, end: int) -> bytes:
        return self._client.read(f"{self.location}/{name}", self._path(name), begin, end)

    def _fetch(self, name: str, into: Path, size: int, sha256: str) -> None:
        if self.state(name)[0] != size:
            raise _NotAsCommitted
        with open(into, "xb") as file:
            if (
                self._client.fetch(f"{self.location}/{name}", self._path(name), size, file)
                != sha256
            ):
                raise _NotAsCommitted


class _NotAsCommitted(Exception):
    """An object's bytes differ from its commit record."""


@cache
def _warn_without_copies(problem: str) -> None:
    log.warning(
        "no room for local copies (%s): data is read from the store piece by piece, which is "
        "slower",
        problem,
    )


def _is_conflict(error: OSError) -> bool:
    """Return whether two conditional puts collided (S3's 409): this one did not win and
    must retry.
    """
    description = repr(error.__cause__ or error)
    return error.errno == errno.EBUSY or "ConditionalRequestConflict" in description
