"""Upload results that a command writes whole (an expert, an export) to an object store.

  LOCATION/.unfinished    exists during the upload and names the process; its removal is the commit
  LOCATION/…              the files, as in a local folder

Nothing there counts while ``.unfinished`` exists: it belongs to a process that is uploading, or
that was killed. Other programs, which do not know of it, see ``config.json`` last.
"""

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rekindle.data.errors import InputError
from rekindle.data.storage.atomic import new_attempt
from rekindle.data.storage.folders import UNFINISHED
from rekindle.data.storage.object_store import ObjectStore
from rekindle.train.model.folder import ADAPTER_FILE, CONFIG_FILE
from rekindle.train.record.working_copy import in_use_error, store_of, working_copy

_MODEL = (CONFIG_FILE, ADAPTER_FILE)  # either one makes a folder a model's
_SMALL = ".json"


@contextmanager
def local_result(out: Path, force: bool = False) -> Iterator[Path]:
    """Yield the folder in which a command makes ``out``: itself, or if that is in a store, a local
    one with the record of a result that is already there; ``upload_result`` uploads it.

    Raises InputError if another machine is uploading one, unless with ``force``.
    """

    def fill(folder: Path, store: ObjectStore) -> None:
        claim = _read_claim(store)
        if claim and not force and claim.get("host") != socket.gethostname():
            raise InputError(
                f"{store.location}: process {claim.get('process')} on {claim.get('host')} is "
                "uploading a result there, or was killed during the upload. Wait for it; if it "
                "is gone, --force starts again"
            )
        existing = [] if claim else [*store.names(""), *store.folders("")]
        for name in existing:
            folder.mkdir(exist_ok=True)
            if name.endswith(_SMALL):
                store.download(name, folder / name)
            else:
                (folder / name).touch()

    with working_copy(out, fill) as folder:
        yield folder


def upload_result(folder: Path, force: bool = False) -> None:
    """Upload the finished result in ``folder`` if it belongs in a store; with ``force``, replace an
    earlier one. A process killed meanwhile leaves nothing that counts.

    Raises InputError if another result exists, or is being uploaded by another machine.
    """
    if (store := store_of(folder)) is None:
        return
    claim = _read_claim(store)
    if not claim and store.names("") and not force:
        raise in_use_error(store.location)
    own_claim = _new_claim()
    if not store.create(UNFINISHED, json.dumps(own_claim).encode()):
        claim = _read_claim(store)
        if claim != own_claim and claim.get("host") != own_claim["host"] and not force:
            raise in_use_error(store.location)
        store.replace(UNFINISHED, json.dumps(own_claim).encode())
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    for name in sorted({*store.names("")} - files | {*_MODEL}, key=lambda name: name not in _MODEL):
        store.discard(name)
    for name in sorted(files, key=lambda name: (name in _MODEL, name)):
        store.upload(folder / name, name)
    if _read_claim(store) != own_claim:
        raise in_use_error(store.location)
    store.discard(UNFINISHED)


def _new_claim() -> dict[str, Any]:
    return {"process": os.getpid(), "host": socket.gethostname(), "attempt": new_attempt()}


def _read_claim(store: ObjectStore) -> dict[str, Any]:
    with suppress(FileNotFoundError):
        return dict(store.read_json(UNFINISHED))
    return {}
