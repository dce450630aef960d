"""Masked views of what a teacher finds hard: self-evolution (Vega v2, 2022).

A masked LM that sees the text as it is gives every token a loss, which the cache keeps. Here the
tokens whose loss exceeds a threshold become the masked positions of a view like any other, so that
students read them as they read random masks. No model is run here.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rekindle.data.corpus.corpus import Corpus, unit_of
from rekindle.data.errors import InputError
from rekindle.data.storage.columns import list_views
from rekindle.data.storage.seal import seal
from rekindle.data.storage.shards import ROWS_PER_BATCH, ShardSet, describe
from rekindle.data.targets.files import read_parts
from rekindle.data.targets.reader import TeacherReader
from rekindle.data.targets.schema import TeacherInfo
from rekindle.data.views.masking import Mask, MaskConfig, replace_tokens
from rekindle.data.views.views import MaskedView, masked_batch, masking_vocabulary, view_fingerprint

ALGORITHM = 1  # raise it when masks would come out differently


def hard_tokens(
    losses: NDArray[np.float32], loss_above: float, limit: float | None = None
) -> NDArray[np.intp]:
    """Which of a sequence's tokens are masked, ascending, by their ``losses`` [P] in nats.

    Those above ``loss_above``; with a ``limit``, at most that share of all P (but at least one),
    the hardest first, and of equally hard ones the first.
    """
    hard = np.flatnonzero(losses > loss_above)
    if limit is None:
        return hard
    most = max(1, int(limit * len(losses) + 1e-9))  # 0.29 · 100 is a little less than 29
    return np.sort(hard[np.argsort(-losses[hard], kind="stable")[:most]])


class HardMaskedView:
    """The masked replica of a corpus in which one teacher's hard tokens are masked.

    ``teacher`` describes a masked LM that saw the clean text of all domains; its losses are those
    the cache keeps, to 1/1024 nat. A sequence without a hard token has no masked position. Raises
    InputError for another kind of teacher.
    """

    replicas = 1  # what is hard is the same every time

    def __init__(self, corpus: Corpus, config: MaskConfig, seed: int, teacher: TeacherInfo):
        _check_teacher(teacher)
        self.corpus, self.config, self.seed, self.teacher = corpus, config, seed, teacher
        self.identity: dict[str, Any] = {
            "algorithm": ALGORITHM,
            "mask": config.identity(),
            "seed": seed,
            "tokenizer": corpus.info["tokenizer"]["digest"],
            "teacher": {
                "weights": teacher.fingerprints.get("weights"),
                "config": teacher.fingerprints.get("config"),
                "precision": teacher.precision,
            },
        }
        self.name = f"masked-{view_fingerprint(self.identity)}"
        self.vocabulary = masking_vocabulary(corpus)
        self.shards = ShardSet(corpus.store, f"views/{self.name}")

    @property
    def share(self) -> float:
        """How much of a sequence is masked at most."""
        return self.config.limit or 1.0

    def build(self) -> None:
        """Write what is missing. CacheMismatchError where the teacher's losses are."""
        content = seal(self.identity | {"replicas": self.replicas})
        self.corpus.store.create(f"views/{self.name}/view.json", content)
        done = self.shards.committed()
        missing = [n for n in range(len(self.corpus.commits)) if unit_of(n, 0) not in done]
        for shard in missing:
            about = {"kind": "view", "view": self.name, "shard": shard, "replica": 0}
            schema = describe(list(MaskedView.FIELDS), about | self.identity)
            self.shards.write(unit_of(shard, 0), schema, self._batches(shard, schema))

    def hard_positions(self, shard: int) -> Iterator[NDArray[np.int64]]:
        """The positions to be masked of each row of a corpus shard."""
        infos = read_parts(self.corpus.store, self.teacher.name)
        # Record batches of the teacher and of the corpus may be of different sizes.
        for scalars in TeacherReader(self.corpus, infos, None).scalars(shard, None):
            losses = -scalars.gold_log_prob
            for start, stop in zip(scalars.offsets, scalars.offsets[1:], strict=False):
                part = slice(start, stop)
                hard = hard_tokens(losses[part], self.config.loss_above, self.config.limit)
                yield scalars.positions[part][hard]

    def _batches(self, number: int, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
        shard, hard = self.corpus.shard(number), list(self.hard_positions(number))
        for index in range(shard.batch_count):
            batch = shard.batch(index)
            first = index * ROWS_PER_BATCH
            masks = self._masks(batch, hard[first : first + len(batch)])
            yield masked_batch(batch["digest"], masks, schema)

    def _masks(self, batch: pa.RecordBatch, hard: list[NDArray[np.int64]]) -> list[Mask]:
        offsets, ids = list_views(batch["input_ids"], "input_ids")
        rows = zip(batch["digest"].to_pylist(), offsets, offsets[1:], hard, strict=False)
        return [
            replace_tokens(
                ids[a:b],
                chosen,
                self.vocabulary,
                self.config,
                seed=self.seed,
                digest=digest,
                replica=0,
            )
            for digest, a, b, chosen in rows
        ]


def _check_teacher(teacher: TeacherInfo) -> None:
    if not teacher.sees_clean_text:
        raise InputError(
            f"cache.mask.teacher: {teacher.name!r} is a {teacher.task} teacher that saw "
            f"{teacher.view}; the losses of tokens it does see come from a masked_lm teacher with "
            "view: clean"
        )
    if teacher.domains is not None:
        raise InputError(
            f"cache.mask.teacher: {teacher.name!r} is for the domains {', '.join(teacher.domains)} "
            "alone, so nothing would be masked in any other text; cache it with domains: null"
        )
