"""A client of an object store. The one file that imports fsspec."""

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
BLOCK, AHEAD = 8 << 20, 4  # bytes of a download that are asked for at a time, and how often at once
# What tells an object from one that was there before, by the names that clients give it; the last
# ones are times.
_TAGS = ("ETag", "etag", "md5Hash", "content_md5", "blob_id")
_TIMES = ("LastModified", "last_modified", "mtime", "updated", "created")


def is_remote(place: object) -> bool:
    """Whether ``place`` is an address in a store (``s3://…``), and no local path."""
    return isinstance(place, str) and "://" in place and not place.startswith(FILE_URL)


# Of a client that would wait for ever for a server that takes a request and does not answer it:
# seconds for a request, of at most some tens of megabytes. That of s3:// waits for one minute.
_LIMITS = {scheme: {"requests_timeout": 300.0} for scheme in ("gs", "gcs")}


class Client:
    """What is at ``url`` and below, asked for with patience.

    Raises InputError when it cannot be reached (credentials, endpoint, network), and for an address
    that holds a credential: addresses are logged and kept.

    ``address``: the same place; on a hub at the commit that it was opened at, which stays as it is.
    """

    def __init__(self, url: str, pin: bool = False):
        refuse_credentials(url)
        self.location = url.rstrip("/")
        self.fixed = pin and is_hub(url)
        self.address = pinned(self.location) if self.fixed else self.location
        self._fs, self.root = _opened(self.address)
        self._process = os.getpid()
        self.patience = Patience(self.location)

    @property
    def fs(self) -> "FileSystem":
        """The client of this process: one that was made before a fork must not be used after."""
        if self._process != os.getpid():
            self._fs, self._process = _opened(self.address)[0], os.getpid()
        return self._fs

    @contextmanager
    def reaching(self, what: str, *passed: type[Exception]) -> Iterator[None]:
        """Errors but those of type ``passed`` become one message about ``what``."""
        try:
            yield
        except Exception as error:  # the clients' errors share no base: credentials, DNS, HTTP
            if isinstance(error, passed):
                raise
            told = first_words(error) or type(error).__name__
            raise InputError(
                f"cannot reach {what}: {told}. Check the address, the credentials "
                "and the network; what is there already stays, and the same command goes on"
            ) from error

    def asked(self, what: str, ask: Callable[[], T], *passed: type[Exception]) -> T:
        """What ``ask`` returns, with patience; errors as in ``reaching``."""
        with self.reaching(what, *passed):
            return self.patience.over(ask)

    def read(self, what: str, path: str, begin: int, end: int) -> bytes:
        """The bytes ``begin`` to ``end`` of an object; FileNotFoundError without one."""

        def ask() -> bytes:
            content = bytes(self.fs.cat_file(path, start=begin, end=end))
            if len(content) != end - begin:
                raise ConnectionError(f"{len(content)} of {end - begin} bytes were sent")
            return content

        return self.asked(what, ask, FileNotFoundError) if end > begin else b""

    def fetch(self, what: str, path: str, size: int, into: BinaryIO) -> str:
        """Write an object of ``size`` bytes into a file; return its sha256. Some blocks are asked
        for at a time.
        """
        digest = hashlib.sha256()
        ahead: deque[Future[bytes]] = deque()
        pool = ThreadPoolExecutor(AHEAD)
        try:
            for begin in range(0, size, BLOCK):
                end = min(begin + BLOCK, size)
                ahead.append(pool.submit(self.read, what, path, begin, end))
                while len(ahead) == AHEAD or (ahead and end == size):
                    content = ahead.popleft().result()
                    digest.update(content)
                    into.write(content)
        finally:  # Ctrl-C does not wait for a server that is away
            pool.shutdown(wait=False, cancel_futures=True)
        return digest.hexdigest()

    def info(self, what: str, path: str) -> dict[str, Any]:
        """What the store says of an object now; FileNotFoundError without one."""

        def ask() -> dict[str, Any]:
            if not self.fixed:
                self.fs.invalidate_cache(path.rsplit("/", 1)[0])  # others write there, too
            found: dict[str, Any] = self.fs.info(path)
            return found

        return self.asked(what, ask, FileNotFoundError)

    @property
    def bucket_missing(self) -> str | None:
        """The name of the bucket that it is in, if there is no such bucket to be seen."""
        bucket = self.root.partition("/")[0]
        if self.fixed:  # it was asked for when it was opened
            return None

        def ask() -> bool:
            if not bucket or self.fs.exists(bucket):
                return True
            with suppress(FileNotFoundError):  # a server that is away, too, is said to have none
                self.fs.ls(bucket, refresh=True)
                return True
            return False

        return None if self.asked(f"{self.location}/bucket", ask) else bucket


def refuse_credentials(url: str) -> None:
    """Raise InputError, which does not repeat it, for an address that holds a credential."""
    kind, _, rest = url.partition("://")
    if "@" in rest.partition("/")[0] or (kind in ("http", "https") and "?" in rest):
        raise InputError(
            "a location holds no user names, keys, passwords or signatures (NAME:SECRET@…, "
            "?…=SIGNATURE): give them as the store's own tools take them (AWS_ACCESS_KEY_ID, "
            "~/.aws/credentials, a role)"
        )


def _opened(url: str) -> "tuple[FileSystem, str]":
    import fsspec

    if is_hub(url):
        refuse_offline(url)
    try:
        limit = _LIMITS.get(url.partition("://")[0], {})
        found: tuple[FileSystem, str] = fsspec.core.url_to_fs(url, **limit)
    except (ImportError, ValueError) as error:
        raise InputError(
            f"cannot open {url!r}: {error}. "
            "For s3:// install the extra, in Rekindle's checkout: pip install -e '.[s3]'"
        ) from None
    return found


@lru_cache(maxsize=64)
def client_of(server: str) -> Client:
    """The client of a bucket (``s3://bucket``), which remembers whether that ever answered."""
    return Client(server)


def tag_of(info: dict[str, Any]) -> str:
    """What tells an object's content from another one, as its ``info`` has it: a checksum, or the
    time when it was written.
    """
    found = next((info[key] for key in (*_TAGS, *_TIMES) if info.get(key)), "")
    return str(found).strip('"')


def changed_at(info: dict[str, Any]) -> float:
    """When an object was written, in seconds since 1970; 0 where its ``info`` does not say it."""
    changed = next((info[key] for key in _TIMES if info.get(key)), 0)
    return float(changed.timestamp() if hasattr(changed, "timestamp") else changed)
