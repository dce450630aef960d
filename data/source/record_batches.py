"""The record batches of parquet and Arrow files: read here, made into records wherever
one is sent.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from rekindle.data.errors import InputError
from rekindle.data.source.record import BadRecord, Record
from rekindle.data.storage.addresses import open_binary
from rekindle.data.storage.client import is_remote

ROWS_AT_A_TIME = 256  # bounds the number of Python objects when record batches are large

_Selection = tuple[pa.RecordBatch, list[str]]  # the wanted columns, and the names of all


@dataclass(frozen=True)
class Columns:
    """Rows of the file at ``place``; the first one's number is ``first``. ``fields`` are all that
    the file has.
    """

    place: str
    first: int
    rows: pa.RecordBatch
    fields: Sequence[str]

    @property
    def size(self) -> int:  # noqa: D102
        return int(self.rows.nbytes)

    def records(self) -> Iterator[Record | BadRecord]:  # noqa: D102
        unread = dict.fromkeys(self.fields)
        try:
            rows = self.rows.to_pylist()
        except UnicodeDecodeError:
            for index in range(self.rows.num_rows):
                yield _row_by_row(self.rows, index, self.first + index, self.place, unread)
            return
        yield from (Record(row, unread | of) for row, of in enumerate(rows, self.first))

    def __reduce__(self) -> tuple[object, ...]:
        # Arrow's own pickle sends the whole buffers that a slice lies in.
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, self.rows.schema) as writer:
            writer.write_batch(self.rows)
        return _unpickled, (self.place, self.first, sink.getvalue().to_pybytes(), self.fields)


def _unpickled(place: str, first: int, content: bytes, fields: Sequence[str]) -> Columns:
    return Columns(place, first, pa.ipc.open_stream(content).read_next_batch(), fields)


def column_blocks(
    place: str, table_format: str, requested: Sequence[str] | None
) -> Iterator[Columns]:
    """Yield the rows of a parquet or Arrow file, with the columns that are ``requested`` or may
    contain what is wanted under a dotted name.
    """
    batches = _parquet_batches if table_format == "parquet" else _arrow_batches
    first = 1
    for columns, fields in batches(place, requested):
        for begin in range(0, columns.num_rows, ROWS_AT_A_TIME):
            part = columns.slice(begin, ROWS_AT_A_TIME)
            yield Columns(place, first, part, fields)
            first += part.num_rows


def _row_by_row(
    columns: pa.RecordBatch, index: int, row: int, place: str, unread: dict[str, None]
) -> Record | BadRecord:
    """Return a row of columns some of which are not UTF-8, which Arrow does not check."""
    values: dict[str, object] = {}
    for name in columns.schema.names:
        try:
            values[name] = columns[name][index].as_py()
        except UnicodeDecodeError as error:
            return BadRecord(
                "not UTF-8",
                f"{place}, record {row}: the field {name!r} is not UTF-8 ({error.reason} at byte "
                f"{error.start + 1}); write the file again from text that is",
            )
    return Record(row, unread | values)


def _parquet_batches(path: str, requested: Sequence[str] | None) -> Iterator[_Selection]:
    with pq.ParquetFile(open_binary(path) if is_remote(path) else path) as file:
        fields = file.schema_arrow.names
        columns = columns_for(requested, fields, path)
        for batch in file.iter_batches(batch_size=ROWS_AT_A_TIME, columns=columns):
            yield batch, fields


def _arrow_batches(path: str, requested: Sequence[str] | None) -> Iterator[_Selection]:
    for batch in arrow_batches(path):
        fields = batch.schema.names
        columns = batch.select(columns_for(requested, fields, path))
        for column in columns.columns:
            _check_column(column)
        yield columns, fields


def columns_for(requested: Sequence[str] | None, fields: list[str], path: str) -> list[str]:
    """Return the columns that are wanted, or may contain what is wanted under a dotted name."""
    columns = [
        f
        for f in fields
        if requested is None or any(f == w or w.startswith(f"{f}.") for w in requested)
    ]
    repeated = next((name for name in columns if columns.count(name) > 1), None)
    if repeated:
        raise InputError(
            f"{path} has {columns.count(repeated)} columns called {repeated!r}, so it is unclear "
            "which is meant: rename them"
        )
    return columns


def _check_column(column: pa.Array) -> None:
    """Raise ArrowException for offsets that lead outside the buffers, as in a damaged file.

    Text that is not UTF-8 is not damage, and is found row by row.
    """
    as_bytes = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary()}.get(column.type)
    try:
        (column.view(as_bytes) if as_bytes else column).validate(full=True)
    except pa.ArrowInvalid as error:
        if "UTF8" not in str(error):
            raise


def arrow_batches(path: str) -> Iterator[pa.RecordBatch]:
    """Yield the record batches of an Arrow file, or of a stream in one; mapped, so that unused
    values are not read.
    """
    with pa.PythonFile(open_binary(path)) if is_remote(path) else pa.memory_map(path) as memory:
        is_file_format = memory.read(6) == b"ARROW1"
        memory.seek(0)
        if is_file_format:
            file = pa.ipc.open_file(memory)
            yield from (file.get_batch(number) for number in range(file.num_record_batches))
        else:
            yield from pa.ipc.open_stream(memory)
