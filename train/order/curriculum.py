"""A curriculum by a cached teacher's scalars: SALT's choice of what is trained on at first.

SALT ("small-LM guided training", 2024) scores a sequence by the median loss of a small LM over the
tokens that are among its ten best guesses, and begins with the highest: hard, yet predictable.
"""

import math

import numpy as np

from rekindle.data.cache import Cache
from rekindle.data.errors import InputError
from rekindle.train.config import CurriculumConfig
from rekindle.train.order.held_out import Ranges


def first_steps(config: CurriculumConfig, steps: int) -> int:
    """The number of steps of the first part: those at which a ``step`` schedule over the same
    fraction of ``steps`` has its first value.
    """
    return math.floor(config.until * steps * (1 - 1e-9)) + 1


def best_scored(cache: Cache, config: CurriculumConfig, sequences: Ranges) -> Ranges:
    """The share ``keep`` of ``sequences`` with the best scores, ties in corpus order.

    Sequences without a score (no token among the teacher's best guesses, or not of its domains) are
    never among them. Raises InputError for a teacher that is not complete, CacheMismatchError for
    one whose scalars are not all there.
    """
    teacher = cache.teacher(config.teacher)
    if teacher.coverage < 1:
        raise InputError(
            f"train.curriculum.teacher {config.teacher!r} has targets for {teacher.coverage:.1%} "
            "of the cache: a sequence that was not scored cannot be ranked. Finish it with "
            "`pipeline cache-teachers`"
        )
    scores = cache.scores(config.teacher, config.score)
    numbers = sequences.select(np.arange(len(sequences), dtype=np.int64))
    scored = numbers[~np.isnan(scores[numbers])]
    if not len(scored):
        raise InputError(
            f"train.curriculum: teacher {config.teacher!r} gives no {config.score} to any sequence "
            "that is trained on. Use another score, or a teacher of these domains"
        )
    sign = -1.0 if config.highest else 1.0
    best = scored[np.argsort(sign * scores[scored], kind="stable")]
    return Ranges.of(np.sort(best[: share_of(len(numbers), config.keep)]))


def share_of(size: int, keep: float) -> int:
    """How many a share of ``size`` is, at least one."""
    return max(1, round(size * keep))
