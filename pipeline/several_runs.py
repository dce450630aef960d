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
    if (found := read_record(path, advice)) is None:
        return None
    with reading_record(path, advice):
        if file == STAGES_FILE:
            return {str(stage["name"]): dict(stage) for stage in found["stages"]}
        corpus, runs = found["corpus"], found["runs"]
        if not isinstance(corpus, str) or any("values" not in run for run in runs):
            raise ValueError("it has not the keys of a sweep")
        sections = {run["name"]: {key: dict(run[key]) for key in SECTIONS} for run in runs}
        return {name: {"corpus": corpus, **ones} for name, ones in sections.items()}


def check_same_runs(
    out: Path,
    before: Recorded,
    now: Recorded,
    stranger: str,
    rule: str,
    configs: Mapping[str, RunConfig],
) -> None:
    """Raise CheckpointError unless the runs ``now`` are those begun ``before``, possibly with more.

    ``stranger`` describes a run ``{name}`` that is not among them; ``rule`` says what to do.
    ``configs``: the full configurations of the runs ``now``.
    """
    for name, recorded in before.items():
        if name not in now:
            raise CheckpointError(f"{out} {stranger.format(name=name)}. {rule}")
        free = _may_change(out / name, recorded, configs[name])
        here = _with_every_key(now[name])
        begun = _known(_with_every_key(with_defaults(RunConfig, recorded)), here)
        check_same_settings(out / name, begun, here, rule, free)


def _with_every_key(settings: Mapping[str, Any]) -> dict[str, Any]:
    found = dict(settings)
    for key in SECTIONS:
        if isinstance(found.get(key), Mapping):
            (section,) = sections_in(RunConfig.model_fields[key].annotation)
            found[key] = with_every_key(section, found[key])
    return found


def _known(recorded: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """Return the recorded sections without keys that only an older version has."""
    found = {key: recorded.get(key) for key in now}
    for key, here in now.items():
        if isinstance(here, Mapping) and isinstance(there := found[key], Mapping):
            found[key] = {name: there.get(name) for name in here}
    return found


def _may_change(run: Path, recorded: Mapping[str, Any], config: RunConfig) -> list[str]:
    """Return the keys of a run that may differ from the record: those that only say how it is made,
    and the paths of a student and of a corpus source that have moved.
    """
    keys, student, corpus = [*changeable_keys(config)], config.student, recorded.get("corpus")
    if isinstance(corpus, Mapping) and corpus.get("source") != [*config.corpus.source]:
        same = is_same_source(open_store(config.cache.path), config.corpus.entries)
        keys += ["corpus.source"] * same
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
        there = "there is no such directory" if not out.exists() else "nothing was begun in it"
        raise InputError(
            f"--resume: nothing to go on with in {out} ({there}). Leave --resume out to "
            "begin, or give the --out that the run was begun with"
        )


def is_finished(directory: Path, model: bool = True) -> bool:
    """Return whether ``directory`` has everything a finished run leaves; its run.yaml is written
    last. Without ``model``, the student itself may be gone, for instance if no other run needs it.
    """
    from rekindle.train.record.identity import is_finished as has_ended

    return (directory / "run.yaml").is_file() and has_ended(directory, model)
