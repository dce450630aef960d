"""A process that is killed in the middle of an upload in parts: nothing of it is visible."""

import signal
import subprocess
import sys

import pytest
import s3fs

from rekindle.data.storage.object_store import ObjectStore

# Killed once a part is there; parts are small, and none is sent beside another.
KILLED = """
import os, signal, sys
from pathlib import Path
import s3fs
from rekindle.data.storage.object_store import ObjectStore
s3fs.core.calculate_chunksize = lambda size, chunksize=None: 5 << 20
s3fs.S3FileSystem.max_concurrency = 1
real, parts = s3fs.S3FileSystem._call_s3, []
async def call(self, method, *given, **more):
    if method == "upload_part":
        if parts:
            os.kill(os.getpid(), signal.SIGKILL)
        parts.append(method)
    return await real(self, method, *given, **more)
s3fs.S3FileSystem._call_s3 = call
ObjectStore(sys.argv[1]).upload(Path(sys.argv[2]), "model.safetensors")
"""


@pytest.mark.parametrize("before", [None, b"older"])
def test_what_was_there_stays_and_the_upload_is_done_again(s3, tmp_path, before):
    store, file = ObjectStore(f"{s3}/killed-{before is None}"), tmp_path / "file"
    file.write_bytes(bytes(range(256)) * (11 << 12))
    if before is not None:
        store.replace("model.safetensors", before)
    command = [sys.executable, "-c", KILLED, store.location, str(file)]
    killed = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    fs = s3fs.S3FileSystem()
    left = fs.call_s3("list_multipart_uploads", Bucket="bucket", Prefix=store.root[7:])
    assert len(left["Uploads"]) == 1  # for the bucket's lifecycle rule, as docs/stores.md says
    if before is None:
        assert store.names("") == []
    else:
        assert store.read_bytes("model.safetensors") == before
    store.upload(file, "model.safetensors")
    assert store.read_bytes("model.safetensors") == file.read_bytes()
