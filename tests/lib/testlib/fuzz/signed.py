"""Level B, shards: a stranger changes bytes, values and columns, and signs the result."""

import json
import math
import struct

import pyarrow as pa

# Level B: signed ----------------------------------------------------------------------------------
WORDS = [0, 1, 2, 3, 7, 8, 64, 127, 255, 2**15, 2**16, 2**24, 2**31 - 1, 2**31, 2**32 - 1]
WORDS += [2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64 - 8]


def footer_of(content):
    (length,) = struct.unpack("<i", content[-10:-6])
    return max(0, len(content) - 10 - length), len(content)


def metadata_of(content, regions):
    """Return the places where the file describes itself: schema, record batch heads, footer."""
    places = [footer_of(content)]
    starts = [8, *(offset for offset, _, _ in regions[1:-1])]
    (length,) = struct.unpack("<i", content[12:16])
    starts.append(16 + length)
    for start in starts:
        if start + 8 <= len(content):
            (length,) = struct.unpack("<i", content[start + 4 : start + 8])
            if 0 < length < len(content):
                places.append((start, min(len(content), start + 8 + length)))
    return places


def words(stranger):
    """Change words, mostly of the metadata: lengths, offsets, counts, types."""
    draw, path = stranger.draw, stranger.draw.choice(stranger.data)
    content = bytearray(path.read_bytes())
    regions = json.loads(stranger.record_of(path).read_bytes())["regions"]
    places = metadata_of(content, regions)
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        start, stop = draw.choice(places) if draw.random() < 0.85 else (0, len(content))
        size = draw.choice([1, 2, 4, 4, 8, 8])
        at = start + draw.randrange(max(1, stop - start - size)) // size * size
        old = int.from_bytes(content[at : at + size], "little")
        new = draw.choice(
            [*WORDS, old + 1, old - 1, old + 8, old * 2, old ^ 1 << draw.randrange(8)]
        )
        new = new % (1 << 8 * size)
        content[at : at + size] = new.to_bytes(size, "little")[: len(content[at : at + size])]
    stranger.commit(path, bytes(content))


def signed(change):
    """Apply a change of level A to a shard, with a record that agrees."""

    def changed(stranger):
        path = stranger.draw.choice(stranger.data)
        stranger.data, others = [path], stranger.data
        stranger.draw.random, chance = lambda: 0.0, stranger.draw.random
        try:
            change(stranger)
        finally:
            stranger.data = others
            stranger.draw.random = chance
        content = path.read_bytes()
        if content:
            stranger.commit(path, content)

    return changed


def exchanged_and_signed(stranger):
    """Use another unit's bytes, truthfully described: of another shard, replica, view or
    teacher.
    """
    first, second = stranger.draw.sample(stranger.data, 2)
    theirs = json.loads(stranger.record_of(second).read_bytes())
    cuts = [o + n for o, n, _ in theirs["regions"]]
    changes = {"rows": theirs["rows"]}
    if "rows_per_batch" in theirs:
        changes["rows_per_batch"] = theirs["rows_per_batch"]
    stranger.commit(first, second.read_bytes(), cuts, **changes)


def offsets(stranger):
    """Make one word of a list's or text's offsets wrong, and nothing else."""
    draw, path = stranger.draw, stranger.draw.choice(stranger.data)
    content = path.read_bytes()
    reader = pa.ipc.open_file(pa.py_buffer(content))
    batch = reader.get_batch(draw.randrange(reader.num_record_batches))
    column = batch[draw.choice([n for n in batch.schema.names if has_offsets(batch[n])])]
    known = column.buffers()[1].to_pybytes()[: 4 * (len(column) + 1)]
    at = content.find(known)
    if at < 0:  # compressed
        return words(stranger)
    slot = at + 4 * draw.randrange(len(column) + 1)
    (old,) = struct.unpack("<i", content[slot : slot + 4])
    new = draw.choice([0, -1, old + 1, old - 1, 10**6, 2**31 - 1, -(2**31), 2 * old])
    new = max(-(2**31), min(2**31 - 1, new))
    stranger.commit(path, content[:slot] + struct.pack("<i", new) + content[slot + 4 :])
    return None


def has_offsets(column):
    return pa.types.is_list(column.type) or pa.types.is_string(column.type)


def batches_of(path):
    reader = pa.ipc.open_file(pa.py_buffer(path.read_bytes()))
    return [reader.get_batch(i) for i in range(reader.num_record_batches)], reader.schema


def rewrite(stranger, path, schema, batches, compression=None, **options):
    """Rewrite a shard as Arrow writes it, with a true record."""
    sink = pa.BufferOutputStream()
    cuts = []
    settings = pa.ipc.IpcWriteOptions(compression=compression, **options)
    with pa.ipc.new_file(sink, schema, options=settings) as writer:
        for batch in batches:
            writer.write_batch(batch)
            cuts.append(sink.tell())
    content = sink.getvalue().to_pybytes()
    record = json.loads(stranger.record_of(path).read_bytes())
    rows = sum(batch.num_rows for batch in batches)
    changes = {"rows": rows if stranger.draw.random() < 0.8 else record["rows"]}
    stranger.commit(path, content, [*cuts, len(content)], **changes)


def compression_of(path):
    return "zstd" if b"ids_class" in path.read_bytes() else None


def leaf(draw, dtype, size):
    if pa.types.is_floating(dtype):
        return draw.choice([math.nan, math.inf, -math.inf, 1e38, -1e38, 0.0, None])
    if pa.types.is_boolean(dtype):
        return draw.choice([True, False, None])
    if pa.types.is_integer(dtype):
        low = -(2 ** (dtype.bit_width - 1)) if pa.types.is_signed_integer(dtype) else 0
        high = 2**dtype.bit_width - 1 + low
        wild = [low, high, 0, 1, size, size - 1, draw.randint(low, high), None]
        return draw.choice([w for w in wild if w is None or low <= w <= high])
    return draw.choice(["", "x", "\ufffd" * 9, "ü" * 100, None])


def other_value(draw, value, dtype, size):
    """Return ``value`` of an Arrow type with something in it changed."""
    if not hasattr(dtype, "value_type"):
        return leaf(draw, dtype, size)
    if value is None:
        return [[], None][draw.randrange(2)] if pa.types.is_list(dtype) else None
    fixed = pa.types.is_fixed_size_list(dtype)
    kind = draw.random()
    if not fixed and kind < 0.1:
        return value[: draw.randrange(len(value) + 1)]
    if not fixed and kind < 0.2:
        return (
            value + [value[-1]] * draw.choice([1, 2, 70_000 if len(value) < 3 else 9])
            if value
            else None
        )
    if not value or (not fixed and kind < 0.25):
        return None
    value = list(value)
    at = draw.randrange(len(value))
    value[at] = other_value(draw, value[at], dtype.value_type, size)
    return value


def values(stranger):
    """Change cells: extremes, nulls, NaN, longer and shorter lists."""
    draw, path = stranger.draw, stranger.draw.choice(stranger.data)
    batches, schema = batches_of(path)
    number = draw.randrange(len(batches))
    columns = {n: batches[number][n].to_pylist() for n in schema.names}
    size = draw.choice([24, 300, 200_000])
    for _ in range(draw.choice([1, 1, 2, 20])):
        name = draw.choice(schema.names)
        row = draw.randrange(len(columns[name]))
        columns[name][row] = other_value(draw, columns[name][row], schema.field(name).type, size)
    if draw.random() < 0.3:
        same_lengths(draw, columns, schema)
    arrays = [pa.array(columns[n], schema.field(n).type) for n in schema.names]
    batches[number] = pa.record_batch(arrays, schema=schema)
    rewrite(stranger, path, schema, batches, compression_of(path))


def same_lengths(draw, columns, schema):
    """Make all lists of one row shorter or longer together."""
    lists = [field.name for field in schema if pa.types.is_list(field.type)]
    row = draw.randrange(len(next(iter(columns.values()))))
    more = draw.random() < 0.5
    for name in lists:
        value = columns[name][row]
        if value:
            columns[name][row] = [*value, value[-1]] if more else value[:-1]


def retyped(draw, array):
    """Return the same values as another type, as far as possible."""
    kinds = [
        pa.large_string(),
        pa.string_view(),
        pa.binary(),
        pa.int64(),
        pa.float32(),
        pa.null(),
        pa.dictionary(pa.int32(), pa.string()),
        pa.list_(pa.int64()),
        pa.list_(pa.string()),
        pa.large_list(pa.int32()),
        pa.list_view(pa.int32()),
        pa.list_(pa.int32(), 3),
        pa.struct([("a", pa.int32())]),
        pa.uint16(),
        pa.float64(),
        pa.bool_(),
        pa.run_end_encoded(pa.int32(), pa.string()),
        pa.map_(pa.string(), pa.int32()),
        pa.decimal128(5, 2),
        pa.timestamp("s"),
    ]
    kind = draw.choice(kinds)
    try:
        return pa.array(array.to_pylist(), kind)
    except (pa.ArrowException, TypeError, ValueError, NotImplementedError, OverflowError):
        try:
            return pa.nulls(len(array), kind)
        except pa.ArrowException:
            return pa.nulls(len(array))


def columns_changed(stranger):
    """Change the columns: fewer, doubled, in another order, of another type or name."""
    draw, path = stranger.draw, stranger.draw.choice(stranger.data)
    batches, schema = batches_of(path)
    names = list(schema.names)
    at = draw.randrange(len(names))
    what = draw.choice(["drop", "twice", "order", "rename", "type", "type", "type", "extension"])
    arrays = [[batch.column(i) for i in range(len(names))] for batch in batches]
    if what == "drop":
        names.pop(at)
        _ = [row.pop(at) for row in arrays]
    elif what == "twice":
        names.append(names[at])
        _ = [row.append(row[at]) for row in arrays]
    elif what == "order":
        order = draw.sample(range(len(names)), len(names))
        names = [names[i] for i in order]
        arrays = [[row[i] for i in order] for row in arrays]
    elif what == "rename":
        names[at] = draw.choice(["", "x", *names])
    elif what == "type":
        state = draw.getstate()
        for row in arrays:
            draw.setstate(state)
            row[at] = retyped(draw, row[at])
        if len({str(row[at].type) for row in arrays}) > 1:
            arrays = [[*row[:at], pa.nulls(len(row[at])), *row[at + 1 :]] for row in arrays]
    fields = [pa.field(n, a.type) for n, a in zip(names, arrays[0], strict=True)]
    if what == "extension":
        of = draw.choice(["arrow.uuid", "arrow.json", "arrow.opaque", "arrow.py_extension_type"])
        about = {"ARROW:extension:name": of, "ARROW:extension:metadata": "x"}
        fields[at] = fields[at].with_metadata(about)
    changed = pa.schema(fields, metadata=schema.metadata)
    remade = [pa.RecordBatch.from_arrays(row, schema=changed) for row in arrays]
    rewrite(stranger, path, changed, remade, compression_of(path))


def batches_changed(stranger):
    """Change record batches: doubled, left out, cut, joined, reordered, compressed, of an old
    format.
    """
    draw, path = stranger.draw, stranger.draw.choice(stranger.data)
    batches, schema = batches_of(path)
    what = draw.choice(
        ["none", "twice", "less", "cut", "join", "order", "zstd", "lz4", "v4", "stream"]
    )
    at = draw.randrange(len(batches))
    options = {"compression": compression_of(path)}
    if what == "none":
        batches = []
    elif what == "twice":
        batches.insert(at, batches[at])
    elif what == "less":
        batches.pop(at)
    elif what == "cut":
        size = batches[at].num_rows // 2
        batches[at : at + 1] = [batches[at].slice(0, size), batches[at].slice(size)]
    elif what == "join":
        batches = pa.Table.from_batches(batches).combine_chunks().to_batches()
    elif what == "order":
        draw.shuffle(batches)
    elif what in ("zstd", "lz4"):
        options["compression"] = what
    elif what == "v4":
        options["metadata_version"] = pa.ipc.MetadataVersion.V4
    else:
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, schema) as writer:
            _ = [writer.write_batch(batch) for batch in batches]
        return stranger.commit(path, sink.getvalue().to_pybytes())
    return rewrite(stranger, path, schema, batches, **options)
