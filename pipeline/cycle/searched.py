"""The search over fine-tuning settings: what each arm tried on dev, and whether all were alike.

The points are planned in ``config.search_points``, run as jobs of ``jobs``, and the best on dev is
used by ``job_functions.fine_tune``. If labels are drawn several times, the first draw's search is
also written to OUT/search.json, so that a folder on another machine can use it.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

from rekindle.data.corpus.additions import read_additions
from rekindle.data.errors import CheckpointError, InputError
from rekindle.data.former import with_defaults
from rekindle.data.settings import parse_settings
from rekindle.data.source.source_states import find_present, states_of
from rekindle.data.storage.store import open_store
from rekindle.pipeline.compare.runs import CYCLE_FILE, is_cycle
from rekindle.pipeline.cycle.config import CycleConfig
from rekindle.pipeline.cycle.finetuned import (
    FineTuned,
    Grid,
    finetuned_of,
    read_finetuned,
    read_json,
)
from rekindle.pipeline.cycle.sections import point_name
from rekindle.train.finetune.result import RESULT_FILE
from rekindle.train.record.run_folder import differences

DRAWS_FOLDER = "draws"  # in a cycle's folder: a cycle for each draw of the labels, by number
FIRST_DRAW = 0
SEARCH_FILE = "search.json"  # in a cycle's folder: the search of its first draw
TAKEN_FILE = "taken.json"  # in search/: the tasks whose search was made elsewhere, and its file
WRITER = "rekindle search"
_EQUAL = 1e-9  # difference of two means below which only rounding decides


@dataclass(frozen=True)
class Tried:
    """One point of a search: the settings, and the main metric on dev by seed."""

    settings: dict[str, object]
    seeds: list[int]
    dev_scores: list[float]
    mean: float


@dataclass(frozen=True)
class Searched:
    """A search over fine-tuning settings; ``chosen`` is None before the arm is fine-tuned."""

    arm: str
    task: str
    tried: list[Tried]
    chosen: dict[str, object] | None


def points_of(grid: Grid) -> list[tuple[object, ...]]:
    """Return all combinations of the values, in the order of the grid; empty without a grid."""
    return list(product(*grid.values())) if grid else []


def search_home(out: Path) -> Path:
    """Return the folder whose search the cycle in ``out`` uses: for several draws of the labels,
    the first one's, which serves all.
    """
    draws = out.absolute().parent
    drawn = draws.name == DRAWS_FOLDER and is_cycle(draws.parent)
    return draws / str(FIRST_DRAW) if drawn else out


def read_search(out: Path, arm: str, task: str, grid: Grid) -> list[FineTuned]:
    """Return what the arm has tried so far, in the order of the grid.

    Raise CheckpointError for what is damaged, or not of this grid.
    """
    points = points_of(grid)
    home = out / "search" / arm / task
    folders = sorted(path for path in home.glob("*") if path.is_dir() and path.name[0] != ".")
    found: dict[tuple[object, ...], FineTuned] = {}
    for folder in folders if points else []:
        one = read_finetuned(out, str(folder.relative_to(out)), arm, task)
        if one is None:
            continue
        point = one.point(grid)
        if point not in points or point in found:
            raise CheckpointError(
                f"{folder} has tried {_told(grid, point)}, which does not belong to this search "
                "or is there twice: every arm tries the same settings, each once; remove the "
                "folder and resume"
            )
        found[point] = one
    return [found[point] for point in points if point in found]


def check_search(
    out: Path, grid: Grid, tried: Sequence[FineTuned], final: Mapping[str, FineTuned]
) -> None:
    """Raise CheckpointError if an arm of a task lacks a part of its search, or did not use its
    best.

    ``tried``: of all arms, see ``read_search``; ``final``: by arm, the fine-tuning with the chosen
    settings.
    """
    points, searched = points_of(grid), search_home(out) / "search"
    for arm, one in final.items() if len(points) > 1 else ():
        dev = {other.point(grid): fmean(other.dev) for other in tried if other.arm == arm}
        if missing := [point for point in points if point not in dev]:
            raise CheckpointError(
                f"{out / one.folder} exists, but its search in {searched / arm / one.task} lacks "
                f"{_told(grid, missing[0])}, so the arms were not searched in the same way; "
                "remove the first and resume"
            )
        taken = one.point(grid)
        if dev.get(taken, float("-inf")) < max(dev.values()) - _EQUAL:
            raise CheckpointError(
                f"{out / one.folder} has {_told(grid, taken)}, which is not what its search in "
                f"{searched / arm / one.task} found best on dev; remove it and resume"
            )


def searched_of(
    arm: str, task: str, grid: Grid, tried: Sequence[FineTuned], final: FineTuned | None
) -> Searched:
    """Return an arm's search on a task, for display."""
    points = [Tried(_settings(grid, one), one.seeds, one.dev, fmean(one.dev)) for one in tried]
    return Searched(arm, task, points, _settings(grid, final) if final else None)


def _settings(grid: Grid, one: FineTuned) -> dict[str, object]:
    return dict(zip(grid, one.point(grid), strict=True))


def _told(grid: Grid, point: Sequence[object]) -> str:
    return ", ".join(f"{key} {value}" for key, value in zip(grid, point, strict=True))


# --- elsewhere ------------------------------------------------------------------------------------

# Keys that may differ in another folder: places (their content is compared), and keys that only
# affect rounding and the drawn dropout. Arms may be fewer.
_FREE = (
    *("about", "arms", "label_draws", "cache.path", "corpus.on_bad_record"),
    *("corpus.tokenizer", "student.model", "experts.model", "train.micro_batch_sequences"),
)
_FREE_OF_TASK = ("about", "train", "dev", "test")
_FACTS = ("metric", "regression", "pairs", "train", "dev", "test")


def packed(home: Path) -> dict[str, Any] | None:
    """Return the finished searches of the cycle in ``home``, by task, with everything they depend
    on; None if there are none.
    """
    about = read_json(home / CYCLE_FILE)
    grid: Grid = (about or {}).get("search") or {}
    if about is None or len(points_of(grid)) < 2 or "start" not in about:  # of older versions
        return None
    config = parse_settings(CycleConfig, about["settings"], str(home / CYCLE_FILE))
    texts, found = {}, {}
    for task in about["tasks"]:
        text = task if task in config.texts else ""
        states = _states(home, config, text)
        ones = {arm: _as_left(home, read_search(home, arm, task, grid)) for arm in about["arms"]}
        if states is not None and all(len(of) == len(points_of(grid)) for of in ones.values()):
            texts[text], found[task] = states, ones
    about = about | {"settings": without_cache(about["settings"])}
    whole = {"written_by": WRITER, "about": about, "texts": texts, "search": found}
    return whole if found else None


def _as_left(home: Path, tried: Sequence[FineTuned]) -> list[dict[str, Any]]:
    """Return the files of what was tried, without the course of the epochs and without paths."""
    found = []
    for one in tried:
        values = read_json(home / one.folder / RESULT_FILE) or {}
        per_seed = [seed | {"epochs": []} for seed in values["per_seed"]]
        places = {"model": Path(one.model).name, "files": one.splits}
        found.append(values | {"per_seed": per_seed} | places)
    return found


def _states(home: Path, config: CycleConfig, text: str) -> list[list[int | str]] | None:
    """Return which files a cached text was read from, by content; None without a cache."""
    for place in (config.cache_of(text).path, str(home / "cache" / text)):
        if additions := read_additions(open_store(place))[0]:
            return sorted(additions[-1].sources.values(), key=str)
    return None


def without_cache(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return a cycle's settings without the path of its cache, which belongs to one machine."""
    return {**settings, "cache": {**settings.get("cache", {}), "path": ""}}


def read_search_file(file: Path) -> dict[str, Any]:
    """Return what ``packed`` gave, from its file. Raise InputError for anything else."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if found["written_by"] != WRITER:
            raise ValueError(f"written by {found['written_by']!r}")
        parts = (found["about"]["settings"], found["about"]["tasks"], found["about"]["start"])
        if not all(isinstance(one, dict) for one in (*parts, found["texts"], found["search"])):
            raise TypeError("its parts are not objects")
        return dict(found)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{file} is not the search of a cycle ({error}); give the {SEARCH_FILE} in the folder "
            "of one"
        ) from None


def to_take_over(
    file: Path, home: Path, config: CycleConfig, about: Mapping[str, Any], only: str
) -> dict[Path, dict[str, Any]]:
    """Return the files to write into ``home``, the first draw's folder, to take over the search in
    ``file``, which the same cycle made elsewhere: that of the task ``only``, or of all its tasks.

    ``config`` and ``about`` belong to the first draw here. Raise InputError for a file that is
    damaged or of another cycle, for arms that it lacks, and if the first draw has searched here and
    found something else.
    """
    record = read_search_file(file)
    if len(config.search_points()) < 2:
        raise InputError(f"--searched {file}: nothing is searched here: `search` has no two points")
    tasks = [t.name for t in config.tasks if t.name in record["search"] and only in ("", t.name)]
    if not tasks:
        has = ", ".join(record["search"])
        raise InputError(f"{file} has no search of {only or 'a task here'} (it has: {has})")
    texts = {text: states_of(find_present(config.text_of(text).entries)) for text in config.texts}
    here = {"texts": {text: sorted(of.values(), key=str) for text, of in texts.items()}}
    check_of_one_cycle(str(file), record, here | {"about": about})
    lacking, whose = dict[Path, dict[str, Any]](), taken_from(home)
    for task, arm, point in product(tasks, config.arms, config.search_points()):
        values = _tried_at(file, record, arm, task, config, point)
        path = home / "search" / arm / task / point_name(point) / RESULT_FILE
        there = read_json(path)
        if there is None:
            lacking[path], whose[task] = values, str(file)
        elif _as_compared(there) != _as_compared(values):
            raise InputError(
                f"{path} exists and differs from {file}: a search can only be taken over where "
                "none was made. Leave out --searched, or give another --out"
            )
    said: dict[Path, dict[str, Any]] = {home / "search" / TAKEN_FILE: dict(whose)}
    return said | lacking if lacking else {}  # the record of the source comes first


def _tried_at(
    file: Path,
    record: Mapping[str, Any],
    arm: str,
    task: str,
    config: CycleConfig,
    point: Mapping[str, object],
) -> dict[str, Any]:
    """Return a file's entry for a point of the search, as in metrics.json."""
    grid, seeds = config.search, [*config.seeds_of_search]
    try:
        for values in record["search"][task].get(arm, ()):
            one = finetuned_of(values, f"search/{arm}/{task}", arm, task)
            if one.point(grid) == tuple(point.values()) and one.seeds == seeds:
                return dict(values)
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{file} is damaged: {arm} on {task} {error}") from None
    told = ", ".join(f"{key} {value}" for key, value in point.items())
    raise InputError(
        f"{file} lacks {told} of {arm} on {task}: every arm must be searched in the same way. "
        "Leave the arm out, or run --draw 0 here"
    )


def _as_compared(values: Mapping[str, Any]) -> object:
    return values["config"], [(one["seed"], one["scores"]) for one in values["per_seed"]]


def taken_from(home: Path) -> dict[str, str]:
    """Return the tasks whose search a folder has taken over, with the file it came from."""
    return read_json(home / "search" / TAKEN_FILE) or {}


def check_of_one_cycle(where: str, one: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    """Raise InputError, naming the key, if two searches depend on different settings, rows, start
    models or texts.
    """
    texts = {*one["texts"]} & {*other["texts"]}
    files = {text for text in texts if one["texts"][text] and other["texts"][text]}
    before, now = (_compared(each, texts, files) for each in (one, other))
    for key, (there, here) in differences([before, now], items=True).items():
        raise InputError(
            f"{where} belongs to another cycle: {key} is {there!r} there, but {here!r} here. A "
            "search can be taken over only if settings, labelled rows, start model and text are "
            "the same"
        )


def _compared(
    one: Mapping[str, Any], texts: Collection[str], files: Collection[str]
) -> dict[str, Any]:
    """Return what is compared. ``files``: the ``texts`` made from files, which may be anywhere."""
    about = one["about"]
    rows = {
        name: {key: facts[key] for key in _FACTS} | {"files": sorted(facts["files"].values())}
        for name, facts in about["tasks"].items()
    }
    found = {"settings": decisive(about["settings"], files), "tasks": rows, "start": about["start"]}
    found["text"] = {text: [*map(list, one["texts"][text])] for text in texts}
    return found


def decisive(settings: Mapping[str, Any], files: Collection[str]) -> dict[str, Any]:
    """Return the settings that a cycle's scores depend on, with its tasks by name.

    Leaves out where things are, the text of ``files``, and the arms, as there may be more.
    """
    found: dict[str, Any] = json.loads(json.dumps(with_defaults(CycleConfig, settings)))
    found["tasks"] = {task["name"]: task for task in found["tasks"]}
    for name, task in found["tasks"].items():
        _drop(task, (*_FREE_OF_TASK, *["corpus.source"] * (name in files)))
    _drop(found, (*_FREE, *["corpus.source"] * ("" in files)))
    return found


def _drop(section: dict[str, Any], keys: Sequence[str]) -> None:
    for key in keys:
        *outer, last = key.split(".")
        inner: Any = section
        for part in outer:
            inner = inner.get(part) or {}
        inner.pop(last, None)
