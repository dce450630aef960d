"""``masked-<fingerprint>``: per sequence and replica, the masked positions and the ids that stand
there; drawn here, or taken from a teacher's losses (``data/targets/reading/hard_masks.py``).
"""

from collections.abc import Iterator, Mapping
from itertools import islice, pairwise

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rekindle.data.corpus.corpus import Corpus
from rekindle.data.storage.columns import (
    Lists,
    ascend_within,
    list_array,
    list_type,
    list_views,
    offsets_of,
)
from rekindle.data.views.base import Lengths, StoredView
from rekindle.data.views.masking import (
    Draw,
    MaskConfig,
    MaskingVocabulary,
    chosen_positions,
    replace_tokens,
)


class MaskedView(StoredView):
    """The masked replicas of a corpus under one mask configuration and seed."""

    kind = "masked"
    tasks = ("masked_lm",)
    masked = True
    fields = (
        pa.field("digest", pa.string()),
        pa.field("positions", list_type(pa.uint16())),
        pa.field("input_ids", list_type(pa.int32())),
    )
    beside = "positions"

    def __init__(
        self,
        corpus: Corpus,
        config: MaskConfig,
        seed: int,
        replicas: int,
        decides: Mapping[str, object] | None = None,
    ):
        self.config, self.replicas = config, replicas
        if decides is None:
            # Replicas of `random` are independent and can be added to; `cover` deals tokens out
            # over all.
            decides = {"replicas": replicas if config.policy == "cover" else None}
        super().__init__(corpus, seed, {"mask": config.identity(), **decides})
        tokenizer = corpus.info["tokenizer"]
        special = frozenset(tokenizer["special_ids"])
        self.vocabulary = MaskingVocabulary.of(tokenizer["size"], tokenizer["mask_id"], special)

    @property
    def share(self) -> float:
        """About how much of a sequence is masked, at most."""
        return self.config.probability

    @classmethod
    def is_sound(cls, batch: pa.RecordBatch, beside: Lists, lengths: Lengths) -> bool:
        """Return whether positions ascend within their sequences."""
        return ascend_within(*beside, lengths)

    def masked_positions(self, number: int, replica: int) -> Iterator[NDArray[np.intp]]:
        """Yield the positions to be masked of each row of a corpus shard, ascending."""
        for batch in self.corpus.shard(number).batches():
            offsets, starts = list_views(batch["char_starts"], "char_starts")
            words = list_views(batch["word_starts"], "word_starts")[1]
            for digest, (a, b) in zip(batch["digest"].to_pylist(), pairwise(offsets), strict=True):
                draw = Draw(self.seed, digest, replica)
                content = starts[a:b] >= 0
                yield chosen_positions(content, words[a:b], self.config, draw, self.replicas)

    def _columns(self, number: int, replica: int | None) -> Iterator[list[pa.Array]]:
        which = replica or 0
        positions = self.masked_positions(number, which)
        for batch in self.corpus.shard(number).batches():
            offsets, ids = list_views(batch["input_ids"], "input_ids")
            chosen = list(islice(positions, len(batch)))
            rows = zip(batch["digest"].to_pylist(), pairwise(offsets), chosen, strict=True)
            seen = [
                replace_tokens(
                    ids[a:b], masked, self.vocabulary, self.config, Draw(self.seed, digest, which)
                )
                for digest, (a, b), masked in rows
            ]
            lists = offsets_of([len(row) for row in chosen])
            places = list_array(lists, np.concatenate(chosen).astype(np.uint16))
            yield [batch["digest"], places, list_array(lists, np.concatenate(seen))]
