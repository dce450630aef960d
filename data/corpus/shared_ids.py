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

MAX_NAMED = 3  # ids that a message names
Ids = NDArray[np.int64]


def differing_ids(tokenizer: Tokenizer, other: Tokenizer, rows: int | None = None) -> Ids:
    """Return the ids of ``tokenizer`` that are another token, or none, to ``other``; ascending.

    ``rows``: of a model's embedding; ids past it are not tokens to it, whatever ``other`` says.
    """
    rows = other.size if rows is None else rows
    if tokenizer.digest == other.digest and rows >= tokenizer.size:
        return np.zeros(0, np.int64)
    known = tokenizer.tokens()
    shared = {id for id, _ in known & other.tokens() if id < rows}
    return np.array(sorted({id for id, _ in known} - shared), np.int64)


def unshared_ids(
    corpus: Corpus,
    other: Tokenizer,
    extra_ids: Ids,
    subject: str,
    advice: str,
    rows: int | None = None,
) -> Ids:
    """Return the ids of the corpus's vocabulary that are another token, or none, to a model with
    the tokenizer ``other`` and that many ``rows`` in its embedding; ascending.

    Raises InputError, about ``subject`` and with ``advice``, if one of them occurs in the corpus or
    among the ``extra_ids`` of its masks: it would be misread. Reads the ids of the whole corpus if
    there are any.
    """
    tokenizer = corpus.tokenizer
    differing = differing_ids(tokenizer, other, rows)
    if not len(differing):
        return differing
    used = _used_ids(corpus)
    used[extra_ids] = True
    conflicting = differing[used[differing]]
    if (
        len(conflicting)
        and rows is not None
        and not np.isin(conflicting, differing_ids(tokenizer, other)).any()
    ):
        raise InputError(
            f"{subject} has {rows:,} rows in its embedding, fewer than its tokenizer has ids "
            f"({other.size:,}): the corpus has id {conflicting[0]} "
            f"({tokenizer.hf.convert_ids_to_tokens(int(conflicting[0]))!r}), which has no row. "
            "Make the embedding larger (transformers' resize_token_embeddings) and train it, or "
            f"use a tokenizer without the tokens that were added. {advice}"
        )
    if len(conflicting):
        difference = describe_difference(tokenizer, other, conflicting, rows)
        raise InputError(
            f"{subject} has another tokenizer than the corpus: {difference}. It must have the same "
            f"token under every id that the corpus has (more tokens do not matter). {advice}"
        )
    return differing


def describe_difference(
    tokenizer: Tokenizer, other: Tokenizer, ids: Ids, rows: int | None = None
) -> str:
    """Describe how many ids there are here and there, and what some of ``ids`` are."""
    size = other.size if rows is None else min(rows, other.size)
    token_here, token_there = (one.hf.convert_ids_to_tokens for one in (tokenizer, other))

    def describe_id(number: int) -> str:
        token = token_there(number) if number < size else None
        other_token = "no token" if token is None else repr(token)
        return f"id {number} is {token_here(number)!r} here, {other_token} there"

    examples = "; ".join(map(describe_id, ids[:MAX_NAMED].tolist()))
    more = f"; and {len(ids) - MAX_NAMED:,} more" if len(ids) > MAX_NAMED else ""
    return f"{tokenizer.size:,} ids here, {size:,} there; {examples}{more}"


def _used_ids(corpus: Corpus) -> NDArray[np.bool_]:
    """Return which ids [size] occur in the sequences of the corpus."""
    used = np.zeros(corpus.info["tokenizer"]["size"], np.bool_)
    for shard in range(len(corpus.commits)):
        for batch in corpus.shard(shard).batches():
            offsets, ids = list_views(batch["input_ids"], "input_ids")
            used[ids[offsets[0] : offsets[-1]]] = True
    return used
