"""The stages of a run file: their full configurations, and every check possible before the first
one begins.
"""

import fnmatch
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rekindle.data.corpus.tokenizer import load_tokenizer
from rekindle.data.errors import InputError, naming
from rekindle.data.storage.client import is_remote
from rekindle.data.storage.store import open_store
from rekindle.data.targets.kinds.base import VocabularyKind
from rekindle.data.targets.kinds.registry import vocabulary_kind
from rekindle.data.targets.reading.files import is_described, read_teacher
from rekindle.pipeline.config import (
    PromptsConfig,
    RunConfig,
    StageConfig,
    configure_stage,
    references,
    with_directories,
)
from rekindle.pipeline.teacher_config import TeacherConfig
from rekindle.train.objective.estimates import check_estimates
from rekindle.train.record.working_copy import shown_folder

_TEACHER_KEYS = ("model", "task", "domains", "pairs")  # keys that identify a teacher


@dataclass(frozen=True)
class Stage:
    """One run of several."""

    name: str
    directory: Path
    definition: StageConfig
    config: RunConfig  # with the directories of earlier stages in place of references
    written: RunConfig  # with references as written
    prompts: PromptsConfig | None  # with directories, and a cache

    @property
    def text_waits_for(self) -> list[str]:
        """Earlier stages that must be finished before this stage's corpus and views can be made."""
        config, prompts = self.written, self.definition.write_prompts
        places = prompts.places if prompts else []
        return references([config.corpus.model_dump(mode="json"), config.cache.path, places])

    @property
    def teachers_wait_for(self) -> dict[str, list[str]]:
        """Teachers that must wait for other stages to finish: name -> stages."""
        waits = {t.name: references(t.model_dump(mode="json")) for t in self.written.teachers}
        return {name: stages for name, stages in waits.items() if stages}

    @property
    def uses(self) -> list[str]:
        """Every earlier stage whose directory this stage names."""
        return list(dict.fromkeys([*references(self.definition.set), *self.text_waits_for]))

    @property
    def record(self) -> dict[str, Any]:
        """The stage's entry in ``stages.json``."""
        config = self.written.model_dump(mode="json", by_alias=True, exclude={"stages": True})
        return {"name": self.name, "config": config} | self.definition.model_dump(
            mode="json", include={"write_prompts"}
        )


def plan_stages(config: RunConfig, out: Path) -> list[Stage]:
    """Return the stages of ``config``, with their directories in ``out``. Reads only caches.

    Raise InputError, naming the stage, if something cannot work: no student, a teacher that nothing
    caches, two corpora or two teachers of one name in one cache, prompts without an earlier cache
    or prompts the stage does not read.
    """
    # In a store each node has its own copy, so a stage's address serves as its name.
    directories = {stage.name: f"{shown_folder(out)}/{stage.name}" for stage in config.stages}
    stages = []
    for stage in config.stages:
        if (prompts := stage.write_prompts) is not None:
            values = {"cache": prompts.cache or config.cache.path, "to": prompts.to}
            prompts = prompts.model_copy(update=with_directories(values, directories))
        resolved, written = (configure_stage(config, stage, known) for known in (directories, {}))
        stages.append(Stage(stage.name, out / stage.name, stage, resolved, written, prompts))
    for number, planned in enumerate(stages):
        with naming(f"stage {planned.name!r}"):
            _check_references(planned, directories)
            _check_stage(planned, stages[:number])
    for one, other in itertools.combinations(stages, 2):
        if one.config.cache.path == other.config.cache.path:
            _check_shared_cache(one, other)
    return stages


def _check_references(stage: Stage, directories: Mapping[str, str]) -> None:
    """Raise InputError for a reference outside a stage's ``set``, where it means nothing."""
    values = stage.config.model_dump(mode="json", exclude={"stages": True})
    if unresolved := [name for name in references(values) if name in directories]:
        raise InputError(
            f"'{{{unresolved[0]}}}' stands for a directory only in the `set` of a stage, not in "
            "the shared file. Move the key that holds it into `set`"
        )


def _check_stage(stage: Stage, earlier: Sequence[Stage]) -> None:
    if stage.config.needed_student().lora is not None:
        _check_adapter(stage, earlier)
    if stage.prompts is not None:
        _check_prompts(stage, stage.prompts)
    for key, name, cache in _teachers_read(stage):
        sharing = [s for s in (*earlier, stage) if s.config.cache.path == cache]
        cached = sorted({teacher.name for s in sharing for teacher in s.config.teachers})
        if name not in cached and not is_described(open_store(cache), name):
            raise InputError(
                f"{key} names the teacher {name!r}, which nothing puts into {cache} (its "
                f"teachers: {', '.join(cached) or 'none'}). Add it to `teachers`"
            )
    check_estimates(stage.config.train.objective.distill, _kinds_read(stage, earlier))


def _check_adapter(stage: Stage, earlier: Sequence[Stage]) -> None:
    """Raise InputError if a stage puts an adapter on the adapter of an earlier one."""
    names = references(stage.written.needed_student().model)
    for one in (one for one in earlier if one.name in names):
        lora = one.config.needed_student().lora
        if lora is not None and not lora.merge:
            raise InputError(
                f"student.lora adapts the student of stage {one.name!r}, which is an adapter "
                "itself. Set student.lora.merge: true in that stage"
            )


def _kinds_read(stage: Stage, earlier: Sequence[Stage]) -> dict[str, VocabularyKind]:
    """Return the kind of targets of each vocabulary teacher, from a stage or from the cache."""
    path, kinds = stage.config.cache.path, dict[str, VocabularyKind]()
    sharing = [s for s in (*earlier, stage) if s.config.cache.path == path]
    configured = {t.name: t.described_kind for s in sharing for t in s.config.teachers}
    for name in dict.fromkeys(n for t in stage.config.train.objective.distill for n in t.teachers):
        kind = configured.get(name)
        if name not in configured and (info := read_teacher(open_store(path), name)).is_vocabulary:
            kind = vocabulary_kind(info)
        if kind is not None:
            kinds[name] = kind
    return kinds


def _teachers_read(stage: Stage) -> Iterator[tuple[str, str, str]]:
    """Yield each needed teacher: the key that needs it, its name, and its cache."""
    train, cache = stage.config.train, stage.config.cache
    for term in train.objective.distill:
        yield from (("train.objective", name, cache.path) for name in term.teachers)
    for method in train.objective.methods:
        if isinstance(name := (method.model_extra or {}).get("teacher"), str):
            yield "train.objective", name, cache.path
    if train.curriculum is not None:
        yield "train.curriculum", train.curriculum.teacher, cache.path
    if cache.mask.teacher is not None:
        yield "cache.mask", cache.mask.teacher, cache.path
    if stage.prompts is not None:
        yield "write_prompts.teacher", stage.prompts.teacher, stage.prompts.cache or ""


def _check_prompts(stage: Stage, prompts: PromptsConfig) -> None:
    if is_remote(prompts.to):
        raise InputError(
            f"write_prompts.to is {prompts.to}: prompts are written on this machine; name a local "
            "file in write_prompts.to and in corpus.source"
        )
    sources = stage.config.corpus.places
    if not any(prompts.to == s or fnmatch.fnmatch(prompts.to, s) for s in sources):
        raise InputError(
            f"write_prompts.to is {prompts.to}, but the stage does not read it: its corpus.source "
            f"is {', '.join(sources)}. Set corpus.source, and a separate cache.path"
        )
    if prompts.cache == stage.config.cache.path:
        raise InputError(
            f"write_prompts reads the cache {prompts.cache}, but the prompts would be cached "
            "there as well; set a separate cache.path"
        )


def _check_shared_cache(one: Stage, other: Stage) -> None:
    """Check two stages that share a cache. A longer corpus may follow a shorter one; any other
    corpus needs another cache. Targets of two models, or of two inputs, never mix under one name.
    """
    first, second = (s.config.corpus.model_dump(mode="json") for s in (one, other))
    if second["source"][: len(first["source"])] == first["source"]:
        second["source"] = first["source"]
    second["limit_sequences"] = first["limit_sequences"]
    corpus = {f"corpus.{key}": (first[key], second[key]) for key in first}
    size = one.config.cache.sequences_per_shard
    other_size = other.config.cache.sequences_per_shard  # null: whatever the cache has by then
    corpus["cache.sequences_per_shard"] = (size, size if other_size is None else other_size)
    teachers: dict[str, tuple[object, object]] = {}
    known = {t.name: t for t in one.config.teachers}
    for teacher in other.config.teachers:
        if teacher.name in known:
            before, after = _identity(one, known[teacher.name]), _identity(other, teacher)
            teachers |= {f"the {k} of {teacher.name!r}": (before[k], after.get(k)) for k in before}
    rename = "In a cache, a name stands for one teacher: rename it, or: "
    for pairs, advice in ((corpus, ""), (teachers, rename)):
        for subject, (value, other_value) in pairs.items():
            if value != other_value:
                raise InputError(
                    f"stages {one.name!r} and {other.name!r} share the cache "
                    f"{one.config.cache.path}, but {subject} is {value!r}, then {other_value!r}. "
                    f"{advice}Give stage {other.name!r} a separate cache.path"
                )


def _identity(stage: Stage, teacher: TeacherConfig) -> dict[str, object]:
    """Return what decides a teacher's targets, including its masks."""
    identity = {key: getattr(teacher, key) for key in _TEACHER_KEYS}
    if not teacher.sees_masks:
        return identity | {"view": "clean"}
    cache = stage.config.cache
    masks = {"seed": cache.seed, "teacher": cache.mask.teacher} | cache.mask.identity()
    masks |= {"replicas": cache.replicas} if cache.mask.policy == "cover" else {}
    return identity | {"view": "masked", "masks": masks}


def check_models(stages: Sequence[Stage], students: bool = True) -> None:
    """Raise InputError unless every model that no stage makes exists and fits its prompts."""
    from rekindle.pipeline.caching.first_checks import check_files
    from rekindle.train.model.folder import resolve_model
    from rekindle.train.student import check_student

    models: dict[str, Path] = {}
    for stage in stages:
        with naming(f"stage {stage.name!r}"):
            ready = [one for one in stage.written.teachers if not references(one.model)]
            check_files(ready, None)
            models |= {one.model: resolve_model(one.model) for one in ready}
            student = stage.written.student
            if students and student is not None and not references(student.model):
                check_student(student)
    teachers = {
        (s.written.cache.path, t.name): models.get(t.model)
        for s in stages
        for t in s.written.teachers
    }
    for stage in stages:
        if stage.prompts is not None and not stage.text_waits_for:
            directory = teachers.get((stage.prompts.cache or "", stage.prompts.teacher))
            with naming(f"stage {stage.name!r}"):
                _check_words(stage, stage.prompts, directory)


def _check_words(stage: Stage, prompts: PromptsConfig, directory: Path | None) -> None:
    """Check the words, as far as the expert's configuration names its labels."""
    from rekindle.pipeline.stages.prompts import words_of
    from rekindle.train.model.folder import read_config

    if directory is None:
        return
    model_config = read_config(directory)
    if names := model_config.get("id2label"):
        words_of(list(names.values()), prompts.words, load_tokenizer(stage.config.corpus.tokenizer))


@dataclass(frozen=True)
class Ready:
    """The part of a stage that can be cached before any student is trained."""

    stage: Stage
    config: RunConfig | None  # with the ready teachers; None if its text or masks are not ready
    waiting: dict[str, list[str]]  # teacher ("" for the text) -> the stages it waits for

    def waiting_text(self) -> list[str]:
        """Return a line for the text or each teacher that waits."""
        return [
            f"stage {self.stage.name}: {f'teacher {teacher}' if teacher else 'its text'} waits "
            f"for stage {', '.join(stages)}; `pipeline train-student` caches it in its turn"
            for teacher, stages in self.waiting.items()
        ]


def ready_parts(stages: Sequence[Stage]) -> list[Ready]:
    """Return, for each stage, what can be cached now and what waits for which stages."""
    parts = []
    blocked: dict[tuple[str, str], list[str]] = {}  # cache, teacher -> stages
    for stage in stages:
        text, teachers = stage.text_waits_for, stage.teachers_wait_for
        if stage.prompts is not None:
            text = text or blocked.get((stage.prompts.cache or "", stage.prompts.teacher), [])
        cache = stage.written.cache
        blocked |= {(cache.path, name): waits for name, waits in teachers.items()}
        mask_teacher = cache.mask.teacher  # without its targets nothing is masked
        masks = [] if mask_teacher is None else blocked.get((cache.path, mask_teacher), [])
        if text or masks:
            all_teachers = {t.name: text or masks for t in stage.written.teachers}
            blocked |= {(cache.path, name): waits for name, waits in all_teachers.items()}
            waiting = {"": text} if text else {mask_teacher or "": masks} | all_teachers
            parts.append(Ready(stage, None, waiting))
            continue
        chosen = tuple(t for t in stage.written.teachers if t.name not in teachers)
        config = stage.written.model_copy(update={"teachers": chosen})
        parts.append(Ready(stage, config, teachers))
    return parts
