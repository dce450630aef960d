"""The columns of a corpus's shards, one row per packed sequence; how they are stored is not said
here.
"""

from collections.abc import Callable

import pyarrow as pa
import xxhash

from rekindle.data.corpus.config import PackingFacts
from rekindle.data.corpus.packing import Sequence as PackedSequence
from rekindle.data.storage.columns import list_type

BUCKETS = 10_000  # documents fall into these by hash: a stable sample is a range of them


def digest_of(sequence: PackedSequence) -> str:
    """The identity of an example: 128 bits over its token ids and its text, as 32 hex digits."""
    state = xxhash.xxh3_128(sequence.input_ids.astype("<i4").tobytes())
    state.update(sequence.text.encode("utf-8", "surrogatepass"))
    return str(state.hexdigest())


def _bucket(sequence: PackedSequence) -> int:
    document = sequence.document.encode("utf-8", "surrogatepass")
    return int(xxhash.xxh3_64_intdigest(document)) % BUCKETS


Column = tuple[pa.DataType, Callable[[PackedSequence], object]]
TYPES = "token_types"
COLUMNS: dict[str, Column] = {
    "digest": (pa.string(), digest_of),
    "input_ids": (list_type(pa.int32()), lambda sequence: sequence.input_ids),
    "char_starts": (list_type(pa.int32()), lambda sequence: sequence.char_starts),
    "word_starts": (list_type(pa.bool_()), lambda sequence: sequence.word_starts),
    "document_starts": (list_type(pa.int32()), lambda sequence: sequence.document_starts),
    "document": (pa.string(), lambda sequence: sequence.document),
    "domain": (pa.string(), lambda sequence: sequence.domain),
    "span_start": (pa.int64(), lambda sequence: sequence.span[0]),
    "span_end": (pa.int64(), lambda sequence: sequence.span[1]),
    "text": (pa.string(), lambda sequence: sequence.text),
    "bucket": (pa.uint16(), _bucket),
}
PAIR_COLUMNS = COLUMNS | {
    TYPES: (list_type(pa.uint8()), lambda sequence: sequence.token_types),
}


def columns_of(config: PackingFacts) -> dict[str, Column]:
    """The columns of a corpus that is made so: of pairs the segments are kept, too."""
    return PAIR_COLUMNS if "pair_field" in config else COLUMNS


def fields_of(config: PackingFacts) -> list[pa.Field]:
    """Those columns, as a schema has them."""
    return [pa.field(name, dtype) for name, (dtype, _) in columns_of(config).items()]
