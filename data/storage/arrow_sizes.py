"""Read the unpacked size of a compressed Arrow record batch, before unpacking it.

A few kB of zstd can stand for gigabytes of zeros. Arrow's Python API does not give the sizes, so
the few slots of its flatbuffers that hold them are read here, and nothing else. Source:
format/Message.fbs and format/File.fbs of Apache Arrow.
"""

import struct

import pyarrow as pa

RECORD_BATCH = 3  # MessageHeader
HEADER_TYPE, HEADER = 1, 2  # slots of Message
BUFFERS, COMPRESSION = 2, 3  # slots of RecordBatch


def unpacked_bytes(part: pa.Buffer, after_schema: bool) -> int:
    """Return the bytes the compressed buffers of the record batch at the start of ``part`` unpack
    to.

    ``after_schema``: the file's magic and its schema come first. 0 for an uncompressed batch. Raise
    struct.error, IndexError or ValueError if there is no record batch.
    """
    data = memoryview(part)
    at = 0
    if after_schema:
        at = 16 + _positive(data, 12)
    size = _positive(data, at + 4)
    head, body = data[at + 8 : at + 8 + size], at + 8 + size
    message = _positive(head, 0)
    kind, header = _slot(head, message, HEADER_TYPE), _slot(head, message, HEADER)
    if kind is None or header is None or head[kind] != RECORD_BATCH:
        raise ValueError("no record batch")
    batch = header + _positive(head, header)
    buffers = _slot(head, batch, BUFFERS)
    if _slot(head, batch, COMPRESSION) is None or buffers is None:
        return 0
    vector = buffers + _positive(head, buffers)
    total = 0
    for number in range(_positive(head, vector)):
        offset, length = struct.unpack_from("<qq", head, vector + 4 + 16 * number)
        if length:
            if offset < 0:
                raise ValueError("a buffer before its batch")
            total += max(0, struct.unpack_from("<q", data, body + offset)[0])
    return total


def _positive(data: memoryview, at: int) -> int:
    value: int = struct.unpack_from("<i", data, at)[0]
    if value < 0 or at < 0:
        raise ValueError("an offset below zero")
    return value


def _slot(data: memoryview, table: int, slot: int) -> int | None:
    """Return where a table's field lies, None if it has its default."""
    vtable = table - struct.unpack_from("<i", data, table)[0]
    if vtable < 0:
        raise ValueError("a table outside")
    if 4 + 2 * slot >= struct.unpack_from("<H", data, vtable)[0]:
        return None
    offset = struct.unpack_from("<H", data, vtable + 4 + 2 * slot)[0]
    return table + offset if offset else None
