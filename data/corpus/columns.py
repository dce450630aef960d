"""The columns of a corpus's shards, one row per packed sequence; how they are stored is not said
here.
"""

import numpy as np
import pyarrow as pa

from rekindle.data.corpus.config import PackingFacts
from rekindle.data.corpus.rows import Rows
from rekindle.data.storage.columns import list_array, list_type, offsets_of

TYPES = "token_types"
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
    kept, too.
    """
    columns = PAIR_COLUMNS if "pair_field" in config else COLUMNS
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
    return pa.record_batch([columns[name] for name in schema.names], schema=schema)
