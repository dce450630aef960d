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
    parse_finetuned,
    read_finetuned,
    read_json,
)
from rekindle.pipeline.cycle.sections import point_name
from rekindle.train.finetune.config import NOT_DECISIVE
from rekindle.train.finetune.result import RESULT_FILE
from rekindle.train.record.run_folder import differences

DRAWS_FOLDER = "draws"  # in a cycle's folder: a cycle for each draw of the labels, by number
FIRST_DRAW = 0
SEARCH_FILE = "search.json"  # in a cycle's folder: the search of its first draw
TAKEN_OVER_FILE = "taken.json"  # in search/: tasks whose search was made elsewhere, and its file
WRITER = "rekindle search"
_ROUNDING = 1e-9  # difference of two means below which only rounding decides


@dataclass(frozen=True)
class TriedPoint:
    """One point of a search: the settings, and the main metric on dev by seed."""

    settings: dict[str, object]
    seeds: list[int]
    dev_scores: list[float]
    mean: float


@dataclass(frozen=True)
class SearchResult:
    """A search over fine-tuning settings; ``chosen`` is None before the arm is fine-tuned."""

    arm: str
    task: str
    tried: list[TriedPoint]
    chosen: dict[str, object] | None


def grid_points(grid: Grid) -> list[tuple[object, ...]]:
    """Return all combinations of the values, in the order of the grid; empty without a grid."""
    return list(product(*grid.values())) if grid else []


def search_home(out: Path) -> Path:
    """Return the folder whose search the cycle in ``out`` uses: for several draws of the labels,
    the first one's, which serves all.
    """
    draws = out.absolute().parent
    is_draw = draws.name == DRAWS_FOLDER and is_cycle(draws.parent)
    return draws / str(FIRST_DRAW) if is_draw else out


def read_search(out: Path, arm: str, task: str, grid: Grid) -> list[FineTuned]:
    """Return what the arm has tried so far, in the order of the grid.

    Raise CheckpointError for what is damaged, or not of this grid.
    """
    points = grid_points(grid)
    home = out / "search" / arm / task
    folders = sorted(path for path in home.glob("*") if path.is_dir() and path.name[0] != ".")
    by_point: dict[tuple[object, ...], FineTuned] = {}
    for folder in folders if points else []:
        result = read_finetuned(out, str(folder.relative_to(out)), arm, task)
        if result is None:
            continue
        point = result.point(grid)
        if point not in points or point in by_point:
            raise CheckpointError(
                f"{folder} has tried {_describe_point(grid, point)}, which does not belong to "
                "this search or was tried twice: every arm tries the same settings, each once; "
                "remove the folder and resume"
            )
        by_point[point] = result
    return [by_point[point] for point in points if point in by_point]


def check_search(
    out: Path, grid: Grid, tried: Sequence[FineTuned], final: Mapping[str, FineTuned]
) -> None:
    """Raise CheckpointError if an arm's search on a task is incomplete, or the arm does not use the
    best settings that it found.

    ``tried``: the points of all arms, see ``read_search``; ``final``: by arm, the fine-tuning with
    the chosen settings.
    """
    points, searches = grid_points(grid), search_home(out) / "search"
    for arm, result in final.items() if len(points) > 1 else ():
        dev = {one.point(grid): fmean(one.dev) for one in tried if one.arm == arm}
        search = searches / arm / result.task
        if missing := [point for point in points if point not in dev]:
            raise CheckpointError(
                f"{out / result.folder} exists, but its search in {search} lacks "
                f"{_describe_point(grid, missing[0])}, so the arms were not searched in the same "
                "way; remove the first and resume"
            )
        used = result.point(grid)
        if dev.get(used, float("-inf")) < max(dev.values()) - _ROUNDING:
            raise CheckpointError(
                f"{out / result.folder} has {_describe_point(grid, used)}, which is not what its "
                f"search in {search} found best on dev; remove it and resume"
            )


def search_result(
    arm: str, task: str, grid: Grid, tried: Sequence[FineTuned], final: FineTuned | None
) -> SearchResult:
    """Return an arm's search on a task, for display."""
    points = [TriedPoint(_settings(grid, one), one.seeds, one.dev, fmean(one.dev)) for one in tried]
    return SearchResult(arm, task, points, _settings(grid, final) if final else None)


def _settings(grid: Grid, one: FineTuned) -> dict[str, object]:
    return dict(zip(grid, one.point(grid), strict=True))


def _describe_point(grid: Grid, point: Sequence[object]) -> str:
    return ", ".join(f"{key} {value}" for key, value in zip(grid, point, strict=True))


# --- searches made in another folder --------------------------------------------------------------

# Keys that may differ in another folder: paths (the content of the files is compared), and keys
# that only affect rounding and the random dropout, or nothing. It may also have fewer arms.
_IGNORED_KEYS = (
    *("about", "arms", "label_draws", "cache.path", "corpus.on_bad_record"),
    *("corpus.tokenizer", "student.model", "experts.model", "train.micro_batch_sequences"),
    *(f"finetune.{NOT_DECISIVE}", f"experts.finetune.{NOT_DECISIVE}"),
)
_IGNORED_TASK_KEYS = ("about", "train", "dev", "test", f"finetune.{NOT_DECISIVE}")
_COMPARED_FACTS = ("metric", "regression", "pairs", "train", "dev", "test")


def export_searches(home: Path) -> dict[str, Any] | None:
    """Return the content of search.json: the finished searches of the cycle in ``home``, by task,
    with everything they depend on; None if there are none.
    """
    about = read_json(home / CYCLE_FILE)
    grid: Grid = (about or {}).get("search") or {}
    if about is None or len(grid_points(grid)) < 2 or "start" not in about:  # of older versions
        return None
    config = parse_settings(CycleConfig, about["settings"], str(home / CYCLE_FILE))
    texts, searches = {}, {}
    for task in about["tasks"]:
        text = task if task in config.text_names else ""
        states = _source_states(home, config, text)
        by_arm = {
            arm: _portable_results(home, read_search(home, arm, task, grid))
            for arm in about["arms"]
        }
        is_complete = all(len(points) == len(grid_points(grid)) for points in by_arm.values())
        if states is not None and is_complete:
            texts[text], searches[task] = states, by_arm
    if not searches:
        return None
    about = about | {"settings": without_cache(about["settings"])}
    return {"written_by": WRITER, "about": about, "texts": texts, "search": searches}


def _portable_results(home: Path, tried: Sequence[FineTuned]) -> list[dict[str, Any]]:
    """Return the metrics.json of each tried point, without its epochs and without paths."""
    results = []
    for one in tried:
        values = read_json(home / one.folder / RESULT_FILE) or {}
        per_seed = [seed | {"epochs": []} for seed in values["per_seed"]]
        names = {"model": Path(one.model).name, "files": one.splits}
        results.append(values | {"per_seed": per_seed} | names)
    return results


def _source_states(home: Path, config: CycleConfig, text: str) -> list[list[int | str]] | None:
    """Return the states of the files that a cached text was read from; None without a cache."""
    for path in (config.cache_of(text).path, str(home / "cache" / text)):
        if additions := read_additions(open_store(path))[0]:
            return sorted(additions[-1].sources.values(), key=str)
    return None


def without_cache(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return a cycle's settings without the path of its cache, which belongs to one machine."""
    return {**settings, "cache": {**settings.get("cache", {}), "path": ""}}


def read_search_file(file: Path) -> dict[str, Any]:
    """Return what ``export_searches`` made, from its file. Raise InputError for another file."""
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        if record["written_by"] != WRITER:
            raise ValueError(f"written by {record['written_by']!r}")
        about = record["about"]
        parts = (about["settings"], about["tasks"], about["start"])
        if not all(isinstance(one, dict) for one in (*parts, record["texts"], record["search"])):
            raise TypeError("its parts are not objects")
        return dict(record)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{file} is not the search of a cycle ({error}); give the {SEARCH_FILE} in the folder "
            "of one"
        ) from None


def takeover_files(
    file: Path, home: Path, config: CycleConfig, about: Mapping[str, Any], only: str
) -> dict[Path, dict[str, Any]]:
    """Return the files to write into ``home``, the first draw's folder, to take over the search in
    ``file``, which the same cycle made in another folder: for the task ``only``, or for all tasks.

    ``config`` and ``about`` belong to the first draw here. Raise InputError if the file is damaged,
    belongs to another cycle or lacks an arm, and if the first draw already has other results here.
    """
    record = read_search_file(file)
    if len(config.search_points()) < 2:
        raise InputError(f"--searched {file}: nothing is searched here: `search` has no two points")
    tasks = [t.name for t in config.tasks if t.name in record["search"] and only in ("", t.name)]
    if not tasks:
        names = ", ".join(record["search"])
        raise InputError(f"{file} has no search of {only or 'a task here'} (it has: {names})")
    texts = {
        text: states_of(find_present(config.corpus_of(text).entries)) for text in config.text_names
    }
    here = {"texts": {text: sorted(states.values(), key=str) for text, states in texts.items()}}
    check_same_cycle(str(file), record, here | {"about": about})
    results, sources = dict[Path, dict[str, Any]](), search_sources(home)
    for task, arm, point in product(tasks, config.arms, config.search_points()):
        values = _point_result(file, record, arm, task, config, point)
        path = home / "search" / arm / task / point_name(point) / RESULT_FILE
        existing = read_json(path)
        if existing is None:
            results[path], sources[task] = values, str(file)
        elif _comparable(existing) != _comparable(values):
            raise InputError(
                f"{path} exists and differs from {file}: a search can only be taken over where "
                "none was made. Leave out --searched, or give another --out"
            )
    # The record of where the results come from is written before the results.
    files: dict[Path, dict[str, Any]] = {home / "search" / TAKEN_OVER_FILE: dict(sources)}
    return files | results if results else {}


def _point_result(
    file: Path,
    record: Mapping[str, Any],
    arm: str,
    task: str,
    config: CycleConfig,
    point: Mapping[str, object],
) -> dict[str, Any]:
    """Return the file's result for a point of the search, as in metrics.json."""
    grid, seeds = config.search, [*config.search_seed_range]
    try:
        for values in record["search"][task].get(arm, ()):
            one = parse_finetuned(values, f"search/{arm}/{task}", arm, task)
            if one.point(grid) == tuple(point.values()) and one.seeds == seeds:
                return dict(values)
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{file} is damaged: {arm} on {task} {error}") from None
    settings = ", ".join(f"{key} {value}" for key, value in point.items())
    raise InputError(
        f"{file} lacks {settings} of {arm} on {task}: every arm must be searched in the same way. "
        "Leave the arm out, or run --draw 0 here"
    )


def _comparable(values: Mapping[str, Any]) -> object:
    return values["config"], [(one["seed"], one["scores"]) for one in values["per_seed"]]


def search_sources(home: Path) -> dict[str, str]:
    """Return the tasks whose search a folder has taken over, with the file it came from."""
    return read_json(home / "search" / TAKEN_OVER_FILE) or {}


def check_same_cycle(label: str, one: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    """Raise InputError, naming the key, if two searches depend on different settings, rows, start
    models or texts. ``label``: the name of the first one in the message.
    """
    texts = {*one["texts"]} & {*other["texts"]}
    files = {text for text in texts if one["texts"][text] and other["texts"][text]}
    both = [_dependencies(record, texts, files) for record in (one, other)]
    for key, (there, here) in differences(both, items=True).items():
        raise InputError(
            f"{label} belongs to another cycle: {key} is {there!r} there, but {here!r} here. A "
            "search can be taken over only if settings, labelled rows, start model and text are "
            "the same"
        )


def _dependencies(
    record: Mapping[str, Any], texts: Collection[str], files: Collection[str]
) -> dict[str, Any]:
    """Return everything that a search depends on. ``files``: those of the ``texts`` made from
    files, whose paths may differ.
    """
    about = record["about"]
    rows = {
        name: {key: facts[key] for key in _COMPARED_FACTS}
        | {"files": sorted(facts["files"].values())}
        for name, facts in about["tasks"].items()
    }
    return {
        "settings": decisive_settings(about["settings"], files),
        "tasks": rows,
        "start": about["start"],
        "text": {text: [*map(list, record["texts"][text])] for text in texts},
    }


def decisive_settings(settings: Mapping[str, Any], files: Collection[str]) -> dict[str, Any]:
    """Return the settings that a cycle's scores depend on, with its tasks by name.

    Paths are left out, and the sources of the texts ``files``, and the arms, which may be added.
    """
    decisive: dict[str, Any] = json.loads(json.dumps(with_defaults(CycleConfig, settings)))
    decisive["tasks"] = {task["name"]: task for task in decisive["tasks"]}
    for name, task in decisive["tasks"].items():
        _remove_keys(task, (*_IGNORED_TASK_KEYS, *["corpus.source"] * (name in files)))
    _remove_keys(decisive, (*_IGNORED_KEYS, *["corpus.source"] * ("" in files)))
    return decisive


def _remove_keys(section: dict[str, Any], keys: Sequence[str]) -> None:
    for key in keys:
        *outer, last = key.split(".")
        inner: Any = section
        for part in outer:
            inner = inner.get(part) or {}
        inner.pop(last, None)
