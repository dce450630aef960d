"""Checks before expensive work: every teacher and the student, by their files and on the first
sequences of the corpus. Only a temporary folder is written to, and no weights are read.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path

from rekindle.data.corpus.corpus import Corpus, build_corpus
from rekindle.data.errors import naming
from rekindle.data.hub.names import may_be_hub_id
from rekindle.data.storage.base import Store
from rekindle.data.storage.manifest import MANIFEST
from rekindle.data.storage.store import LocalStore
from rekindle.data.views.masking import MaskConfig
from rekindle.pipeline.builtin.missing import missing
from rekindle.pipeline.caching.teachers import plan_teacher
from rekindle.pipeline.caching.views import build_views
from rekindle.pipeline.config import RunConfig, references
from rekindle.pipeline.describing.encoders import find_teacher
from rekindle.pipeline.progress import SILENT
from rekindle.pipeline.teacher_config import TeacherConfig
from rekindle.train.config import StudentConfig
from rekindle.train.model.headers import check_teacher_files
from rekindle.train.objective.terms import check_terms
from rekindle.train.prepare import load_checked_tokenizer
from rekindle.train.student import check_student

FIRST_SEQUENCES = 64  # of the corpus


def check_files(teachers: Sequence[TeacherConfig], student: StudentConfig | None) -> None:
    """Check the model folders that exist, or must: their configurations and the headers of their
    weights. A model that a server runs has no folder. Raises InputError, naming the teacher or the
    student.
    """
    for teacher in teachers:
        if teacher.served is None and not missing(teacher.model):
            subject = f"teacher {teacher.name!r}"
            with naming(subject):
                directory, _ = find_teacher(teacher)
            check_teacher_files(directory, teacher.task, f"{subject} ({teacher.model})")
    if student is not None and not missing(student.model) and not _is_elsewhere(student.model):
        check_student(student)


def _is_elsewhere(model: str) -> bool:
    """Return whether a student may be on the hub, from where it is not fetched to cache teachers,
    or is made by an earlier stage.
    """
    return bool(references(model)) or may_be_hub_id(model)


def rehearse(config: RunConfig, teachers: Sequence[TeacherConfig], store: Store) -> None:
    """Plan every teacher on the first sequences of a corpus that does not exist yet; check the
    terms of the objective that name only these teachers.

    Raises InputError for a teacher that cannot teach on such a corpus.
    """
    if store.exists(MANIFEST):
        return  # a corpus that exists, or was begun, was rehearsed
    with tempfile.TemporaryDirectory(prefix="rekindle-first-") as folder:
        limit = min(FIRST_SEQUENCES, config.corpus.limit_sequences or FIRST_SEQUENCES)
        corpus = build_corpus(
            LocalStore(Path(folder)),
            config.corpus.model_copy(update={"limit_sequences": limit}),
            FIRST_SEQUENCES,
            tell=False,
        )
        plan_all(corpus, config, teachers)


def plan_all(corpus: Corpus, config: RunConfig, teachers: Sequence[TeacherConfig]) -> None:
    """Plan every teacher on ``corpus``, beside which its views are written, and discard the plans.

    Raises InputError for a teacher that cannot teach on it, or not what the objective asks.
    """
    cache_config = config.cache
    if cache_config.mask.policy == "hard":  # its masks are unknown yet: any others serve here
        cache_config = cache_config.model_copy(update={"mask": MaskConfig()})
    views = build_views(corpus, config.model_copy(update={"cache": cache_config}), SILENT)
    plans = [plan_teacher(teacher, corpus, views, cache_config.seed) for teacher in teachers]
    infos = {plan.info.name: plan.info for plan in plans}
    if config.student is None:
        return
    if not _is_elsewhere(config.student.model):
        check_student(config.student, corpus.tokenizer.size, config.corpus.sequence_length)
        load_checked_tokenizer(corpus, config.student)
    terms = [t for t in config.train.objective.distill if {*t.teachers} <= infos.keys()]
    check_terms(terms, infos, config.student.language_task)
