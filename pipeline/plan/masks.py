"""Masks of policy hard on a plan's sample, before anybody knows which tokens are hard: a bound.

Every token that may be masked is, so that sizes and positions come out as the most they can be.
"""

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from rekindle.data.storage.columns import list_views
from rekindle.data.targets.reading.files import is_described
from rekindle.data.targets.reading.hard_masks import HardMaskedView, hard_tokens
from rekindle.data.targets.schema import TeacherInfo
from rekindle.pipeline.caching.hard_view import mask_teacher
from rekindle.pipeline.caching.views import Views
from rekindle.pipeline.config import RunConfig
from rekindle.pipeline.plan.sample import CorpusSurvey
from rekindle.pipeline.plan.teacher import at_hand, described


class AssumedMasks(HardMaskedView):
    """The view with every token hard, under the name of the true one."""

    def masked_positions(self, number: int, replica: int) -> Iterator[NDArray[np.int64]]:
        """As many of each row's tokens as the limit allows."""
        for batch in self.corpus.shard(number).batches():
            offsets, starts = list_views(batch["char_starts"], "char_starts")
            for a, b in pairwise(offsets):
                content = np.flatnonzero(starts[a:b] >= 0)
                losses = np.full(len(content), np.inf, np.float32)
                yield content[hard_tokens(losses, 0.0, self.config.limit)]


def assumed_masks(config: RunConfig, survey: CorpusSurvey, probe: bool) -> HardMaskedView | None:
    """The bound, written beside the sample ``survey.steps``; None under another policy.

    Raises InputError as ``hard_view`` does.
    """
    if config.cache.mask.policy != "hard":
        return None
    teacher = _teacher(config, survey, probe)
    masks = AssumedMasks(survey.steps, config.cache.mask, config.cache.seed, teacher)
    masks.build()
    return masks


def _teacher(config: RunConfig, survey: CorpusSurvey, probe: bool) -> TeacherInfo:
    """The teacher of the masks, as far as it can be described without a download."""
    corpus, name = survey.present or survey.reference, config.cache.mask.teacher
    found = [teacher for teacher in config.teachers if teacher.name == name]
    if is_described(corpus.store, name or "") or not found or found[0].sees_masks:
        return mask_teacher(corpus, config)
    teacher = found[0]
    folder = at_hand(teacher.model, must_be=probe)
    if folder is None:  # the true view will have another name, and no unit of it is there
        return TeacherInfo(name=teacher.name, task="masked_lm", kind="topk", view="clean")
    return described(teacher, folder, survey, Views(), config.cache.seed).info
