"""Which ids of a corpus are the same token to a model with its own tokenizer.

A tokenizer counts as another one only if an id of the corpus stands for another token: additional
chat tokens, padding to a round size, and tokens that no text of the corpus has do not matter.
"""

import numpy as np
from numpy.typing import NDArray

from rekindle.data.corpus.corpus import Corpus
from rekindle.data.corpus.tokenizer import Tokenizer
from rekindle.data.errors import InputError
from rekindle.data.storage.columns import list_views

SHOWN = 3  # ids that a message names
Ids = NDArray[np.int64]


def differing_ids(ours: Tokenizer, other: Tokenizer, rows: int | None = None) -> Ids:
    """Return the ids of ``ours`` that are another token, or none, to ``other``; ascending.

    ``rows``: of a model's embedding; ids past it are not tokens to it, whatever ``other`` says.
    """
    rows = other.size if rows is None else rows
    if ours.digest == other.digest and rows >= ours.size:
        return np.zeros(0, np.int64)
    mine = ours.tokens()
    same = {id for id, _ in mine & other.tokens() if id < rows}
    return np.array(sorted({id for id, _ in mine} - same), np.int64)


def unshared_ids(
    corpus: Corpus, other: Tokenizer, beside: Ids, who: str, advice: str, rows: int | None = None
) -> Ids:
    """Return the ids of the corpus's vocabulary that are another token, or none, to a model with
    the tokenizer ``other`` and that many ``rows`` in its embedding; ascending.

    Raises InputError, with ``who`` and ``advice``, if one of them occurs in the corpus or among the
    ids ``beside`` it, in its masks: it would be misread. Reads the ids of the whole corpus if there
    are any.
    """
    ours = corpus.tokenizer
    found = differing_ids(ours, other, rows)
    if not len(found):
        return found
    used = _occurring(corpus)
    used[beside] = True
    wrong = found[used[found]]
    if len(wrong) and rows is not None and not np.isin(wrong, differing_ids(ours, other)).any():
        raise InputError(
            f"{who} has {rows:,} rows in its embedding, fewer than its tokenizer has ids "
            f"({other.size:,}): the corpus has id {wrong[0]} "
            f"({ours.hf.convert_ids_to_tokens(int(wrong[0]))!r}), which has no row. Make the "
            "embedding larger (transformers' resize_token_embeddings) and train it, or use a "
            f"tokenizer without the tokens that were added. {advice}"
        )
    if len(wrong):
        told = described(ours, other, wrong, rows)
        raise InputError(
            f"{who} has another tokenizer than the corpus: {told}. It must have the same token "
            f"under every id that the corpus has (more tokens do not matter). {advice}"
        )
    return found


def described(ours: Tokenizer, other: Tokenizer, ids: Ids, rows: int | None = None) -> str:
    """Describe how many ids there are here and there, and what some of ``ids`` are."""
    size = other.size if rows is None else min(rows, other.size)
    here, there = (one.hf.convert_ids_to_tokens for one in (ours, other))

    def told(number: int) -> str:
        meant = there(number) if number < size else None
        is_there = "no token" if meant is None else repr(meant)
        return f"id {number} is {here(number)!r} here, {is_there} there"

    shown = "; ".join(map(told, ids[:SHOWN].tolist()))
    more = f"; and {len(ids) - SHOWN:,} more" if len(ids) > SHOWN else ""
    return f"{ours.size:,} ids here, {size:,} there; {shown}{more}"


def _occurring(corpus: Corpus) -> NDArray[np.bool_]:
    """Return which ids [size] occur in the sequences of the corpus."""
    used = np.zeros(corpus.info["tokenizer"]["size"], np.bool_)
    for shard in range(len(corpus.commits)):
        for batch in corpus.shard(shard).batches():
            offsets, ids = list_views(batch["input_ids"], "input_ids")
            used[ids[offsets[0] : offsets[-1]]] = True
    return used
