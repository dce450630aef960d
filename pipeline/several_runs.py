"""Several runs in one folder: the record of each, and which of them are finished.

OUT/stages.json or OUT/sweep.json   the definition: every run's configuration
OUT/NAME/                           a run as ``pipeline train-student`` leaves it
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rekindle.data.corpus.additions import is_same_source
from rekindle.data.errors import CheckpointError, InputError
from rekindle.data.former import with_defaults, with_every_key
from rekindle.data.settings import changeable_keys, sections_in
from rekindle.data.storage.store import open_store
from rekindle.pipeline.config import RunConfig
from rekindle.train.record.run_folder import (
    LOCK_FILE,
    check_new,
    check_same_settings,
    read_record,
    reading_record,
)

RUN_FILE, STAGES_FILE, SWEEP_FILE = "run.json", "stages.json", "sweep.json"
# The files that define several runs in a store, with the endings of files that nobody continues
# from once a run is finished.
DEFINITIONS = {STAGES_FILE: (), SWEEP_FILE: (".safetensors",)}
SECTIONS = ("student", "train")  # of a run's configuration: they identify the student
Recorded = Mapping[str, Mapping[str, Any]]  # each run's record, by name


def read_runs(directory: Path, file: str) -> Recorded | None:
    """Return each run's entry in the definition ``file`` of ``directory``; None if there is none.

    Raise CheckpointError if it is damaged.
    """
    path, advice = directory / file, "start again in another --out"
    if (definition := read_record(path, advice)) is None:
        return None
    with reading_record(path, advice):
        if file == STAGES_FILE:
            return {str(stage["name"]): dict(stage) for stage in definition["stages"]}
        corpus, runs = definition["corpus"], definition["runs"]
        if not isinstance(corpus, str) or any("values" not in run for run in runs):
            raise ValueError("it has not the keys of a sweep")
        sections = {run["name"]: {key: dict(run[key]) for key in SECTIONS} for run in runs}
        return {name: {"corpus": corpus, **run_sections} for name, run_sections in sections.items()}


def check_same_runs(
    out: Path,
    recorded_runs: Recorded,
    requested_runs: Recorded,
    unknown_run: str,
    rule: str,
    configs: Mapping[str, RunConfig],
) -> None:
    """Raise CheckpointError unless ``requested_runs`` are the ``recorded_runs``, perhaps with more.

    ``unknown_run`` describes a run ``{name}`` that is not among them; ``rule`` says what to do.
    ``configs``: the full configurations of ``requested_runs``.
    """
    for name, recorded in recorded_runs.items():
        if name not in requested_runs:
            raise CheckpointError(f"{out} {unknown_run.format(name=name)}. {rule}")
        changeable = _changeable_keys(out / name, recorded, configs[name])
        requested = _with_every_key(requested_runs[name])
        recorded_values = _without_old_keys(
            _with_every_key(with_defaults(RunConfig, recorded)), requested
        )
        check_same_settings(out / name, recorded_values, requested, rule, changeable)


def _with_every_key(settings: Mapping[str, Any]) -> dict[str, Any]:
    completed = dict(settings)
    for key in SECTIONS:
        if isinstance(completed.get(key), Mapping):
            (section,) = sections_in(RunConfig.model_fields[key].annotation)
            completed[key] = with_every_key(section, completed[key])
    return completed


def _without_old_keys(recorded: Mapping[str, Any], requested: Mapping[str, Any]) -> dict[str, Any]:
    """Return the recorded sections without keys that only an older version has."""
    kept = {key: recorded.get(key) for key in requested}
    for key, section in requested.items():
        if isinstance(section, Mapping) and isinstance(recorded_section := kept[key], Mapping):
            kept[key] = {name: recorded_section.get(name) for name in section}
    return kept


def _changeable_keys(run: Path, recorded: Mapping[str, Any], config: RunConfig) -> list[str]:
    """Return the keys of a run that may differ from the record: those that only say how it is made,
    and the paths of a student and of a corpus source that have moved.
    """
    keys, student, corpus = [*changeable_keys(config)], config.student, recorded.get("corpus")
    if isinstance(corpus, Mapping) and corpus.get("source") != [*config.corpus.source]:
        is_same = is_same_source(open_store(config.cache.path), config.corpus.entries)
        keys += ["corpus.source"] * is_same
    if student is None or (recorded.get("student") or {}).get("model") == student.model:
        return keys
    from rekindle.train.record.identity import began_with_student

    return [*keys, "student.model"] if began_with_student(run, student) else keys


def begun_in(out: Path) -> str | None:
    """Return the file that says what was begun in ``out``; None if nothing was."""
    files = (RUN_FILE, STAGES_FILE, SWEEP_FILE)
    return next((name for name in files if (out / name).is_file()), None)


def check_room(out: Path) -> None:
    """Raise InputError if ``out`` already holds something, before any expensive check."""
    file = begun_in(out) or RUN_FILE
    check_new(out, file, {STAGES_FILE: "run of stages", SWEEP_FILE: "sweep"}.get(file, "run"))


def check_begun(out: Path) -> None:
    """Raise InputError if nothing was begun in ``out``: a mistyped directory must not become a new
    run.
    """
    # the lock of a run that is just beginning
    if begun_in(out) is None and not (out / LOCK_FILE).exists():
        reason = "there is no such directory" if not out.exists() else "nothing was begun in it"
        raise InputError(
            f"--resume: nothing to go on with in {out} ({reason}). Leave --resume out to "
            "begin, or give the --out that the run was begun with"
        )


def is_finished(directory: Path, model: bool = True) -> bool:
    """Return whether ``directory`` has everything a finished run leaves; its run.yaml is written
    last. Without ``model``, the student itself may be gone, for instance if no other run needs it.
    """
    from rekindle.train.record.identity import is_finished as has_ended

    return (directory / "run.yaml").is_file() and has_ended(directory, model)
