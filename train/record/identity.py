"""A training run's identity in ``run.json``: whether it may continue, and whether it is finished.

Version 1 (without a number) did not record how much of the cache is read or the student's files; if
they are missing, the present state is assumed. Version 2 did not record the rule for measuring
held-out values (``measures``).
"""

import logging
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from rekindle.data.corpus.corpus import Corpus
from rekindle.data.errors import CheckpointError, InputError
from rekindle.data.former import with_defaults, with_every_key, with_former_defaults
from rekindle.data.settings import Settings, free_keys
from rekindle.data.storage.atomic import write_json
from rekindle.data.targets.reading.extent import Extent
from rekindle.train.config import STEPS_ONCE, StudentConfig, TrainConfig
from rekindle.train.measures import MEASURE, SECTION, measure_of
from rekindle.train.method import find_method
from rekindle.train.model.files import config_fingerprint, weights_fingerprint
from rekindle.train.model.folder import ADAPTER_FILE, SETTINGS_FILE, resolve_model
from rekindle.train.model.unfinished import RUN_FILE, SUMMARY_FILE
from rekindle.train.record.run_folder import check_same, goes_on, read_record, reading
from rekindle.train.step_config import LENGTH, recorded_steps
from rekindle.train.student import ABOUT_FILE

log = logging.getLogger("rekindle")

VERSION = 3
SECTIONS: dict[str, type[Settings]] = {"student": StudentConfig, "train": TrainConfig}
# The cache may have moved; its fingerprints show whether it is the same.
FREE_OF_CACHE = ("cache.path", "cache.teacher_seconds")
EXTENT = ("replicas", "targets")  # in the record's cache: how much of it is read
STUDENT_FILES = "student_files"
CHECKPOINTED = "checkpointed"  # whether the run has ever written a checkpoint
START_AGAIN = "start a new run in another --out"

About = Mapping[str, Any]
S = TypeVar("S", bound=Settings)  # with the sections of a run


def student_files(config: StudentConfig) -> dict[str, str]:
    """Return the fingerprints of the files the student starts from, wherever they are."""
    directory = resolve_model(config.model)
    found = {"config": config_fingerprint(directory)}
    return found if config.from_scratch else found | {"weights": weights_fingerprint(directory)}


def begin_record(run: Path, about: About) -> None:
    """Write what the run is; for a resumed one, add what an older version did not record."""
    before = read_record(run / RUN_FILE, START_AGAIN) or {}
    if before.get("version") != VERSION:
        cache = {**about["cache"], **before.get("cache", {})}
        begun = {} if before else {CHECKPOINTED: False}  # an older run did not record it
        values = {**about, **before, **begun, "cache": cache, "version": VERSION}
        write_json(run / RUN_FILE, values)


def note_checkpoint(run: Path) -> None:
    """Record, once, that the run in ``run`` has written a checkpoint."""
    found = _read(run)
    if found is not None and not found.get(CHECKPOINTED):
        write_json(run / RUN_FILE, found | {CHECKPOINTED: True})


def had_checkpoint(run: Path, steps: int) -> bool:
    """Return whether the run in ``run`` has ever written a checkpoint.

    If its record does not say so: whether it must have, judged by the ``steps`` it has taken and
    the ``checkpoint_every`` it was begun with.
    """
    found = _read(run) or {}
    with reading(run / RUN_FILE, START_AGAIN):
        if CHECKPOINTED in found:
            return bool(found[CHECKPOINTED])
        every = found.get("train", {}).get("checkpoint_every", STEPS_ONCE)
        return steps > int(every)


def recorded_extent(run: Path) -> Extent:
    """Return how much of the cache the run in ``run`` reads, as far as recorded."""
    found = _read(run)
    with reading(run / RUN_FILE, START_AGAIN):
        cache = (found or {}).get("cache", {})
        return Extent.model_validate({key: cache[key] for key in EXTENT if key in cache})


def measure_of_run(run: Path) -> int:
    """Return the rule by which the run in ``run`` measures held-out values; the newest if there is
    none.
    """
    found = _read(run)
    with reading(run / RUN_FILE, START_AGAIN):
        return MEASURE if found is None else measure_of(found)


def steps_of_run(run: Path) -> int | None:
    """Return how many steps the run in ``run`` has; None if there is none."""
    found = _read(run)
    with reading(run / RUN_FILE, START_AGAIN):
        return None if found is None else recorded_steps(found)


def refuse_grown(run: Path, corpus: Corpus) -> None:
    """Raise CheckpointError if the corpus of the run in ``run`` has grown to ``corpus``: other
    sequences would be trained on and held out.
    """
    found = _read(run) or {}
    with reading(run / RUN_FILE, START_AGAIN):
        before = found.get("cache", {}).get("corpus")
    if before not in corpus.fingerprints_before:
        return
    rule = _rule(run, {"student": found.get("student", {})})
    if not is_finished(run):
        rule = (
            f"{START_AGAIN[0].upper()}{START_AGAIN[1:]}, or resume this one with a copy of the "
            "cache as it was then (--set cache.path=COPY)"
        )
    raise CheckpointError(
        f"the corpus of the cache {corpus.store.location} has grown since {run} was begun, so its "
        f"training sequences would change. {rule}"
    )


def as_run_began(config: S, run: Path) -> S:
    """Return ``config`` with the former defaults that the run in ``run`` was begun with."""
    found = _read(run) or {}
    with reading(run / RUN_FILE, START_AGAIN):
        return with_former_defaults(config, found)


def check_run(run: Path, about: About, resume: bool, free: Collection[str] = ()) -> bool:
    """Return whether ``run`` holds the run ``about``, to be continued; False if it is free.

    The ``free`` keys may differ. Raises InputError if the directory is used for something else, or
    for a run that is not to be resumed; CheckpointError, naming the key, if it holds another run.
    """
    if not goes_on(run, RUN_FILE, "run", resume):
        return False
    with reading(run / RUN_FILE, START_AGAIN):
        found = _read(run) or {}
        now = {
            name: _with_defaults(name, section) if name in SECTIONS else dict(section)
            for name, section in about.items()
        }
        recorded = {name: _with_defaults(name, found[name]) for name in now if name in SECTIONS}
        recorded["cache"] = {key: now["cache"][key] for key in EXTENT if key in now["cache"]}
        recorded["cache"] |= found["cache"]
        files = now.get(STUDENT_FILES, {})
        recorded[STUDENT_FILES] = found.get(STUDENT_FILES, files)
        recorded[SECTION] = found.get(SECTION, {})
        recorded[LENGTH] = found.get(LENGTH, now.get(LENGTH, {}))
        # Keys that only the record has come from an older version.
        before = {name: {k: recorded[name].get(k) for k in now[name]} for name in now}
    if STUDENT_FILES in now:
        _check_student(run, before[STUDENT_FILES], now)
    # Compare the student by content; if that is not recorded, by place.
    moved = ("student.model",) if found.get(STUDENT_FILES) else ()
    check_same(run, before, now, _rule(run, now), (*free, *FREE_OF_CACHE, *moved))
    return True


def _check_student(run: Path, before: About, now: About) -> None:
    other = [name for name, digest in now[STUDENT_FILES].items() if before.get(name) != digest]
    if other:
        raise CheckpointError(
            f"{run} was begun with another student: of student.model {now['student']['model']} "
            f"the {' and the '.join(other)} differ from those it began with. {_rule(run, now)}"
        )


def began_with(run: Path, config: StudentConfig) -> bool:
    """Return whether the run in ``run`` records that its student began with these files."""
    files = (_read(run) or {}).get(STUDENT_FILES)
    return bool(files) and files == student_files(config)


def keys_that_may_change(
    student: StudentConfig, train: TrainConfig, balanced: bool = False
) -> list[str]:
    """Return the dotted keys of a run's record that may differ when it is resumed.

    ``balanced``: the student has a load-balancing loss, which is not a sum over sequences: its
    value depends on what is in one forward pass.
    """
    sections = {"student": student, "train": train}
    keys = [f"{name}.{key}" for name, one in sections.items() for key in free_keys(one)]
    return [key for key in keys if not (balanced and key == "train.micro_batch_sequences")]


def _rule(run: Path, now: About) -> str:
    if not is_finished(run):
        return "Resume it with its own configuration, or start a new run in another --out"
    begin = " and student.from_scratch: false" if now["student"].get("from_scratch") else ""
    return (
        "It is finished. To train its student further, start a new run in another --out with "
        f"student.model: {run}{begin}"
    )


def _read(run: Path) -> dict[str, Any] | None:
    found = read_record(run / RUN_FILE, START_AGAIN)
    if found is not None and (version := found.get("version", 1)) not in range(1, VERSION + 1):
        raise CheckpointError(
            f"{run / RUN_FILE} has version {version!r}; this version of Rekindle reads up to "
            f"{VERSION}. Use the newer Rekindle that began the run, or {START_AGAIN}"
        )
    return found


def _with_defaults(part: str, recorded: About) -> About:
    """Return a recorded section with defaults for keys that are younger than the run; methods have
    their own.
    """
    values = with_every_key(SECTIONS[part], with_defaults(SECTIONS[part], recorded))
    if part == "train":
        terms = values["objective"]["methods"]
        with suppress(InputError):  # the method does not exist here
            settings = [find_method(str(term["method"])).Settings for term in terms]
            values["objective"]["methods"] = list(map(with_defaults, settings, terms))
    return values


# --- finished -------------------------------------------------------------------------------------


def is_finished(run: Path, model: bool = True) -> bool:
    """Return whether the run has left everything a finished one leaves; its summary is written
    last.

    Without ``model`` the student itself may be missing, for example removed because no run needs
    it.
    """
    files = (SUMMARY_FILE, *((ABOUT_FILE,) if model else ()))
    settings = any((run / name).is_file() for name in (SETTINGS_FILE, ADAPTER_FILE))
    weights = settings and any(run.glob("*.safetensors"))
    return (weights or not model) and all((run / name).is_file() for name in files)
