"""``masked-<fingerprint>``: per sequence and replica, the masked positions and the ids put there;
drawn here, or taken from a teacher's losses (``data/targets/reading/hard_masks.py``).
"""

from collections.abc import Iterator, Mapping
from itertools import islice, pairwise

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rekindle.data.corpus.columns import trained_content
from rekindle.data.corpus.config import content_ids
from rekindle.data.corpus.corpus import Corpus
from rekindle.data.storage.columns import (
    Lists,
    ascend_within,
    list_type,
    list_views,
    split_lists,
)
from rekindle.data.views.base import Lengths, StoredView
from rekindle.data.views.masking import MaskConfig, Masker


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
    list_column = "positions"

    def __init__(
        self,
        corpus: Corpus,
        config: MaskConfig,
        seed: int,
        replicas: int,
        identity_facts: Mapping[str, object] | None = None,
    ):
        self.config, self.replicas = config, replicas
        if identity_facts is None:
            # Replicas of `random` are independent, so more can be added; `cover` divides tokens
            # among all.
            identity_facts = {"replicas": replicas if config.policy == "cover" else None}
        super().__init__(corpus, seed, {"mask": config.identity(), **identity_facts})
        facts = corpus.info["tokenizer"]
        self.masker = Masker(config, seed, replicas, facts["mask_id"], content_ids(facts))

    @property
    def shown_ids(self) -> NDArray[np.int64]:
        """Return the ids that may replace a sequence's own."""
        masker = self.masker
        random = masker.content_ids if self.config.random_token else masker.content_ids[:0]
        return np.append(random, masker.mask_id or 0).astype(np.int64)

    @property
    def share(self) -> float:
        """Return the approximate largest share of a sequence that is masked."""
        return self.config.probability

    @classmethod
    def is_valid_batch(cls, batch: pa.RecordBatch, lists: Lists, lengths: Lengths) -> bool:
        """Return whether positions ascend within their sequences."""
        return ascend_within(*lists, lengths)

    def masked_positions(self, number: int, replica: int) -> Iterator[NDArray[np.intp]]:
        """Yield the positions to mask in each row of a corpus shard, ascending."""
        for batch in self.corpus.shard(number).batches():
            words = split_lists([batch], "word_starts")
            rows = zip(trained_content(batch), words, batch["digest"].to_pylist(), strict=True)
            for content, starts, digest in rows:
                yield self.masker.positions(content, starts, digest, replica)

    def _columns(self, number: int, replica: int | None) -> Iterator[list[pa.Array]]:
        replica_number = replica or 0
        positions = self.masked_positions(number, replica_number)
        for batch in self.corpus.shard(number).batches():
            offsets, ids = list_views(batch["input_ids"], "input_ids")
            chosen = list(islice(positions, len(batch)))
            rows = zip(batch["digest"].to_pylist(), pairwise(offsets), chosen, strict=True)
            shown = [
                self.masker.replacements(ids[a:b], row_positions, digest, replica_number)
                for digest, (a, b), row_positions in rows
            ]
            places = pa.array(
                [row_positions.astype(np.uint16) for row_positions in chosen],
                list_type(pa.uint16()),
            )
            yield [batch["digest"], places, pa.array(shown, list_type(pa.int32()))]
