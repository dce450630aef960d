"""A real S3 server (moto's) in its own process."""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

IN_TURN = Path(__file__).with_name("moto_in_turn.py")


class S3Server:
    """Keeps its objects in memory. After a kill it has none, unless it keeps a ``recording`` of its
    requests, from which the next one recreates them.
    """

    def __init__(self, recording: Path | None = None):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url, more = f"http://127.0.0.1:{port}", {}
        if recording is not None:
            more = {"MOTO_ENABLE_RECORDING": "1", "MOTO_RECORDER_FILEPATH": str(recording)}
        self.process = subprocess.Popen(
            [sys.executable, str(IN_TURN), "-H", "127.0.0.1", "-p", str(port)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=os.environ | more,
        )
        self._wait()
        if recording is not None and recording.exists():
            asked = urllib.request.Request(
                f"{self.url}/moto-api/recorder/replay-recording", method="POST"
            )
            urllib.request.urlopen(asked, timeout=120).close()

    def _wait(self) -> None:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"{self.url}/moto-api/", timeout=5).close()
                return
            except OSError:
                assert self.process.poll() is None, "the moto server ended"
                time.sleep(0.05)
        raise AssertionError("the moto server did not answer")

    def forget(self) -> None:
        """Remove all objects."""
        asked = urllib.request.Request(f"{self.url}/moto-api/reset", method="POST")
        urllib.request.urlopen(asked, timeout=60).close()

    def kill(self) -> None:
        """Kill it, as by -9 or a power failure."""
        self.process.kill()
        self.process.wait()


def credentials(url: str) -> dict[str, str]:
    """Return the environment of a user of the server."""
    return {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
