"""Level B, descriptions: records, headers and the output matrix are changed."""

import hashlib
import json
import math

import numpy as np
import pyarrow as pa

from rekindle.data.storage.seal import SEAL, VERSION, seal
from rekindle.data.targets.kinds.registry import kind_of
from rekindle.data.targets.schema import TeacherInfo
from testlib.fuzz.signed import WORDS, batches_of, compression_of, rewrite
from testlib.fuzz.strangers import describe_as, sealed_record

DEEP = "deep nesting stands here"
ODD = [None, True, False, -1, 0, 1, 2, 3, 1.5, -0.0, 1e308, math.nan, math.inf, -math.inf]
ODD += [2**31 - 1, 2**31, -(2**63), 2**63 - 1, 2**63, 2**70, 10**12, 10**400]
ODD += ["", "x", "1", "../../x", "/etc/passwd", "a\0b", "\ud800", "a" * 5000, "masked-x", "pairs-x"]
ODD += ["masked-../../x", "topk", "tails", "dense", "hidden", "sequence", "token", "random"]
ODD += ["causal_lm", "masked_lm", "regression", "compact", "precise", DEEP]
ODD += [[], {}, [[]], [None], {"a": 1}, [1, 2, 3], {"shards": 3, "sequences": 9}, [0.0], [math.nan]]


def inner_paths(value, path=()):
    """Yield the path of everything in nested JSON, outer things first."""
    yield path
    items = value.items() if isinstance(value, dict) else ()
    for key, item in enumerate(value) if isinstance(value, list) else items:
        yield from inner_paths(item, (*path, key))


def json_changed(draw, value):
    """Return nested JSON with one to three places changed."""
    value = json.loads(json.dumps(value))
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        places = [p for p in inner_paths(value) if p]
        if not places:
            return draw.choice(ODD)
        depth = draw.choice(sorted({len(p) for p in places}))
        *outer, key = draw.choice([p for p in places if len(p) == depth])
        holder = value
        for part in outer:
            holder = holder[part]
        what = draw.random()
        if what < 0.15:
            del holder[key]
        elif what < 0.2 and isinstance(holder, list):
            holder.insert(key, holder[key])
        elif what < 0.25 and isinstance(holder, dict):
            holder[draw.choice(["x", "after", "part", "extends", "rows_per_batch", "scalars"])] = (
                draw.choice(ODD)
            )
        elif what < 0.4 and isinstance(holder[key], int):
            holder[key] += draw.choice([1, -1, 1000, -1000])
        elif what < 0.45:
            holder[key] = [holder[key]]
        elif what < 0.5:
            holder[key] = str(holder[key])
        else:
            holder[key] = draw.choice(ODD)
    return value


def as_file(content):
    """Write JSON that is nested a hundred thousand levels deep, which cannot be built as a
    value.
    """
    deep = b"[" * 100_000 + b"]" * 100_000
    return content.replace(json.dumps(DEEP).encode(), deep)


def record(stranger):
    """Change a commit record, and give it a right checksum."""
    path = stranger.record_of(stranger.draw.choice(stranger.data))
    body = json.loads(path.read_bytes())
    body.pop(SEAL)
    body = json_changed(stranger.draw, body)
    sealed = sealed_record(body) if isinstance(body, dict) else json.dumps(body).encode()
    stranger.write(path, as_file(sealed))
    if stranger.draw.random() < 0.5:
        stranger.roll_up({})


def descriptions(stranger):
    return [
        p
        for p in stranger.files
        if p.suffix == ".json"
        and not {"commits", "tokenizer"} & {*p.relative_to(stranger.root).parts}
    ]


def description(stranger):
    """Change a description, and give it a right seal."""
    path = stranger.draw.choice(descriptions(stranger))
    before = json.loads(path.read_bytes())
    body = {k: v for k, v in before.items() if k not in (SEAL, VERSION)}
    changed = json_changed(stranger.draw, body)
    whole = isinstance(changed, dict)
    content = describe_as(before, changed) if whole else json.dumps(changed).encode()
    stranger.write(path, as_file(content))


def agreed(stranger):
    """Change a description and all its shards in the same way."""
    draw = stranger.draw
    names = ("teacher.json", "corpus.json", "view.json")
    path = draw.choice([p for p in descriptions(stranger) if p.name in names])
    before = json.loads(path.read_bytes())
    body = {k: v for k, v in before.items() if k not in (SEAL, VERSION)}
    changed = json_changed(draw, body)
    if not isinstance(changed, dict) or json.dumps(DEEP) in json.dumps(changed):
        return description(stranger)
    stranger.write(path, describe_as(before, changed))
    chance = draw.random() < 0.3  # the columns change with the description
    for file in sorted((path.parent / "data").glob("*.arrow")):
        batches, schema = batches_of(file)
        about = json.loads(schema.metadata[b"rekindle"])
        if path.name == "teacher.json":
            about["teacher"] = changed
        else:
            about |= {key: value for key, value in changed.items() if key in about}
        schema = schema.with_metadata({"rekindle": json.dumps(about)})
        batches = [batch.replace_schema_metadata(schema.metadata) for batch in batches]
        if chance and path.name == "teacher.json":
            schema, batches = announced(changed, schema, batches)
        rewrite(stranger, file, schema, batches, compression_of(file))
    if path.name == "corpus.json":
        stranger.roll_up({})
    return None


def announced(described, schema, batches):
    """Return null or zero columns of the types that a changed description announces, if
    possible.
    """
    try:
        wanted = kind_of(TeacherInfo(**described)).schema({})
    except Exception:
        return schema, batches
    if any(str(field.type).count("[") and width_of(field.type) > 4096 for field in wanted):
        return schema, batches
    wanted = wanted.with_metadata(schema.metadata)
    remade = []
    for batch in batches:
        arrays = []
        for field in wanted:
            same = field.name in batch.schema.names and batch[field.name].type == field.type
            empty = [[]] * len(batch) if pa.types.is_list(field.type) else [None] * len(batch)
            arrays.append(batch[field.name] if same else pa.array(empty, field.type))
        remade.append(pa.RecordBatch.from_arrays(arrays, schema=wanted))
    return wanted, remade


def width_of(dtype):
    return getattr(dtype, "list_size", 1) * (
        width_of(dtype.value_type) if hasattr(dtype, "value_type") else 1
    )


def head(stranger):
    """Write another output matrix, or none, with its own sha256."""
    draw = stranger.draw
    path = draw.choice(list(stranger.root.glob("targets/*/head.safetensors")))
    from safetensors.numpy import load, save

    content = path.read_bytes()
    tensors = load(content)
    what = draw.choice(["bytes", "shape", "dtype", "values", "names", "bias", "header"])
    if what == "bytes":
        content = bytearray(content)
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        content = bytes(content)
    elif what == "header":
        start = draw.choice([0, 0, *range(8, 100)])
        word = draw.choice(WORDS).to_bytes(8, "little")
        content = content[:start] + word + content[start + 8 :]
    else:
        name = draw.choice(sorted(tensors))
        tensor = tensors[name]
        shapes = [tensor.T, tensor[:-1], tensor[..., :-1], tensor.reshape(-1), tensor[None]]
        changed = {
            "shape": draw.choice(shapes),
            "dtype": tensor.astype(draw.choice([np.float16, np.float64, np.int8, np.bool_])),
            "values": np.where(draw.random() < 2, tensor * np.nan, tensor),
            "names": tensor,
            "bias": tensor[:1],
        }[what]
        if what == "values":
            changed = tensor.copy()
            odd = [np.nan, np.inf, -np.inf, 3e38, -3e38]
            changed.flat[draw.randrange(changed.size)] = draw.choice(odd)
        if what == "names":
            tensors.pop(name)
            name = draw.choice(["x", "", "weights"])
        content = save(tensors | {name: np.ascontiguousarray(changed)})
    stranger.write(path, content)
    about = path.with_name("head.json")
    body = json.loads(about.read_bytes())
    kept = {k: v for k, v in body.items() if k not in (SEAL, VERSION)}
    stranger.write(about, seal(kept | {"sha256": hashlib.sha256(content).hexdigest()}))
