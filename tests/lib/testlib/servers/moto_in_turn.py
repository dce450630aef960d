"""Run by S3Server: moto's server, which answers one request of S3 after another.

As it is, it looks whether an object is there and writes it in two steps, each request in a thread
of its own: of two that create one object both may be told that they did, which S3 never says.
"""

import io
import sys
import threading
from collections.abc import Iterable
from typing import Any

from moto import server


class InTurn(server.DomainDispatcherApplication):
    """The whole application; its own requests (a recording that is replayed) do not wait."""

    turn = threading.Lock()

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        if environ["PATH_INFO"].startswith("/moto-api"):
            return super().__call__(environ, start_response)
        if length := int(environ.get("CONTENT_LENGTH") or 0):  # a slow client holds nobody up
            environ["wsgi.input"] = io.BytesIO(environ["wsgi.input"].read(length))
        with self.turn:
            return [*super().__call__(environ, start_response)]


if __name__ == "__main__":
    server.DomainDispatcherApplication = InTurn
    server.main(sys.argv[1:])
