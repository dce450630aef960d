"""Masked views of the tokens a teacher finds hard: self-evolution (Vega v2, 2022).

A masked LM that sees unmasked text gives every token a loss, which the cache keeps. Here the tokens
whose loss exceeds a threshold become the masked positions of a view, which students read like one
with random masks. No model is run here.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from rekindle.data.corpus.corpus import Corpus
from rekindle.data.errors import InputError
from rekindle.data.targets.reading.files import read_parts
from rekindle.data.targets.reading.reader import TeacherReader
from rekindle.data.targets.schema import TeacherInfo
from rekindle.data.views.masked import MaskedView
from rekindle.data.views.masking import MaskConfig


def hard_tokens(
    losses: NDArray[np.float32], loss_above: float, limit: float | None = None
) -> NDArray[np.intp]:
    """Return which of a sequence's tokens to mask, ascending, by their ``losses`` [P] in nats.

    These are the tokens above ``loss_above``; with a ``limit``, at most that share of all P (but at
    least one), hardest first, ties in order.
    """
    hard = np.flatnonzero(losses > loss_above)
    if limit is None:
        return hard
    largest_count = max(1, int(limit * len(losses) + 1e-9))  # 0.29 · 100 is slightly less than 29
    return np.sort(hard[np.argsort(-losses[hard], kind="stable")[:largest_count]])


class HardMaskedView(MaskedView):
    """The masked replica of a corpus in which one teacher's hard tokens are masked.

    ``teacher`` describes a masked LM that saw the clean text of all domains; its losses are those
    in the cache, to 1/1024 nat. A sequence without a hard token has no masked position. Raise
    InputError for another kind of teacher.
    """

    def __init__(self, corpus: Corpus, config: MaskConfig, seed: int, teacher: TeacherInfo):
        _check_teacher(teacher)
        self.teacher = teacher
        model_identity = {
            "weights": teacher.fingerprints.get("weights"),
            "config": teacher.fingerprints.get("config"),
            "precision": teacher.precision,
        }
        # The hard tokens never change, so one replica is enough.
        super().__init__(corpus, config, seed, 1, {"teacher": model_identity})

    @property
    def share(self) -> float:
        """The largest share of a sequence that is masked."""
        return self.config.limit or 1.0

    def masked_positions(self, number: int, replica: int) -> Iterator[NDArray[np.int64]]:
        """Yield the positions to mask in each row of a corpus shard.

        Raise CacheMismatchError if the teacher's losses are missing.
        """
        infos = read_parts(self.corpus.store, self.teacher.name)
        for scalars in TeacherReader(self.corpus, infos).scalars(number, None):
            for positions, losses in scalars.losses():
                yield positions[hard_tokens(losses, self.config.loss_above, self.config.limit)]


def _check_teacher(teacher: TeacherInfo) -> None:
    if not teacher.sees_clean_text:
        raise InputError(
            f"cache.mask.teacher: {teacher.name!r} is a {teacher.task} teacher that saw "
            f"{teacher.view}; the losses of tokens it does see come from a masked_lm teacher with "
            "view: clean"
        )
    if teacher.domains is not None:
        raise InputError(
            f"cache.mask.teacher: {teacher.name!r} is only for the domains "
            f"{', '.join(teacher.domains)}, so nothing would be masked in any other text; cache "
            "it with domains: null"
        )
