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
from rekindle.data.former import with_defaults, with_every_key, with_recorded_defaults
from rekindle.data.settings import Settings, changeable_keys
from rekindle.data.storage.atomic import write_json
from rekindle.data.targets.reading.extent import Extent
from rekindle.train.config import STEPS_ONCE, StudentConfig, TrainConfig
from rekindle.train.measures import EVALUATION_SECTION, EVALUATION_VERSION, evaluation_version_of
from rekindle.train.method import find_method
from rekindle.train.model.files import config_fingerprint, weights_fingerprint
from rekindle.train.model.folder import ADAPTER_FILE, CONFIG_FILE, resolve_model
from rekindle.train.model.unfinished import RUN_FILE, SUMMARY_FILE
from rekindle.train.record.run_folder import (
    check_same_settings,
    is_continued,
    read_record,
    reading_record,
)
from rekindle.train.step_config import LENGTH_SECTION, recorded_steps
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
AnySettings = TypeVar("AnySettings", bound=Settings)  # with the sections of a run


def student_files(config: StudentConfig) -> dict[str, str]:
    """Return the fingerprints of the files the student starts from, wherever they are."""
    directory = resolve_model(config.model)
    fingerprints = {"config": config_fingerprint(directory)}
    return (
        fingerprints
        if config.from_scratch
        else fingerprints | {"weights": weights_fingerprint(directory)}
    )


def begin_record(run: Path, about: About) -> None:
    """Write what the run is; for a resumed one, add what an older version did not record."""
    recorded = read_record(run / RUN_FILE, START_AGAIN) or {}
    if recorded.get("version") != VERSION:
        cache = {**about["cache"], **recorded.get("cache", {})}
        not_yet = {} if recorded else {CHECKPOINTED: False}  # an older run did not record it
        values = {**about, **recorded, **not_yet, "cache": cache, "version": VERSION}
        write_json(run / RUN_FILE, values)


def note_checkpoint(run: Path) -> None:
    """Record, once, that the run in ``run`` has written a checkpoint."""
    record = _read_run_record(run)
    if record is not None and not record.get(CHECKPOINTED):
        write_json(run / RUN_FILE, record | {CHECKPOINTED: True})


def had_checkpoint(run: Path, steps: int) -> bool:
    """Return whether the run in ``run`` has ever written a checkpoint.

    If its record does not say so: whether it must have, judged by the ``steps`` it has taken and
    the ``checkpoint_every`` it was begun with.
    """
    record = _read_run_record(run) or {}
    with reading_record(run / RUN_FILE, START_AGAIN):
        if CHECKPOINTED in record:
            return bool(record[CHECKPOINTED])
        every = record.get("train", {}).get("checkpoint_every", STEPS_ONCE)
        return steps > int(every)


def recorded_extent(run: Path) -> Extent:
    """Return how much of the cache the run in ``run`` reads, as far as recorded."""
    record = _read_run_record(run)
    with reading_record(run / RUN_FILE, START_AGAIN):
        cache = (record or {}).get("cache", {})
        return Extent.model_validate({key: cache[key] for key in EXTENT if key in cache})


def evaluation_version_of_run(run: Path) -> int:
    """Return the evaluation version of the run in ``run``; the newest if there is none."""
    record = _read_run_record(run)
    with reading_record(run / RUN_FILE, START_AGAIN):
        return EVALUATION_VERSION if record is None else evaluation_version_of(record)


def steps_of_run(run: Path) -> int | None:
    """Return how many steps the run in ``run`` has; None if there is none."""
    record = _read_run_record(run)
    with reading_record(run / RUN_FILE, START_AGAIN):
        return None if record is None else recorded_steps(record)


def check_corpus_not_grown(run: Path, corpus: Corpus) -> None:
    """Raise CheckpointError if the corpus of the run in ``run`` has grown to ``corpus``: other
    sequences would be trained on and held out.
    """
    record = _read_run_record(run) or {}
    with reading_record(run / RUN_FILE, START_AGAIN):
        first_corpus = record.get("cache", {}).get("corpus")
    if first_corpus not in corpus.fingerprints_before:
        return
    way_out = _way_out(run, {"student": record.get("student", {})})
    if not is_finished(run):
        way_out = (
            f"{START_AGAIN[0].upper()}{START_AGAIN[1:]}, or resume this one with a copy of the "
            "cache as it was then (--set cache.path=COPY)"
        )
    raise CheckpointError(
        f"the corpus of the cache {corpus.store.location} has grown since {run} was begun, so its "
        f"training sequences would change. {way_out}"
    )


def with_former_defaults(config: AnySettings, run: Path) -> AnySettings:
    """Return ``config`` with the former defaults that the run in ``run`` was begun with."""
    record = _read_run_record(run) or {}
    with reading_record(run / RUN_FILE, START_AGAIN):
        return with_recorded_defaults(config, record)


def check_run(run: Path, about: About, resume: bool, free: Collection[str] = ()) -> bool:
    """Return whether ``run`` holds the run ``about``, to be continued; False if it is free.

    The ``free`` keys may differ. Raises InputError if the directory is used for something else, or
    for a run that is not to be resumed; CheckpointError, naming the key, if it holds another run.
    """
    if not is_continued(run, RUN_FILE, "run", resume):
        return False
    with reading_record(run / RUN_FILE, START_AGAIN):
        record = _read_run_record(run) or {}
        current = {
            name: _with_defaults(name, section) if name in SECTIONS else dict(section)
            for name, section in about.items()
        }
        completed = {
            name: _with_defaults(name, record[name]) for name in current if name in SECTIONS
        }
        completed["cache"] = {
            key: current["cache"][key] for key in EXTENT if key in current["cache"]
        }
        completed["cache"] |= record["cache"]
        files = current.get(STUDENT_FILES, {})
        completed[STUDENT_FILES] = record.get(STUDENT_FILES, files)
        completed[EVALUATION_SECTION] = record.get(EVALUATION_SECTION, {})
        completed[LENGTH_SECTION] = record.get(LENGTH_SECTION, current.get(LENGTH_SECTION, {}))
        # Keys that only the record has come from an older version.
        comparable = {name: {k: completed[name].get(k) for k in current[name]} for name in current}
    if STUDENT_FILES in current:
        _check_student_files(run, comparable[STUDENT_FILES], current)
    # Compare the student by content; if that is not recorded, by place.
    compared_by_content = ("student.model",) if record.get(STUDENT_FILES) else ()
    check_same_settings(
        run,
        comparable,
        current,
        _way_out(run, current),
        (*free, *FREE_OF_CACHE, *compared_by_content),
    )
    return True


def _check_student_files(run: Path, recorded: About, current: About) -> None:
    differing = [
        name for name, digest in current[STUDENT_FILES].items() if recorded.get(name) != digest
    ]
    if differing:
        raise CheckpointError(
            f"{run} was begun with another student: of student.model {current['student']['model']} "
            f"the {' and the '.join(differing)} differ from those it began with. "
            f"{_way_out(run, current)}"
        )


def began_with_student(run: Path, config: StudentConfig) -> bool:
    """Return whether the run in ``run`` records that its student began with these files."""
    files = (_read_run_record(run) or {}).get(STUDENT_FILES)
    return bool(files) and files == student_files(config)


def keys_that_may_change(
    student: StudentConfig, train: TrainConfig, has_load_balancing: bool = False
) -> list[str]:
    """Return the dotted keys of a run's record that may differ when it is resumed.

    ``has_load_balancing``: the student has a load-balancing loss, which is not a sum over
    sequences: its value depends on what is in one forward pass.
    """
    sections = {"student": student, "train": train}
    keys = [f"{name}.{key}" for name, one in sections.items() for key in changeable_keys(one)]
    return [
        key for key in keys if not (has_load_balancing and key == "train.micro_batch_sequences")
    ]


def _way_out(run: Path, current: About) -> str:
    if not is_finished(run):
        return "Resume it with its own configuration, or start a new run in another --out"
    from_scratch_advice = (
        " and student.from_scratch: false" if current["student"].get("from_scratch") else ""
    )
    return (
        "It is finished. To train its student further, start a new run in another --out with "
        f"student.model: {run}{from_scratch_advice}"
    )


def _read_run_record(run: Path) -> dict[str, Any] | None:
    record = read_record(run / RUN_FILE, START_AGAIN)
    if record is not None and (version := record.get("version", 1)) not in range(1, VERSION + 1):
        raise CheckpointError(
            f"{run / RUN_FILE} has version {version!r}; this version of Rekindle reads up to "
            f"{VERSION}. Use the newer Rekindle that began the run, or {START_AGAIN}"
        )
    return record


def _with_defaults(section: str, recorded: About) -> About:
    """Return a recorded section with defaults for keys that are younger than the run; methods have
    their own.
    """
    values = with_every_key(SECTIONS[section], with_defaults(SECTIONS[section], recorded))
    if section == "train":
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
    settings = any((run / name).is_file() for name in (CONFIG_FILE, ADAPTER_FILE))
    weights = settings and any(run.glob("*.safetensors"))
    return (weights or not model) and all((run / name).is_file() for name in files)
