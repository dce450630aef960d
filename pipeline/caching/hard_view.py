"""Makes masks from a teacher's losses (``cache.mask.policy: hard``) within stage 1.

The view's name follows from the teacher's files alone, so that teachers that are shown the view can
be described before any teacher runs. The view is written once its teacher has seen all of the
corpus.
"""

import logging
from collections.abc import Sequence

from rekindle.data.corpus.corpus import Corpus
from rekindle.data.errors import InputError
from rekindle.data.targets.reading.files import is_described, read_parts, read_teacher
from rekindle.data.targets.reading.hard_masks import HardMaskedView
from rekindle.data.targets.reading.reader import TeacherReader
from rekindle.data.targets.schema import TeacherInfo
from rekindle.pipeline.caching.teachers import TeacherPlan, plan_teacher
from rekindle.pipeline.caching.views import Views
from rekindle.pipeline.config import RunConfig
from rekindle.pipeline.progress import Progress

log = logging.getLogger("rekindle")


def hard_view(corpus: Corpus, config: RunConfig) -> HardMaskedView | None:
    """Return the view of policy hard, which may not be written yet; None under another policy.

    Raises InputError if no such teacher is in the file or in the cache, or if it cannot say which
    tokens are hard.
    """
    if config.cache.mask.policy != "hard":
        return None
    info = mask_teacher(corpus, config)
    return HardMaskedView(corpus, config.cache.mask, config.cache.seed, info)


def mask_teacher(corpus: Corpus, config: RunConfig) -> TeacherInfo:
    """Return the teacher that makes the masks: from the cache, else as the file describes it."""
    name = config.cache.mask.teacher
    assert name is not None
    if is_described(corpus.store, name):
        return read_teacher(corpus.store, name)
    configured = {teacher.name: teacher for teacher in config.teachers}
    if name not in configured:
        raise InputError(
            f"cache.mask.teacher: there is no teacher {name!r} in the cache {corpus.store.location}"
            f", and none in the configuration (it has: {', '.join(configured) or 'none'}). Add it "
            "to teachers, as a masked_lm with view: clean"
        )
    if configured[name].sees_masks:
        raise InputError(
            f"cache.mask.teacher: {name!r} would see the masks that are made from its "
            "losses; give it view: clean"
        )
    return plan_teacher(configured[name], corpus, Views(), config.cache.seed).info


def masks_last(
    parts: Sequence[TeacherPlan], masks: HardMaskedView | None
) -> tuple[list[TeacherPlan], list[TeacherPlan]]:
    """Split ``parts`` into those that can be made before ``masks`` and those shown the masks."""
    shown_masks = [part for part in parts if masks is not None and part.info.view == masks.name]
    return [part for part in parts if part not in shown_masks], shown_masks


def build_hard_masks(masks: HardMaskedView, needed: bool, progress: Progress) -> None:
    """Write what is missing of the view, if its teacher has seen all of the corpus.

    If it has not, log that; raises InputError if the masks are ``needed`` now.
    """
    corpus, name = masks.corpus, masks.teacher.name
    if not _is_complete(corpus, name):
        if needed:
            raise InputError(
                f"teachers with view: masked see what teacher {name!r} finds hard, and it has not "
                f"seen all of the corpus; run `pipeline cache-teachers` without --teacher, or with "
                f"--teacher {name} first"
            )
        log.info("teacher %s is not complete: masks from its losses are not made yet", name)
        return
    with progress.task(f"masks by {name}", unit="sequences"):
        masks.build()


def _is_complete(corpus: Corpus, name: str) -> bool:
    """Return whether the part of the teacher's targets that is read has every shard."""
    if not is_described(corpus.store, name):
        return False
    reader = TeacherReader(corpus, read_parts(corpus.store, name))
    return not reader.main.commits.missing_units(len(corpus.commits), [None])
