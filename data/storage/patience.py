"""Retry requests to a server that is overloaded, or away for a while.

The clients retry a few times within seconds. This retries for minutes, so that a run of days
survives the restart of a server.
"""

import logging
import random
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from rekindle.data.errors import first_words

log = logging.getLogger("rekindle")

T = TypeVar("T")

PATIENCE = 300.0  # seconds, for a server that has answered before
FIRST_PATIENCE = 5.0  # for one that never has: its address may be wrong
FIRST_DELAY, LONGEST_DELAY = 0.25, 20.0  # seconds

_DEFINITE_ERRORS = (FileNotFoundError, FileExistsError, PermissionError)
# By name: the clients are optional packages, and their errors share no base class.
_TRANSIENT_ERRORS = {
    "ClientConnectorError",
    "ClientOSError",
    "ClientPayloadError",
    "ConnectError",
    "ConnectTimeout",
    "ConnectTimeoutError",
    "ConnectionClosedError",
    "ContentLengthError",
    "EndpointConnectionError",
    "HTTPClientError",
    "IncompleteRead",
    "IncompleteReadError",
    "ReadError",
    "ReadTimeout",
    "ReadTimeoutError",
    "RemoteProtocolError",
    "ResponseStreamingError",
    "ServerDisconnectedError",
    "ServerTimeoutError",
    "gaierror",
}
_TRANSIENT_CODES = {"InternalError", "RequestTimeout", "ServiceUnavailable", "SlowDown"}


class Patience:
    """Tracks whether one server has ever answered."""

    def __init__(self, location: str):
        self.location = location
        self.answered = False

    def retry(self, call: Callable[[], T]) -> T:
        """Return the result of ``call``, repeated for some minutes while the server is overloaded
        or unreachable. Repeating must be harmless if an earlier call succeeded and its answer was
        lost.
        """
        began, is_reported = time.monotonic(), False
        for delay in delays():
            try:
                result = call()
            except Exception as error:
                if not is_transient(error):
                    self.answered = True
                    raise
                patience = PATIENCE if self.answered else FIRST_PATIENCE
                if time.monotonic() - began + delay > patience:
                    raise
                if not is_reported and self.answered:
                    log.warning(
                        "%s is overloaded or away (%s): asked again for %.0f s",
                        *(self.location, first_words(error, 150), patience),
                    )
                    is_reported = True
                time.sleep(delay)
            else:
                self.answered = True
                return result
        raise AssertionError  # delays never end


def delays() -> Iterator[float]:
    """Yield the seconds between attempts: growing, and random, so that processes do not all retry
    at the same moment.
    """
    longest = FIRST_DELAY
    while True:
        yield random.uniform(longest / 2, longest)
        longest = min(2 * longest, LONGEST_DELAY)


def is_transient(error: BaseException) -> bool:
    """Return whether the same request may succeed later, because the server was unreachable,
    overloaded or failed. Definite answers (no such object, no right, wrong credentials) do not
    count.
    """
    seen = set[int]()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        if isinstance(cause, _DEFINITE_ERRORS):
            return False
        if (
            isinstance(cause, ConnectionError | TimeoutError)
            or type(cause).__name__ in _TRANSIENT_ERRORS
        ):
            return True
        response: Any = getattr(cause, "response", None)
        if isinstance(response, dict):
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            code = str(response.get("Error", {}).get("Code", ""))
            return status >= 500 or status == 429 or code in _TRANSIENT_CODES or "Thrott" in code
        # gcsfs's, aiohttp's
        status = getattr(cause, "code", None) or getattr(cause, "status", None)
        status = status or getattr(response, "status_code", None)  # httpx's, of a hub
        if isinstance(status, int) and (status >= 500 or status in (408, 429)):
            return True
        cause = cause.__cause__ or cause.__context__
    return False
