"""Results that a command writes whole (an expert, an export) into an object store.

LOCATION/.unfinished    while they are uploaded: who does; its removal, last of all, is the commit
LOCATION/…              the files, as in a local folder

What is there while ``.unfinished`` is counts for nothing: it is of a process that uploads, or that
was killed. Other programs, which know nothing of it, find ``config.json`` last.
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
from rekindle.train.model.folder import ADAPTER_FILE, SETTINGS_FILE
from rekindle.train.record.working_copy import another, store_of, working_copy

_MODEL = (SETTINGS_FILE, ADAPTER_FILE)  # what makes a folder one of a model
_SMALL = ".json"


@contextmanager
def local_result(out: Path, force: bool = False) -> Iterator[Path]:
    """Where a command makes the folder ``out``: there, or if that is in a store, in a local one
    that has what says of the result that is there already; ``write_whole`` uploads it.

    Raises InputError where another machine uploads one, unless with ``force``.
    """

    def fill(folder: Path, store: ObjectStore) -> None:
        claim = _claim_in(store)
        if claim and not force and claim.get("host") != socket.gethostname():
            raise InputError(
                f"{store.location}: process {claim.get('process')} on {claim.get('host')} uploads "
                "a result there, or was killed in the middle of it. Wait for it; if it is gone, "
                "--force begins anew"
            )
        there = [] if claim else [*store.names(""), *store.folders("")]
        for name in there:
            folder.mkdir(exist_ok=True)
            if name.endswith(_SMALL):
                store.download(name, folder / name)
            else:
                (folder / name).touch()

    with working_copy(out, fill) as folder:
        yield folder


def write_whole(folder: Path, force: bool = False) -> None:
    """Upload the finished result in ``folder``, if it belongs into a store; with ``force`` in place
    of an earlier one. A process that is killed meanwhile leaves nothing that counts.

    Raises InputError where another one has been written, or is uploaded by another machine.
    """
    if (store := store_of(folder)) is None:
        return
    claim = _claim_in(store)
    if not claim and store.names("") and not force:
        raise another(store.location)
    ours = _own_claim()
    if not store.create(UNFINISHED, json.dumps(ours).encode()):
        claim = _claim_in(store)
        if claim != ours and claim.get("host") != ours["host"] and not force:
            raise another(store.location)
        store.replace(UNFINISHED, json.dumps(ours).encode())
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    for name in sorted({*store.names("")} - files | {*_MODEL}, key=lambda one: one not in _MODEL):
        store.discard(name)
    for name in sorted(files, key=lambda one: (one in _MODEL, one)):
        store.upload(folder / name, name)
    if _claim_in(store) != ours:
        raise another(store.location)
    store.discard(UNFINISHED)


def _own_claim() -> dict[str, Any]:
    return {"process": os.getpid(), "host": socket.gethostname(), "attempt": new_attempt()}


def _claim_in(store: ObjectStore) -> dict[str, Any]:
    with suppress(FileNotFoundError):
        return dict(store.read_json(UNFINISHED))
    return {}
