"""A faulty S3 server: a proxy before the real one, and a client that uses it."""

import http.client
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from rekindle.data.storage import patience
from rekindle.data.storage.client import client_of
from rekindle.train.record import working_copy

SLOW_DOWN = (
    b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
)


class Faulty(ThreadingHTTPServer):
    """Passes requests to the S3 server, but the next ones fail, one for each of ``faults``."""

    back_at = 0.0  # it is away until then

    daemon_threads = True

    def __init__(self, behind: str):
        super().__init__(("127.0.0.1", 0), Passing)
        self.behind = behind.removeprefix("http://")
        self.faults: list[str] = []
        self.seen = 0
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def away(self, seconds: float) -> None:
        """Answer nobody for ``seconds`` from now on."""
        self.back_at = time.monotonic() + seconds

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request, client_address) -> None:
        """Ignore clients that leave."""


class Passing(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Faulty

    def pass_on(self) -> None:
        self.server.seen += 1
        fault = self.server.faults.pop(0) if self.server.faults else ""
        if time.monotonic() < self.server.back_at:
            fault = "drop"
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.close_connection = True
        if fault == "drop":
            return
        if fault in ("503", "500"):
            self.answer(int(fault), {"Content-Type": "application/xml"}, SLOW_DOWN)
            return
        upstream = http.client.HTTPConnection(self.server.behind, timeout=30)
        upstream.request(self.command, self.path, body, dict(self.headers.items()))
        found = upstream.getresponse()
        content = found.read()
        if fault == "unheard":  # it was done, but nobody is told
            return
        self.answer(found.status, dict(found.getheaders()), content, fault)

    def answer(self, status: int, headers: dict[str, str], body: bytes, fault: str = "") -> None:
        self.send_response(status)
        for name, value in headers.items():
            if name.lower() not in ("connection", "transfer-encoding", "content-length", "date"):
                self.send_header(name, value)
        length = headers.get("Content-Length", len(body)) if self.command == "HEAD" else len(body)
        self.send_header("Content-Length", str(length))
        self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            body = body[: len(body) // 2] if fault == "cut" else body
            pieces = 10 if fault == "slow" else 1
            for number in range(pieces):
                self.wfile.write(
                    body[len(body) * number // pieces : len(body) * (number + 1) // pieces]
                )
                self.wfile.flush()
                time.sleep(0.02 * (fault == "slow"))

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = pass_on

    def log_message(self, *arguments: object) -> None:
        """Log nothing."""


def forget_clients() -> None:
    """Let the next request go to the server the environment names then."""
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    client_of.cache_clear()
    working_copy._open_store.cache_clear()


@contextmanager
def faulty_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Faulty]:
    """Put a proxy before the server the environment names."""
    import s3fs

    server = Faulty(os.environ["AWS_ENDPOINT_URL"])
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")  # the client's own retries would hide ours
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    monkeypatch.setattr(patience, "FIRST_DELAY", 0.01)
    forget_clients()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        forget_clients()
