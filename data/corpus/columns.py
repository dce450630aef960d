"""The columns of a corpus's shards, one row per packed sequence, and what a shard's record says of
it; how they are stored is not said here.
"""

from collections import Counter
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rekindle.data.corpus.config import PackingFacts
from rekindle.data.corpus.rows import Rows
from rekindle.data.storage.columns import list_array, list_type, list_views, offsets_of
from rekindle.data.storage.shards import rows_in_batches

TYPES = "token_types"
TRAINED = "trained"
CUT = ("cut_pairs", "cut_tokens")  # facts of a shard's record, in a corpus of pairs
# The same of a corpus that has something else than texts: how many of its tokens are trained, how
# many sequences were left out that had none; dialogues that were cut, and tokens that they lost.
LEARNT = ("trained_tokens", "untrained_sequences", "cut_dialogues", "cut_tokens")
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
PAIR_COLUMNS = COLUMNS | {TYPES: list_type(pa.uint8())}


def fields_of(config: PackingFacts) -> list[pa.Field]:
    """The columns of a corpus that is made so, as a schema has them: of pairs the segments are
    kept, too; and what is trained, where that is not all.
    """
    columns = PAIR_COLUMNS if "pair_field" in config else COLUMNS
    if config.get("trained"):
        columns = columns | {TRAINED: list_type(pa.bool_())}
    return [pa.field(name, dtype) for name, dtype in columns.items()]


def record_batch(rows: Rows, schema: pa.Schema) -> pa.RecordBatch:
    """The columns of some sequences."""
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
        columns[TYPES] = list_array(tokens, rows.token_types.astype(np.uint8))
    if rows.trained is not None:
        columns[TRAINED] = list_array(tokens, rows.trained)
    return pa.record_batch([columns[name] for name in schema.names], schema=schema)


def record_batches(rows: Rows, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    """All record batches of a shard of those sequences."""
    for first, last in rows_in_batches(len(rows)):
        yield record_batch(rows.part(first, last), schema)


def learnt_content(batch: pa.RecordBatch) -> list[NDArray[np.bool_]]:
    """Which tokens [S] of each row of a corpus's record batch are trained and no special ones: what
    may be masked.
    """
    offsets, starts = list_views(batch["char_starts"], "char_starts")
    found = starts >= 0
    if TRAINED in batch.schema.names:
        found = found & list_views(batch[TRAINED], TRAINED)[1]
    return [found[a:b] for a, b in pairwise(offsets)]


def facts_of(rows: Rows, named: int) -> dict[str, object]:
    """What a shard's record says of it: how many tokens, sequences of each domain, documents with
    names of special tokens, pairs that were cut and tokens that they lost; where the next begins.
    """
    domains = Counter(domain for domain in rows.domains if domain is not None)
    facts: dict[str, object] = {"tokens": len(rows.input_ids), "next": rows.ends[-1].tolist()}
    facts["domains"] = dict(sorted(domains.items()))
    facts |= {"special_names": named} if named else {}
    cut = int(np.count_nonzero(rows.lost)), int(rows.lost.sum())
    if rows.token_types is not None:
        facts |= dict(zip(CUT, cut, strict=True))
    if rows.trained is not None:
        left_out = 0 if rows.untrained is None else int(rows.untrained.sum())
        facts |= dict(zip(LEARNT, (int(rows.trained.sum()), left_out, *cut), strict=True))
    return facts
