"""The record ``cycle.json``, and the check that a folder holds the same cycle, to be continued."""

import json
import logging
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rekindle.data.corpus.additions import has_corpus, is_same_source, read_additions
from rekindle.data.corpus.config import differing_keys
from rekindle.data.errors import CheckpointError, InputError, naming
from rekindle.data.former import with_defaults, with_recorded_defaults
from rekindle.data.settings import parse_settings
from rekindle.data.source.sources import source_files
from rekindle.data.storage.base import Store
from rekindle.data.storage.store import open_store
from rekindle.pipeline.compare.runs import CYCLE_FILE, CYCLE_WRITER
from rekindle.pipeline.cycle.arms import TWINS
from rekindle.pipeline.cycle.config import CycleConfig
from rekindle.pipeline.cycle.inputs import TaskFiles
from rekindle.pipeline.cycle.search import DRAWS_FOLDER, FIRST_DRAW
from rekindle.train.finetune.config import TaskSettings
from rekindle.train.record.run_folder import (
    check_same_settings,
    is_continued,
    read_record,
    reading_record,
)

log = logging.getLogger("rekindle")

GIVE_OTHER_OUT = "give another --out"
_FORMER_DEFAULTS = {"test_texts": "keep"}  # what older records without such a key mean
_STARTED_FROM = {"student": "models", "experts": "experts"}  # by section of the file
_RESULT_FOLDERS = ("experts", "search/*", "fine-tuned/*")  # folders with results of a task
_READING_ADVICE = "say what they mean (finetune.problem, label_field, drop_labels, positive, …)"


def resumed_config(home: Path, config: CycleConfig) -> CycleConfig:
    """Return ``config`` with the defaults of the version that began the cycle in ``home``, and
    without arms that coincide with another one. A cycle begun with such an arm keeps it.
    """
    record = read_record(home / CYCLE_FILE, GIVE_OTHER_OUT) or {}
    if not record:  # older versions did not check: their cycles continue
        for key in config.unused_settings:
            raise InputError(
                f"{key} is searched (search.{key.rpartition('.')[2]}), so this value would "
                "not be used: leave out one of them"
            )
    else:
        with reading_record(home / CYCLE_FILE, GIVE_OTHER_OUT):
            begun = with_recorded_defaults(config, _FORMER_DEFAULTS | record["settings"])
        if begun is not config:
            with naming(f"{home} cannot go on as an older version began it; {GIVE_OTHER_OUT}"):
                config = parse_settings(CycleConfig, begun.model_dump(mode="json", by_alias=True))
    arms = record.get("arms")
    arms = arms if isinstance(arms, list) else []
    for arm in [arm for arm in config.twins if arm in config.arms and arm not in arms]:
        log.info("arm %s: left out, because %s", arm, TWINS[arm][1])
    return config.without_twins(arms)


def cycle_record(
    config: CycleConfig, tasks: Sequence[TaskFiles], start: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the content of ``cycle.json``."""
    settings = config.model_dump(mode="json", by_alias=True)
    return {
        "written_by": CYCLE_WRITER,
        "arms": list(config.arms),
        "tasks": {one.task.name: one.facts for one in tasks},
        "search": settings["search"],
        "seeds": config.seeds,
        "finetune": settings["finetune"],
        "settings": settings,
        "start": start,
    }


def check_folder(
    home: Path, config: CycleConfig, about: Mapping[str, Any], beside: Collection[str]
) -> None:
    """Check that the directory is free, or holds the same cycle."""
    if not is_continued(home, CYCLE_FILE, "cycle", resume=True, other_files=beside):
        # Later the files may be gone, but then the cache has the text.
        for text in config.text_names:
            source_files(config.corpus_of(text).places)
        return
    record = read_record(home / CYCLE_FILE, GIVE_OTHER_OUT) or {}
    with reading_record(home / CYCLE_FILE, GIVE_OTHER_OUT):
        if record["written_by"] != CYCLE_WRITER:
            raise ValueError("it does not belong to a cycle")
        is_older = "problem" not in record["settings"]["finetune"]
        record["settings"] = with_defaults(CycleConfig, _FORMER_DEFAULTS | record["settings"])
        before, now = ({**one["settings"], "tasks": _task_settings(one)} for one in (record, about))
        before = {key: before.get(key) for key in now}
    rule = "Go on with its own (run.yaml in it), or give another --out"
    # Arms may be added; the other keys only describe, and older versions did not record them.
    facts = ("about", "chance", "held")
    free_keys = [f"tasks.{name}.{key}" for name in now["tasks"] for key in facts]
    if "start" in record:  # the fingerprint of the weights says more than the path
        free_keys += ["student.model", "experts.model", "corpus.tokenizer"]
    free_keys += _equivalent_source_keys(home, config, before, now)
    if is_older:  # It recorded no settings for the task files; compare what was read with them.
        rule = f"If labels or columns are read otherwise than they were, {_READING_ADVICE}. {rule}"
        sections = ["finetune", *(f"tasks.{name}.finetune" for name in now["tasks"])]
        keys = TaskSettings.model_fields
        free_keys += [f"{section}.{key}" for section in sections for key in keys]
    free_keys += _key_of_added_draws(home, before.get("label_draws") or 1, now["label_draws"])
    check_same_settings(
        home, before, now, rule, free=("arms", "about", "corpus.on_bad_record", *free_keys)
    )
    start = record.get("start", about["start"])  # not recorded by older versions
    for key, section in (("weights", "student"), ("expert_weights", "experts")):
        if start.get(key) != about["start"].get(key):
            model = about["settings"][section]["model"]
            raise CheckpointError(
                f"{home} was begun with other weights of {model}, so not all of its "
                f"{_STARTED_FROM[section]} would start from the same model. Restore the weights, "
                "or give another --out"
            )
    removed = [arm for arm in record["arms"] if arm not in about["arms"]]
    if removed:
        raise CheckpointError(
            f"{home} has the arm {removed[0]!r}, which is missing now. Arms may be added, not "
            "removed: name it again, or give another --out"
        )


def remove_outdated_splits(tasks: Sequence[TaskFiles], home: Path) -> None:
    """Remove split files whose texts differ from these; an older version may have written them.

    Raise CheckpointError if something was fine-tuned on them.
    """
    for one in tasks:
        for split, file in one.files_in(home).items():
            if file.exists() and _split_texts(file) != one.texts_of(split):
                _check_unused(one.task.name, file, home)
                file.unlink()


def _split_texts(file: Path) -> list[tuple[str, str | None]]:
    with reading_record(file, "remove it and run the cycle again"):
        ones = map(json.loads, file.read_bytes().splitlines())
        return [(one.get("sentence1", one.get("text")), one.get("sentence2")) for one in ones]


def _check_unused(task: str, file: Path, home: Path) -> None:
    """Raise CheckpointError if anything was fine-tuned on a task, finished or not."""
    names = (task, f".{task}.seeds")
    patterns = (f"{folder}/{name}" for folder in _RESULT_FOLDERS for name in names)
    if result := next((path for pattern in patterns for path in home.glob(pattern)), None):
        raise CheckpointError(
            f"{file} has other rows than this version takes, and {result} was made from them. "
            f"Continue with the version that began it, or {GIVE_OTHER_OUT}"
        )
    log.info("task %s: %s is written again, because this version takes other rows", task, file.name)


def _equivalent_source_keys(
    home: Path, config: CycleConfig, before: Mapping[str, Any], now: Mapping[str, Any]
) -> Iterator[str]:
    """Yield the keys of sources that are spelled differently but name the cached text."""
    if config.label_draws > 1:  # all draws have this text
        config = config.of_draw(0).with_cache_in(home / DRAWS_FOLDER / str(FIRST_DRAW))
    for text in config.text_names:
        was, now_is = (one["tasks"].get(text, one).get("corpus") for one in (before, now))
        source = config.corpus_of(text).entries
        if was != now_is and is_same_source(open_store(config.cache_of(text).path), source):
            yield f"tasks.{text}.corpus.source" if text else "corpus.source"


def check_same_text(config: CycleConfig, home: Path, number: int) -> None:
    """Raise CheckpointError if draw ``number`` of the cycle in ``home`` would cache another text
    than a draw that has cached it: comparisons over draws must differ only in labels.
    """
    folder = home / DRAWS_FOLDER
    draws = [
        config.of_draw(draw).with_cache_in(folder / str(draw)) for draw in range(config.label_draws)
    ]
    for text in config.text_names:
        stores = [open_store(draw.cache_of(text).path) for draw in draws]
        started = [draw for draw, store in enumerate(stores) if has_corpus(store)]
        if number in started:  # it continues with its own text
            for draw in started:
                if _have_same_text(stores[number], stores[draw]) is False:
                    raise _different_texts_error(home, (draw, number), text)
            continue
        other = next(iter(started), None)
        text_config = config.corpus_of(text)
        if other is not None and not is_same_source(stores[other], text_config.entries):
            raise CheckpointError(
                f"draw {number} of the labels would read another text than draw {other}: the "
                f"files of {f'the corpus of task {text}' if text else 'corpus.source'} "
                f"({', '.join(text_config.places)}) have changed. Restore them, or give another "
                "--out"
            )


def check_read_same_text(home: Path, draws: Iterable[int]) -> None:
    """Raise CheckpointError if students of several ``draws`` of the cycle in ``home`` have read
    different texts.

    A student's record has the corpus's identity; if identities differ, the caches are compared, if
    they exist, because another version may have written other bytes for the same files.
    """
    first: dict[str, tuple[int, str, str]] = {}
    for draw in draws:
        folder = home / DRAWS_FOLDER / str(draw)
        for file in sorted(folder.glob("students/*/run.json")):
            cache = (read_record(file, GIVE_OTHER_OUT) or {}).get("cache", {})
            if not (corpus := cache.get("corpus")):
                continue
            text = Path(path := str(cache.get("path", ""))).name
            text = text if (folder / "costs" / "texts" / text).is_dir() else ""
            if not ("://" in path or Path(path).is_dir()):  # the cycle may have been moved
                path = str(folder / "cache" / text)
            first_draw, first_corpus, first_path = first.setdefault(text, (draw, corpus, path))
            stores = open_store(path), open_store(first_path)
            if corpus != first_corpus and not _have_same_text(*stores):
                raise _different_texts_error(home, (first_draw, draw), text)


def _have_same_text(one: Store, other: Store) -> bool | None:
    """Return whether two corpora were made in the same way from the same files; None if unknown,
    because one is gone or was not made from files.
    """
    last = [additions[-1] for additions, _ in map(read_additions, (one, other)) if additions]
    if len(last) < 2:
        return None
    files = [sorted(map(tuple, addition.sources.values())) for addition in last]
    if differing_keys(last[0].config, last[1].config) or files[0] != files[1]:
        return False
    return True if files[0] else None


def _different_texts_error(home: Path, draws: tuple[int, int], text: str) -> CheckpointError:
    first, second = draws
    return CheckpointError(
        f"draws {first} and {second} of the labels in {home} have read different "
        f"texts{f' of task {text}' if text else ''}, but draws must differ only in labels. Keep "
        f"one of them: remove {home / DRAWS_FOLDER / str(second)} and run --draw {second} again "
        f"with the text of draw {first}, or start again in another --out"
    )


def _key_of_added_draws(home: Path, before: int, now: int) -> list[str]:
    """Return the key of the label draws if some were added. Raise CheckpointError if there are
    fewer now, or if one becomes several.
    """
    if before == now:
        return []
    if 1 in (before, now):
        raise CheckpointError(
            f"{home} was begun with label_draws: {before}, and now {now} are asked for: several "
            "draws have a folder each, a single one has none. Give another --out"
        )
    if now < before:
        raise CheckpointError(
            f"{home} has {before} draws of the labels, and now {now} are asked for. Draws may be "
            "added, not removed: leaving some out would be a selection. Give label_draws: "
            f"{before}, or another --out"
        )
    return ["label_draws"]


def initial_draws(home: Path, config: CycleConfig) -> int:
    """Return the number of label draws with which the cycle in ``home`` was begun; the current
    number if it is new.
    """
    record = read_record(home / CYCLE_FILE, GIVE_OTHER_OUT) or {}
    first = record.get("draws_at_first") or record.get("settings", {}).get("label_draws")
    return int(first or config.label_draws)


def _task_settings(about: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of every task, with the facts about its files."""
    settings = {task["name"]: task for task in about["settings"]["tasks"]}
    return {name: settings.get(name, {}) | facts for name, facts in about["tasks"].items()}
