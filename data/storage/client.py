"""A client of an object store. The only file that imports fsspec."""

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import lru_cache
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

from rekindle.data.errors import InputError, first_words
from rekindle.data.hub.places import is_hub, pinned, refuse_offline
from rekindle.data.storage.patience import Patience

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem as FileSystem

T = TypeVar("T")

FILE_URL = "file://"
# of a download: bytes per request, and parallel requests
BLOCK_BYTES, PARALLEL_REQUESTS = 8 << 20, 4
# What distinguishes an object from an earlier one, by the names that clients use; the last ones are
# times.
_TAGS = ("ETag", "etag", "md5Hash", "content_md5", "blob_id")
_TIMES = ("LastModified", "last_modified", "mtime", "updated", "created")


def is_remote(place: object) -> bool:
    """Return whether ``place`` is an address in a store (``s3://…``), not a local path."""
    return isinstance(place, str) and "://" in place and not place.startswith(FILE_URL)


# For clients that would wait for ever for an answer: seconds per request of at most some tens of
# megabytes. The client of s3:// waits for one minute.
_LIMITS = {scheme: {"requests_timeout": 300.0} for scheme in ("gs", "gcs")}


class Client:
    """A client for what is at ``url`` and below, with patience.

    Raise InputError if it cannot be reached (credentials, endpoint, network), and for an address
    that contains a credential: addresses are logged and kept.

    ``address``: the same place; on a hub at the commit that it was opened at, which stays as it is.
    """

    def __init__(self, url: str, pin: bool = False):
        refuse_credentials(url)
        self.location = url.rstrip("/")
        self.is_pinned = pin and is_hub(url)
        self.address = pinned(self.location) if self.is_pinned else self.location
        self._fs, self.root = _open(self.address)
        self._process = os.getpid()
        self.patience = Patience(self.location)

    @property
    def fs(self) -> "FileSystem":
        """The client of this process; one made before a fork must not be used after it."""
        if self._process != os.getpid():
            self._fs, self._process = _open(self.address)[0], os.getpid()
        return self._fs

    @contextmanager
    def reaching(self, subject: str, *unwrapped: type[Exception]) -> Iterator[None]:
        """Turn errors other than ``unwrapped`` into one message about ``subject``."""
        try:
            yield
        # the clients' errors share no base class: credentials, DNS, HTTP
        except Exception as error:
            if isinstance(error, unwrapped):
                raise
            reason = first_words(error) or type(error).__name__
            raise InputError(
                f"cannot reach {subject}: {reason}. Check the address, the credentials "
                "and the network; what is there already stays, and the same command goes on"
            ) from error

    def request(self, subject: str, call: Callable[[], T], *unwrapped: type[Exception]) -> T:
        """Return the result of ``call``, with patience; errors as in ``reaching``."""
        with self.reaching(subject, *unwrapped):
            return self.patience.retry(call)

    def read(self, subject: str, path: str, begin: int, end: int) -> bytes:
        """Return the bytes ``begin`` to ``end`` of an object; raise FileNotFoundError
        without one.
        """

        def read_range() -> bytes:
            content = bytes(self.fs.cat_file(path, start=begin, end=end))
            if len(content) != end - begin:
                raise ConnectionError(f"{len(content)} of {end - begin} bytes were sent")
            return content

        return self.request(subject, read_range, FileNotFoundError) if end > begin else b""

    def fetch(self, subject: str, path: str, size: int, into: BinaryIO) -> str:
        """Write an object of ``size`` bytes into a file; return its sha256. Requests several blocks
        at a time.
        """
        digest = hashlib.sha256()
        pending: deque[Future[bytes]] = deque()
        pool = ThreadPoolExecutor(PARALLEL_REQUESTS)
        try:
            for begin in range(0, size, BLOCK_BYTES):
                end = min(begin + BLOCK_BYTES, size)
                pending.append(pool.submit(self.read, subject, path, begin, end))
                while len(pending) == PARALLEL_REQUESTS or (pending and end == size):
                    content = pending.popleft().result()
                    digest.update(content)
                    into.write(content)
        finally:  # Ctrl-C does not wait for a server that is away
            pool.shutdown(wait=False, cancel_futures=True)
        return digest.hexdigest()

    def info(self, subject: str, path: str) -> dict[str, Any]:
        """Return the store's current information on an object; raise FileNotFoundError
        without one.
        """

        def read_info() -> dict[str, Any]:
            if not self.is_pinned:
                self.fs.invalidate_cache(path.rsplit("/", 1)[0])  # others write there, too
            info: dict[str, Any] = self.fs.info(path)
            return info

        return self.request(subject, read_info, FileNotFoundError)

    @property
    def bucket_missing(self) -> str | None:
        """The name of its bucket, if no such bucket is visible; else None."""
        bucket = self.root.partition("/")[0]
        if self.is_pinned:  # opening it has found it
            return None

        def is_visible() -> bool:
            if not bucket or self.fs.exists(bucket):
                return True
            with suppress(FileNotFoundError):  # a server that is away also counts as missing
                self.fs.ls(bucket, refresh=True)
                return True
            return False

        return None if self.request(f"{self.location}/bucket", is_visible) else bucket


def refuse_credentials(url: str) -> None:
    """Raise InputError, without repeating the address, if it contains a credential."""
    kind, _, rest = url.partition("://")
    if "@" in rest.partition("/")[0] or (kind in ("http", "https") and "?" in rest):
        raise InputError(
            "a location holds no user names, keys, passwords or signatures (NAME:SECRET@…, "
            "?…=SIGNATURE): give them as the store's own tools take them (AWS_ACCESS_KEY_ID, "
            "~/.aws/credentials, a role)"
        )


def _open(url: str) -> "tuple[FileSystem, str]":
    import fsspec

    if is_hub(url):
        refuse_offline(url)
    try:
        limit = _LIMITS.get(url.partition("://")[0], {})
        opened: tuple[FileSystem, str] = fsspec.core.url_to_fs(url, **limit)
    except (ImportError, ValueError) as error:
        raise InputError(
            f"cannot open {url!r}: {error}. "
            "For s3:// install the extra, in Rekindle's checkout: pip install -e '.[s3]'"
        ) from None
    return opened


@lru_cache(maxsize=64)
def client_of(server: str) -> Client:
    """Return the client of a bucket (``s3://bucket``), which remembers whether it ever answered."""
    return Client(server)


def tag_of(info: dict[str, Any]) -> str:
    """Return what distinguishes an object's content according to its ``info``: a checksum, or its
    modification time.
    """
    tag = next((info[key] for key in (*_TAGS, *_TIMES) if info.get(key)), "")
    return str(tag).strip('"')


def changed_at(info: dict[str, Any]) -> float:
    """Return when an object was written, in seconds since 1970; 0 if its ``info`` lacks it."""
    changed = next((info[key] for key in _TIMES if info.get(key)), 0)
    return float(changed.timestamp() if hasattr(changed, "timestamp") else changed)
