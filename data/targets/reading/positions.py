"""Which positions of the text a vocabulary teacher has targets at."""

import numpy as np
from numpy.typing import NDArray

from rekindle.data.corpus.corpus import Corpus
from rekindle.data.storage.columns import split_lists
from rekindle.data.targets.schema import TeacherInfo
from rekindle.data.views.reader import ViewReader


def target_positions(
    corpus: Corpus, info: TeacherInfo, view: ViewReader | None, shard: int, replica: int | None
) -> list[NDArray[np.int64]]:
    """Return the positions of each row of a corpus shard, ascending.

    What the replica of a masked view masks; of a masked LM that sees the text as it is, all but
    special tokens. A causal LM's position t holds the distribution of token t + 1: the last has
    none.
    """
    if view is not None:
        masked = split_lists(view.batches(shard, replica), "positions")
        return [row.astype(np.int64) for row in masked]
    batches = [*corpus.shard(shard).batches()]
    if info.sees_clean_text:
        return [np.flatnonzero(starts >= 0) for starts in split_lists(batches, "char_starts")]
    return [np.arange(max(0, len(ids) - 1)) for ids in split_lists(batches, "input_ids")]
