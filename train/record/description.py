"""The record that identifies a run: its settings, what it reads of a cache, how it measures."""

from typing import Any

from rekindle.data.cache import Cache
from rekindle.data.targets.kinds.registry import vocabulary_kind
from rekindle.train.config import StudentConfig, TrainConfig
from rekindle.train.measures import (
    EVALUATION_SECTION,
    EVALUATION_VERSION,
    TEACHER_VALUES_VERSION,
)
from rekindle.train.objective.objective import Objective
from rekindle.train.step_config import LENGTH_SECTION

About = dict[str, Any]  # a run's record as JSON
DATA_ORDER_VERSION = 2  # rises when the same seed would give another split or order


def describe_run(
    cache: Cache,
    student_config: StudentConfig,
    train_config: TrainConfig,
    masked_view: str | None,
    objective: Objective,
    evaluation_version: int = EVALUATION_VERSION,
) -> About:
    """Return the record of a run: enough to refuse resuming it as another one, and to use its model
    as a teacher later.
    """
    train = train_config.model_dump(mode="json", by_alias=True)
    has_other_length = train_config.epochs is not None or train_config.tokens is not None
    train |= {"steps": None} if has_other_length else {}  # it follows from the cache at that time
    dumped = [one.settings.model_dump(mode="json", by_alias=True) for one in objective.methods]
    train["objective"]["methods"] = dumped  # with the defaults of their files
    names = [*objective.teachers]
    names += [train_config.curriculum.teacher] if train_config.curriculum is not None else []
    teachers = {name: cache.teacher(name) for name in names}
    used_teachers = [
        name
        for name in names
        if name in objective.active_teachers or name not in objective.teachers
    ]
    replicas = {} if masked_view is None else {"replicas": cache.masked_view(masked_view).replicas}
    targets = {name: one for name, one in cache.extent.targets.items() if name in teachers}
    views = {name: t.view for name, t in objective.teachers.items() if t.sees_clean_text}
    return {
        "student": student_config.model_dump(mode="json", by_alias=True),
        "train": train,
        "cache": {
            "path": cache.store.location,
            "corpus": cache.corpus.fingerprint,
            "masked_view": masked_view,
            "data_order": DATA_ORDER_VERSION,
            "teachers": {name: teacher.fingerprint for name, teacher in teachers.items()},
            # Only of teachers whose targets are used: the others have weight 0 at every step.
            "teacher_seconds": {name: teachers[name].seconds for name in used_teachers},
            **(
                {"measured": _evaluation_versions(train_config, objective)}
                if evaluation_version >= TEACHER_VALUES_VERSION
                else {}
            ),
            **replicas,
            "targets": {name: one.model_dump() for name, one in sorted(targets.items())},
            **({"teacher_views": views} if views else {}),
        },
        **(
            {EVALUATION_SECTION: {"measure": evaluation_version}}
            if evaluation_version >= EVALUATION_VERSION
            else {}
        ),
        **({LENGTH_SECTION: {"steps": train_config.steps}} if has_other_length else {}),
    }


def _evaluation_versions(train_config: TrainConfig, objective: Objective) -> dict[str, int]:
    """Return the version by which this run measures the kl and agreement of each teacher for which
    earlier versions did it otherwise: those with samples, or with a term's ``k``.
    """
    with_k = {name for term in train_config.objective.distill if term.k for name in term.teachers}
    return {
        name: TEACHER_VALUES_VERSION
        for name, info in sorted(objective.teachers.items())
        if info.is_vocabulary and (name in with_k or vocabulary_kind(info).is_sample)
    }
