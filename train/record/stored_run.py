"""Training runs whose folder is in an object store: what counts of them is written through.

LOCATION/run.json, metrics.jsonl, …              as in a local folder; summary.json, run.yaml last
LOCATION/checkpoints/step-00000200-0123abcd/…    the files of an attempt at a checkpoint
LOCATION/checkpoints/step-00000200.json          its commit record: created last, exclusively

A checkpoint counts once its record is there, so that an upload that was killed never does. Of
several runs (stages, a sweep) LOCATION has the definition, and LOCATION/NAME is each of them.
"""

import logging
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from rekindle.data.errors import CacheFormatError, InputError
from rekindle.data.places import address_of
from rekindle.data.storage.addresses import sha256_of
from rekindle.data.storage.atomic import new_attempt, remove
from rekindle.data.storage.object_store import ObjectStore
from rekindle.data.storage.seal import read_sealed, seal
from rekindle.train.launch import launched
from rekindle.train.model.unfinished import RUN_FILE, SUMMARY_FILE
from rekindle.train.record.working_copy import another, store_of, working_copy

log = logging.getLogger("rekindle")

LAST = (SUMMARY_FILE, "run.yaml")  # of a finished run, in this order: they say that it is one


@contextmanager
def local_runs(
    out: Path, resume: bool, definitions: Mapping[str, tuple[str, ...]] = {}
) -> Iterator[Path]:
    """Where a run works whose folder is ``out``: there, or if that is in a store, in a local folder
    that holds what is there to go on with.

    Several runs have a file of ``definitions``; for it, the endings of the files of finished ones
    that nobody goes on from. Raises InputError where something is there that is not to be resumed.
    """

    def fill(folder: Path, store: ObjectStore) -> None:
        folder.mkdir()
        names = store.names("")
        if names and not resume:
            begun = {*names} & {RUN_FILE, *definitions}
            goes = ", or --resume to go on with the run in it" if begun else ""
            raise InputError(f"{store.location} is not empty. Give another --out{goes}")
        _fill(folder, store, names)
        for unneeded in (ends for file, ends in definitions.items() if file in names):
            for name in store.folders(""):
                (folder / name).mkdir()
                inside = ObjectStore(f"{store.location}/{name}")
                _fill(folder / name, inside, inside.names(""), unneeded)

    with working_copy(out, fill) as folder:
        if folder != out and launched().rank == 0:
            told = "worked on in %s, and written through at checkpoints"
            log.info(f"%s: {told}", address_of(out), folder.parent)
        yield folder


def _fill(
    folder: Path, store: ObjectStore, names: Collection[str], unneeded: tuple[str, ...] = ()
) -> None:
    """Fetch what there is of a run to go on with, or of one that is finished."""
    finished = SUMMARY_FILE in names
    for name in names:
        if not (finished and name.endswith(unneeded)):
            store.download(name, folder / name)
    if not finished:
        _fetch_newest(folder, store)


def _fetch_newest(folder: Path, store: ObjectStore) -> None:
    """Fetch the newest checkpoint that is whole; forget those that are not."""
    for step in reversed(_committed(store)):
        target = folder / "checkpoints" / step
        try:
            record = read_sealed(store, _record(step))
            target.mkdir(parents=True)
            for name, digest in record["files"].items():
                store.download(f"{record['folder']}/{name}", target / name)
                if sha256_of(target / name) != digest:
                    raise CacheFormatError(f"{name} is not what was committed")
            return
        except (CacheFormatError, FileNotFoundError, KeyError, TypeError, AttributeError) as error:
            log.warning("checkpoint %s is damaged (%s); trying the one before", step, error)
            remove(target)
            store.discard(_record(step))


def _committed(store: ObjectStore) -> list[str]:
    """The names of the checkpoints whose records are there, the newest last."""
    return [n.removesuffix(".json") for n in store.names("checkpoints") if n.endswith(".json")]


def _record(step: str) -> str:
    return f"checkpoints/{step}.json"


# --- what is written through ----------------------------------------------------------------------


def write_definition(file: Path, resumed: bool) -> None:
    """Write through which runs there are; ``resumed``: in place of what is there. Raises InputError
    where another process has begun some.
    """
    if (store := store_of(file.parent)) is not None:
        if resumed:
            store.upload(file, file.name)
        else:
            _create(store, file.name, file.read_bytes())


def write_begun(run: Path, resumed: bool) -> None:
    """Write through what a run is. Raises InputError where another process has begun one there."""
    if (store := store_of(run)) is None:
        return
    if not resumed:
        _create(store, RUN_FILE, (run / RUN_FILE).read_bytes())
    _upload_files(run, store, but=LAST)


def write_checkpoint(checkpoint: Path, files: dict[str, str]) -> None:
    """Write a checkpoint through, whose ``files`` have those sha256; what is said of the run comes
    with it. Raises InputError where another process has written the same one.
    """
    run, step = checkpoint.parents[1], checkpoint.name
    if (store := store_of(run)) is None:
        return
    folder = f"checkpoints/{step}-{new_attempt()}"
    for name in files:
        store.upload(checkpoint / name, f"{folder}/{name}")
    _upload_files(run, store, but=(*LAST, RUN_FILE))
    _create(store, _record(step), seal({"folder": folder, "files": files}))
    store.upload(run / RUN_FILE, RUN_FILE)  # which says from now on that there are checkpoints


def leave_checkpoints(newest: Path, keep: int, best: str | None) -> None:
    """Leave the last ``keep`` checkpoints in the store, and ``best``; remove the others, and what
    killed uploads have left.
    """
    if (store := store_of(newest.parents[1])) is None:
        return
    known, steps = set[str](), _committed(store)
    for step in steps:
        if step in steps[-keep:] or step == best:
            known.add(read_sealed(store, _record(step))["folder"])
        else:
            store.discard(_record(step))  # before its files: half of them never count
    for folder in store.folders("checkpoints"):
        if f"checkpoints/{folder}" not in known:
            for name in store.names(f"checkpoints/{folder}"):
                store.discard(f"checkpoints/{folder}/{name}")


def write_finished(run: Path) -> None:
    """Write the finished run through; what says that it is finished comes last."""
    if (store := store_of(run)) is not None:
        _upload_files(run, store, but=LAST)
        for name in LAST:
            store.upload(run / name, name)


def _create(store: ObjectStore, name: str, content: bytes) -> None:
    """Create an object; InputError where another process has."""
    made = store.create(name, content)
    if not made and store.read_bytes(name) != content:  # and no repeated request of ours
        raise another(store.location)


def _upload_files(run: Path, store: ObjectStore, but: Collection[str]) -> None:
    for file in sorted([*run.iterdir(), *run.glob("tensorboard/*"), *run.glob("wandb/*/**/*")]):
        if (
            file.is_file()
            and not file.is_symlink()
            and file.name[0] != "."
            and file.name not in but
        ):
            store.upload(file, str(file.relative_to(run)))
