"""Training runs whose folder is in an object store: their lasting files are uploaded as they are
written.

  LOCATION/run.json, metrics.jsonl, …            as in a local folder; summary.json, run.yaml last
  LOCATION/checkpoints/step-00000200-0123abcd/…  the files of an attempt at a checkpoint
  LOCATION/checkpoints/step-00000200.json        its commit record: created last, exclusively

A checkpoint counts once its record exists, so a killed upload never does. For several runs (stages,
a sweep) LOCATION has the definition, and LOCATION/NAME each run.
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
from rekindle.train.launch import current_launch
from rekindle.train.model.unfinished import RUN_FILE, SUMMARY_FILE
from rekindle.train.record.working_copy import in_use_error, store_of, working_copy

log = logging.getLogger("rekindle")

# They mark a run as finished; uploaded last, in this order.
MARKS_FINISHED = (SUMMARY_FILE, "run.yaml")


@contextmanager
def local_runs(
    out: Path, resume: bool, definitions: Mapping[str, tuple[str, ...]] = {}
) -> Iterator[Path]:
    """Yield the folder in which a run for ``out`` works: itself, or if that is in a store, a local
    one with what is needed to continue.

    Several runs have a file of ``definitions``, which maps to the endings of a finished run's files
    that no other run needs. Raises InputError if something is there that is not to be resumed.
    """

    def fill(folder: Path, store: ObjectStore) -> None:
        folder.mkdir()
        names = store.names("")
        if names and not resume:
            found_records = {*names} & {RUN_FILE, *definitions}
            resume_advice = ", or --resume to continue the run in it" if found_records else ""
            raise InputError(f"{store.location} is not empty. Give another --out{resume_advice}")
        _download_run(folder, store, names)
        for unneeded_endings in (endings for file, endings in definitions.items() if file in names):
            for name in store.folders(""):
                (folder / name).mkdir()
                run_store = ObjectStore(f"{store.location}/{name}")
                _download_run(folder / name, run_store, run_store.names(""), unneeded_endings)

    with working_copy(out, fill) as folder:
        if folder != out and current_launch().rank == 0:
            message = "worked on in %s, and uploaded at checkpoints"
            log.info(f"%s: {message}", address_of(out), folder.parent)
        yield folder


def _download_run(
    folder: Path, store: ObjectStore, names: Collection[str], unneeded_endings: tuple[str, ...] = ()
) -> None:
    """Download what is needed to continue a run, or what a finished one needs."""
    finished = SUMMARY_FILE in names
    for name in names:
        if not (finished and name.endswith(unneeded_endings)):
            store.download(name, folder / name)
    if not finished:
        _download_newest_checkpoint(folder, store)


def _download_newest_checkpoint(folder: Path, store: ObjectStore) -> None:
    """Download the newest complete checkpoint; forget incomplete ones."""
    for step in reversed(_committed_checkpoints(store)):
        target = folder / "checkpoints" / step
        try:
            record = read_sealed(store, _commit_record(step))
            target.mkdir(parents=True)
            for name, digest in record["files"].items():
                store.download(f"{record['folder']}/{name}", target / name)
                if sha256_of(target / name) != digest:
                    raise CacheFormatError(f"{name} is not what was committed")
            return
        except (CacheFormatError, FileNotFoundError, KeyError, TypeError, AttributeError) as error:
            log.warning("checkpoint %s is damaged (%s); trying the one before", step, error)
            remove(target)
            store.discard(_commit_record(step))


def _committed_checkpoints(store: ObjectStore) -> list[str]:
    """Return the names of the checkpoints with a record, the newest last."""
    return [n.removesuffix(".json") for n in store.names("checkpoints") if n.endswith(".json")]


def _commit_record(step: str) -> str:
    return f"checkpoints/{step}.json"


# --- what is written through ----------------------------------------------------------------------


def upload_definition(file: Path, resumed: bool) -> None:
    """Upload the definition of several runs; ``resumed``: replacing the one there. Raise InputError
    if another process has begun some.
    """
    if (store := store_of(file.parent)) is not None:
        if resumed:
            store.upload(file, file.name)
        else:
            _create_or_refuse(store, file.name, file.read_bytes())


def upload_new_run(run: Path, resumed: bool) -> None:
    """Upload the record of a run. Raise InputError if another process has begun one there."""
    if (store := store_of(run)) is None:
        return
    if not resumed:
        _create_or_refuse(store, RUN_FILE, (run / RUN_FILE).read_bytes())
    _upload_files(run, store, except_names=MARKS_FINISHED)


def upload_checkpoint(checkpoint: Path, files: dict[str, str]) -> None:
    """Upload a checkpoint, whose ``files`` have these sha256, and the run's logs with it. Raise
    InputError if another process has written the same one.
    """
    run, step = checkpoint.parents[1], checkpoint.name
    if (store := store_of(run)) is None:
        return
    folder = f"checkpoints/{step}-{new_attempt()}"
    for name in files:
        store.upload(checkpoint / name, f"{folder}/{name}")
    _upload_files(run, store, except_names=(*MARKS_FINISHED, RUN_FILE))
    _create_or_refuse(store, _commit_record(step), seal({"folder": folder, "files": files}))
    store.upload(run / RUN_FILE, RUN_FILE)  # from now on it says that there are checkpoints


def remove_other_checkpoints(newest: Path, keep: int, best: str | None) -> None:
    """Keep the last ``keep`` checkpoints and ``best`` in the store; remove the others, and what
    killed uploads have left.
    """
    if (store := store_of(newest.parents[1])) is None:
        return
    kept_folders, steps = set[str](), _committed_checkpoints(store)
    for step in steps:
        if step in steps[-keep:] or step == best:
            kept_folders.add(read_sealed(store, _commit_record(step))["folder"])
        else:
            # before its files, so that an incomplete one never counts
            store.discard(_commit_record(step))
    for folder in store.folders("checkpoints"):
        if f"checkpoints/{folder}" not in kept_folders:
            for name in store.names(f"checkpoints/{folder}"):
                store.discard(f"checkpoints/{folder}/{name}")


def upload_finished(run: Path) -> None:
    """Upload the finished run; the files that mark it as finished come last."""
    if (store := store_of(run)) is not None:
        _upload_files(run, store, except_names=MARKS_FINISHED)
        for name in MARKS_FINISHED:
            store.upload(run / name, name)


def _create_or_refuse(store: ObjectStore, name: str, content: bytes) -> None:
    """Create an object; raise InputError if another process has."""
    is_created = store.create(name, content)
    # Equal content: a repeated request of this process.
    if not is_created and store.read_bytes(name) != content:
        raise in_use_error(store.location)


def _upload_files(run: Path, store: ObjectStore, except_names: Collection[str]) -> None:
    # "[1-9]_*": the modules of a sentence encoder
    patterns = ("*", "tensorboard/*", "wandb/*/**/*", "[1-9]_*/*")
    for file in sorted(file for pattern in patterns for file in run.glob(pattern)):
        if (
            file.is_file()
            and not file.is_symlink()
            and file.name[0] != "."
            and file.name not in except_names
        ):
            store.upload(file, str(file.relative_to(run)))
