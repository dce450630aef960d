"""Run by S3Server: moto's server, answering S3 requests one after another.

By itself it checks for an object and writes it in two steps, with a thread per request, so that two
clients creating one object may both be told they did, which S3 never does.
"""

import io
import sys
import threading
from collections.abc import Iterable
from typing import Any

from moto import server


class InTurn(server.DomainDispatcherApplication):
    """The whole application; its own requests (replayed recordings) do not wait."""

    turn = threading.Lock()

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        if environ["PATH_INFO"].startswith("/moto-api"):
            return super().__call__(environ, start_response)
        if length := int(environ.get("CONTENT_LENGTH") or 0):  # a slow client must not delay others
            environ["wsgi.input"] = io.BytesIO(environ["wsgi.input"].read(length))
        with self.turn:
            return [*super().__call__(environ, start_response)]


if __name__ == "__main__":
    server.DomainDispatcherApplication = InTurn
    server.main(sys.argv[1:])
