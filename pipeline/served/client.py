"""Ask a server over HTTP; retry if it is overloaded or away, or its answer was cut off.

Knows nothing of the content. An API key comes from the environment, goes into one header, and
appears in no message.
"""

import json
import logging
import os
import threading
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from typing import Any

import urllib3
from urllib3.exceptions import (
    ConnectTimeoutError,
    HTTPError,
    NewConnectionError,
    ReadTimeoutError,
)

from rekindle.data.errors import InputError, first_words
from rekindle.data.storage.patience import FIRST_PATIENCE, delays
from rekindle.pipeline.served.config import ServedConfig

log = logging.getLogger("rekindle")

LONGEST_RETRY_AFTER = 600.0  # longest Retry-After accepted, seconds
CONNECT_SECONDS = 10.0  # seconds
TEMPORARY_STATUSES = {
    408,
    425,
    429,
}  # and everything from 500 on: the same request may succeed later


class ServerAwayError(InputError):
    """A server that cannot be reached, or keeps not answering."""


class StoppedError(Exception):
    """Another request has failed, or the work was interrupted: this answer is not needed."""


class Client:
    """One server. Threads may share it."""

    def __init__(self, config: ServedConfig):
        self.url, self.config = config.url, config
        self._headers = {"Accept": "application/json", "Content-Type": "application/json"}
        if (name := config.api_key_env) is not None:
            if not os.environ.get(name):
                raise InputError(
                    f"served.api_key_env names {name}, and that environment variable is not set; "
                    "set it to the server's API key, or leave api_key_env out"
                )
            self._headers["Authorization"] = f"Bearer {os.environ[name]}"
        timeout = urllib3.Timeout(
            connect=min(CONNECT_SECONDS, config.timeout_s), read=config.timeout_s
        )
        # No redirects: the key would go to an address nobody chose.
        self._pool = urllib3.PoolManager(
            maxsize=config.max_concurrency, block=True, timeout=timeout, retries=False
        )
        self._has_answered, self._has_warned = False, False
        self._stop = threading.Event()

    def stop(self) -> None:
        """End requests that wait for a retry now."""
        self._stop.set()

    def get(self, path: str, optional: bool = False) -> Any:
        """Return the JSON at ``path`` below the address; None if an ``optional`` path does not
        exist.
        """
        return self._ask("GET", path, None, optional)

    def post(self, path: str, body: Mapping[str, object]) -> Any:
        """Return the server's answer to ``body``. Asking again after a lost answer is harmless."""
        return self._ask("POST", path, json.dumps(body).encode(), False)

    def _ask(self, method: str, path: str, body: bytes | None, optional: bool) -> Any:
        """Send a request. Raise ServerAwayError when patience ends, InputError if the server
        refuses.
        """
        url = self.url.removesuffix("/v1") + path if optional else self.url + path
        seconds_spent, delays_left = 0.0, delays()
        while True:
            if self._stop.is_set():
                raise StoppedError
            start_time = time.monotonic()
            try:
                answer = self._pool.request(method, url, body=body, headers=self._headers)
                problem, retry_after = self._temporary_problem(answer)
            except HTTPError as error:
                problem, retry_after = self._describe_failure(error), 0.0
                if optional:
                    return None
            if not problem:
                self._has_answered = True
                return self._read(answer, url, optional)
            delay = next(delays_left)
            seconds_spent += time.monotonic() - start_time + delay
            self._check_patience(problem, seconds_spent)
            if self._stop.wait(max(delay, retry_after)):
                raise StoppedError

    def _temporary_problem(self, answer: urllib3.BaseHTTPResponse) -> tuple[str, float]:
        """Return the passing problem ("" if none), and the seconds the server asks to wait."""
        if answer.status not in TEMPORARY_STATUSES and answer.status < 500:
            return "", 0.0
        self._has_answered = True
        retry_after = _seconds(answer.headers.get("Retry-After"))
        if retry_after > LONGEST_RETRY_AFTER:
            raise ServerAwayError(
                f"the server {self.url} answers {answer.status} and asks to come back in "
                f"{retry_after:.0f} s; run the same command then: it goes on"
            )
        return f"HTTP {answer.status}{_message(answer)}", retry_after

    def _describe_failure(self, error: HTTPError) -> str:
        """Describe what failed, without the client library's own names."""
        if isinstance(error, NewConnectionError):  # some versions treat it as a timeout
            return first_words(error).rpartition(": ")[2]
        if isinstance(error, ConnectTimeoutError | ReadTimeoutError):
            return f"no answer within {self.config.timeout_s:g} s, served.timeout_s"
        return "the connection broke off"

    def _check_patience(self, problem: str, seconds_spent: float) -> None:
        patience = (
            self.config.patience_s
            if self._has_answered
            else min(FIRST_PATIENCE, self.config.patience_s)
        )
        if seconds_spent > patience:
            advice = (
                "What was made is kept: the same command continues"
                if self._has_answered
                else ("Is it running, and is its address (served.url) right?")
            )
            raise ServerAwayError(
                f"the server {self.url} has not answered for {patience:g} s ({problem}). {advice}"
            )
        if not self._has_warned and self._has_answered:
            self._has_warned = True
            log.warning(
                "%s is overloaded or away (%s): asked again for %g s", self.url, problem, patience
            )

    def _read(self, answer: urllib3.BaseHTTPResponse, url: str, optional: bool) -> Any:
        if optional and answer.status != 200:
            return None
        if answer.status in (401, 403):
            key_variable = self.config.api_key_env
            advice = (
                f"the key in {key_variable} is not one of its"
                if key_variable
                else (
                    "it wants an API key: name the environment variable that has it in "
                    "served.api_key_env"
                )
            )
            raise InputError(f"the server {self.url} answers {answer.status}: {advice}")
        if answer.status != 200:
            hint = ""
            if answer.status == 404:
                hint = ". Does served.url end where the server's API begins, with /v1?"
            raise InputError(f"{url} answers HTTP {answer.status}{_message(answer)}{hint}")
        try:
            return json.loads(answer.data)
        except ValueError:
            if optional:
                return None
            raise InputError(
                f"{url} does not answer with JSON ({answer.data[:60]!r}); served.url must be "
                "the address of an OpenAI-compatible server"
            ) from None


def _message(answer: urllib3.BaseHTTPResponse) -> str:
    """Return the message in an error's body, as one line."""
    try:
        body = json.loads(answer.data)
    except ValueError:
        return ""
    error = body.get("error", body) if isinstance(body, dict) else {}
    message = error.get("message") if isinstance(error, dict) else error
    return f": {' '.join(str(message).split())[:300]}" if message else ""


def _seconds(retry_after: str | None) -> float:
    """Return the seconds a Retry-After header asks for (seconds or a date); 0 if none or
    unclear.
    """
    if retry_after is None:
        return 0.0
    try:
        return max(0.0, float(retry_after))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(retry_after).timestamp() - time.time())
    except ValueError:
        return 0.0
