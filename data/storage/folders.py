"""Folders in a store, as local copies that all processes of a node share."""

import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from rekindle.data.errors import InputError
from rekindle.data.hub.places import hub_folder, is_hub
from rekindle.data.storage.addresses import (
    fetch_object,
    find_objects,
    open_binary,
    states_below,
    states_of_objects,
)
from rekindle.data.storage.copies import FOLDER_VARIABLE, copies, copy_key

State = tuple[int, str]  # bytes and tag of an object
UNFINISHED = ".unfinished"  # in a folder during its upload
CHECKPOINTS = "checkpoints"  # of a run: a record step-00000200.json for each


def folder_copy(address: str) -> Path:
    """Return the local copy of a model's folder, kept until this process ends. For a run's
    checkpoint ``…/checkpoints/step-00000200``, the record beside it says where its files are.

    For one on a hub it is that of huggingface_hub's own cache. Raise InputError if there is no
    such folder, or no room for a copy.
    """
    if is_hub(address):
        return hub_folder(address)
    files = find_objects(f"{address}/") or _checkpoint_files(address)
    if not files:
        raise InputError(f"model {address!r}: there is no such folder, or nothing in it")
    if UNFINISHED in map(_name, files):
        raise InputError(
            f"{address} is not complete: it is being uploaded, or its upload was killed. Wait, or "
            "run the command that writes it again"
        )
    checkpoints = find_objects(f"{address}/{CHECKPOINTS}/")
    records = {f"{CHECKPOINTS}/{_name(file)}" for file in checkpoints if file.endswith(".json")}
    states = states_of_objects(files)
    return _local_copy(address, {_name(file): (file, states[file]) for file in files}, records)


def tree_copy(address: str, include: Callable[[str], bool]) -> Path:
    """Return the local copy of the files below a folder whose names ``include`` accepts; else like
    ``folder_copy``.
    """
    states = states_below(address)
    if not states:
        raise InputError(f"{address}: there is no such folder, or nothing in it")
    records = {name for name in states if _is_record(name)}
    files = {
        name: (f"{address}/{name}", state)
        for name, state in states.items()
        if include(name) and name not in records
    }
    return _local_copy(address, files, records)


def _is_record(name: str) -> bool:
    parts = name.split("/")
    return len(parts) > 1 and parts[-2] == CHECKPOINTS and name.endswith(".json")


def _name(place: str) -> str:
    return place.rpartition("/")[2]


def _local_copy(
    address: str, files: Mapping[str, tuple[str, State]], records: Collection[str]
) -> Path:
    """Return the copy of ``files``, keyed by their names in it. Of checkpoints, only the presence
    of their ``records`` is copied.
    """
    path_in_copy = address.replace("://", "/")  # runs are distinguished by their paths

    def fetch(into: Path) -> None:
        for name, (place, (size, _)) in files.items():
            (into / path_in_copy / name).parent.mkdir(parents=True, exist_ok=True)
            fetch_object(place, size, into / path_in_copy / name)
        for record in records:
            (into / path_in_copy / record.removesuffix(".json")).mkdir(parents=True, exist_ok=True)

    local_copies = copies()
    size = sum(size for _, (size, _) in files.values())
    key = copy_key(address, sorted(files.items()), sorted(records))
    if (folder := local_copies.take(key, size, fetch)) is None:
        raise InputError(
            f"no room for a local copy of {address} ({size / 1e9:.3g} GB): {local_copies.problem}. "
            f"Free some, or name a folder on another disk with {FOLDER_VARIABLE}"
        )
    return folder / path_in_copy


def _checkpoint_files(address: str) -> list[str]:
    try:
        with open_binary(f"{address}.json") as file:
            folder = _name(json.loads(file.read())["folder"])
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return []
    return find_objects(f"{address.rpartition('/')[0]}/{folder}/")
