"""The columns of a corpus's shards, one row per packed sequence, and the facts in a shard's record.
How they are stored is not defined here.
"""

from collections import Counter
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rekindle.data.corpus.config import PackingFacts
from rekindle.data.corpus.rows import Rows
from rekindle.data.errors import CacheFormatError
from rekindle.data.storage.columns import list_array, list_type, list_views, offsets_of
from rekindle.data.storage.shards import rows_in_batches

Places = NDArray[np.int64]

TOKEN_TYPES = "token_types"
TRAINED = "trained"
GROUP = "group"
STARTS = "document_starts"
DOCUMENTS = "document_numbers"  # of each token; computed, not stored
CUT_FACTS = ("cut_pairs", "cut_tokens")  # facts in a shard's record, in a corpus of pairs
# The same for a corpus with other content than texts: how many tokens are trained, how many
# sequences were left out that had none; dialogues that were cut, and the tokens they lost.
TRAINED_FACTS = ("trained_tokens", "untrained_sequences", "cut_dialogues", "cut_tokens")
COLUMNS: dict[str, pa.DataType] = {
    "digest": pa.string(),
    "input_ids": list_type(pa.int32()),
    "char_starts": list_type(pa.int32()),
    "word_starts": list_type(pa.bool_()),
    "document_starts": list_type(pa.int32()),
    "document": pa.string(),
    "domain": pa.string(),
    "span_start": pa.int64(),
    "span_end": pa.int64(),
    "text": pa.string(),
    "bucket": pa.uint16(),
}
PAIR_COLUMNS = COLUMNS | {TOKEN_TYPES: list_type(pa.uint8())}


def fields_of(config: PackingFacts) -> list[pa.Field]:
    """Return the columns of such a corpus as a schema has them: also the segments of pairs; what is
    trained, if not everything; and the groups, if there are any.
    """
    columns = PAIR_COLUMNS if "pair_field" in config else COLUMNS
    if config.get("trained"):
        columns = columns | {TRAINED: list_type(pa.bool_())}
    if "group_field" in config:
        columns = columns | {GROUP: pa.string()}
    return [pa.field(name, dtype) for name, dtype in columns.items()]


def required_columns(config: PackingFacts) -> list[str]:
    """Return the columns besides the lists that are never null."""
    columns = ["digest", "document", "span_start", "span_end", "text", "bucket"]
    return [*columns, GROUP] if "group_field" in config else columns


def record_batch(rows: Rows, schema: pa.Schema) -> pa.RecordBatch:
    """Return the columns of some sequences."""
    tokens, pieces = offsets_of(rows.lengths), offsets_of(rows.pieces)
    columns = {
        "digest": pa.array(rows.digests, pa.string()),
        "input_ids": list_array(tokens, rows.input_ids),
        "char_starts": list_array(tokens, rows.char_starts),
        "word_starts": list_array(tokens, rows.word_starts),
        "document_starts": list_array(pieces, rows.document_starts),
        "document": pa.array(rows.documents, pa.string()),
        "domain": pa.array(rows.domains, pa.string()),
        "span_start": pa.array(np.ascontiguousarray(rows.spans[:, 0])),
        "span_end": pa.array(np.ascontiguousarray(rows.spans[:, 1])),
        "text": pa.array(rows.texts, pa.string()),
        "bucket": pa.array(rows.buckets),
    }
    if rows.token_types is not None:
        columns[TOKEN_TYPES] = list_array(tokens, rows.token_types.astype(np.uint8))
    if rows.trained is not None:
        columns[TRAINED] = list_array(tokens, rows.trained)
    if GROUP in schema.names:
        columns[GROUP] = pa.array(rows.groups, pa.string())
    return pa.record_batch([columns[name] for name in schema.names], schema=schema)


def record_batches(rows: Rows, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    """Yield all record batches of a shard with those sequences."""
    for first, last in rows_in_batches(len(rows)):
        yield record_batch(rows.part(first, last), schema)


def trained_content(batch: pa.RecordBatch) -> list[NDArray[np.bool_]]:
    """Return which tokens [S] of each row of a corpus's record batch are trained and not special:
    those that may be masked.
    """
    offsets, starts = list_views(batch["char_starts"], "char_starts")
    is_content = starts >= 0
    if TRAINED in batch.schema.names:
        is_content = is_content & list_views(batch[TRAINED], TRAINED)[1]
    return [is_content[a:b] for a, b in pairwise(offsets)]


def facts_of(rows: Rows, special_name_count: int) -> dict[str, object]:
    """Return the facts for a shard's record: its tokens, sequences of each domain, documents with
    names of special tokens, cut pairs and the tokens they lost; where the next shard begins.
    """
    domains = Counter(domain for domain in rows.domains if domain is not None)
    facts: dict[str, object] = {"tokens": len(rows.input_ids), "next": rows.ends[-1].tolist()}
    facts["domains"] = dict(sorted(domains.items()))
    facts |= {"special_names": special_name_count} if special_name_count else {}
    cut = int(np.count_nonzero(rows.lost)), int(rows.lost.sum())
    if rows.token_types is not None:
        facts |= dict(zip(CUT_FACTS, cut, strict=True))
    if rows.trained is not None:
        left_out = 0 if rows.untrained is None else int(rows.untrained.sum())
        facts |= dict(zip(TRAINED_FACTS, (int(rows.trained.sum()), left_out, *cut), strict=True))
    return facts


def word_characters(
    text: str, starts: NDArray[np.int32], words: NDArray[np.bool_]
) -> tuple[Places, Places]:
    """Return the positions that begin a word, and the first character of each that is not white
    space. ``starts`` and ``words`` [S] are the sequence's ``char_starts`` and ``word_starts``.

    Byte-level tokens start at the space before their word, where another tokenizer's token ends.
    """
    is_blank = np.array([*map(str.isspace, text), False])
    next_visible = np.where(is_blank, len(text), np.arange(len(text) + 1))
    next_visible = np.minimum.accumulate(next_visible[::-1])[::-1]
    places = np.flatnonzero(words & (starts >= 0))
    characters = next_visible[starts[places]]
    following = np.append(starts[places], len(text))[1:]
    # otherwise it is all white space
    has_word = characters < np.maximum(following, starts[places] + 1)
    return places[has_word], characters[has_word]


# --- several documents in a row -------------------------------------------------------------------


def document_numbers(batch: pa.RecordBatch) -> NDArray[np.int32]:
    """Return the number of the document in its row that each token of a record batch belongs to
    [L], from 0 in each row. What stands before the first document's start is its own.

    Raises CacheFormatError if documents do not begin one after another within their row.
    """
    offsets = list_views(batch["input_ids"], "input_ids")[0].astype(np.int64)
    lists, starts = list_views(batch[STARTS], STARTS)
    counts = np.diff(lists)
    starts = starts[lists[0] : lists[-1]].astype(np.int64)
    firsts = np.cumsum(counts) - counts
    row_of = np.repeat(np.arange(len(counts)), counts)
    lengths = np.diff(offsets)
    is_ascending = (np.diff(starts) > 0) | (np.diff(row_of) > 0)
    is_inside = (starts < lengths[row_of]).all() and is_ascending.all() and (starts >= 0).all()
    if not ((counts > 0).all() and is_inside):
        raise CacheFormatError("documents do not begin one after another within their sequences")
    starts[firsts] = 0
    begins = np.zeros(offsets[-1] - offsets[0], np.int32)
    begins[(offsets[:-1] - offsets[0])[row_of] + starts] = 1
    number = np.cumsum(begins, dtype=np.int32)
    row_first = number[offsets[:-1] - offsets[0]]
    return number - np.repeat(row_first, lengths)


def next_token_places(batch: pa.RecordBatch, packed: bool) -> list[Places]:
    """Return the positions of each row of a record batch whose next token, in the same document if
    rows are ``packed``, is trained.
    """
    offsets, _ = list_views(batch["input_ids"], "input_ids")
    is_trained = np.ones(offsets[-1] - offsets[0], np.bool_)
    if TRAINED in batch.schema.names:
        is_trained = list_views(batch[TRAINED], TRAINED)[1][offsets[0] : offsets[-1]]
    if packed and len(is_trained):
        numbers = document_numbers(batch)
        is_trained = is_trained & (np.diff(numbers, prepend=numbers[:1]) == 0)
    rows = pairwise((offsets - offsets[0]).tolist())
    return [np.flatnonzero(is_trained[a + 1 : b]) for a, b in rows]
