"""A cache read by other libraries without our code, and targets written by strangers."""

import math

import numpy as np
import polars
import pyarrow as pa
import pytest

from rekindle.data.cache import Cache
from rekindle.data.storage.shards import ShardSet
from rekindle.data.storage.store import LocalStore
from rekindle.data.storage.units import unit_of
from rekindle.data.targets.codec import encode
from rekindle.data.targets.kinds.registry import kind_of
from rekindle.data.targets.schema import TeacherInfo
from testlib.models import NARROW

PER_SHARD = 140  # the first shard has two record batches
SMALL = NARROW | {"num_hidden_layers": 1}


def committed_files(cache):
    """Yield (what, first sequence of its corpus shard, path) for every shard of the cache."""
    sets = {"corpus": cache.corpus.shards}
    sets |= {name: view.shards for name, view in cache.views.items()}
    sets |= {name: teacher.main.shards for name, teacher in cache.teachers.items()}
    return [
        (name, cache.corpus.first(int(unit[:5])), shards.open(commit).source.path)
        for name, shards in sets.items()
        for unit, commit in shards.committed().items()
    ]


# --- readers that do not use our code -------------------------------------------------------------


def with_pyarrow(path, scratch):
    with pa.memory_map(str(path)) as source:
        return pa.ipc.open_file(source).read_all().to_pylist()


def with_polars_read(path, scratch):
    return plain(polars.read_ipc(path).to_dicts())


def with_polars_scan(path, scratch):
    return plain(polars.scan_ipc(path).collect().to_dicts())


def with_datasets(path, scratch):
    from datasets import load_dataset

    return list(
        load_dataset("arrow", data_files=[str(path)], split="train", cache_dir=str(scratch))
    )


def with_datasets_streaming(path, scratch):
    from datasets import load_dataset

    return list(
        load_dataset(
            "arrow",
            data_files=[str(path)],
            split="train",
            streaming=True,
            cache_dir=str(scratch),
        )
    )


def with_duckdb(path, scratch):
    import duckdb

    shard = pa.ipc.open_file(str(path)).read_all()
    with duckdb.connect() as connection:
        connection.register("shard", shard)
        found = connection.execute("SELECT * FROM shard")
        names = [column[0] for column in found.description]
        return [dict(zip(names, plain(row), strict=True)) for row in found.fetchall()]


def plain(value):
    """Turn whatever a reader returns into nested Python lists."""
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple | np.ndarray | polars.Series):
        return [plain(inner) for inner in value]
    return value


READERS = [
    with_polars_read,
    with_polars_scan,
    with_datasets,
    with_datasets_streaming,
    with_duckdb,
]


def decoded(row, teacher, temperature):
    """Decode a row's ids, log-probs and log tail as in data/targets/codec.py, in plain Python."""
    k, slot = teacher["k"], teacher["temperatures"].index(temperature)
    planes = max(0, (teacher["vocabulary_size"] - 1).bit_length() - 16)
    out = []
    for p in range(len(row["positions"])):
        ids = list(row["ids"][p])
        bits = [
            (byte >> bit) & 1 for byte in row.get("ids_high", [[]] * (p + 1))[p] for bit in range(8)
        ]
        for plane in range(planes):
            ids = [i + (bits[plane * k + n] << (16 + plane)) for n, i in enumerate(ids)]
        span = (row["log_prob_min"][p] - row["log_prob_max"][p]) / 1024
        relative = [-v / 255 * span / temperature for v in row["values"][p]]
        odds = row["tail_log_odds"][p][slot]
        kept = 1.0 if odds == 32767 else 1 / (1 + math.exp(-odds / 1024))
        tail = 0.0 if odds == 32767 else 1 / (1 + math.exp(odds / 1024))
        total = sum(math.exp(r) for r in relative)
        probs = [math.exp(r) / total * kept for r in relative]
        out.append((ids, probs, tail))
    return out


def check_tokens(target, row, teacher):
    assert target.positions.tolist() == row["positions"]
    assert target.gold_rank.tolist() == row["gold_rank"]
    for name in ("gold_log_prob", "entropy"):
        sign = -1 if name == "gold_log_prob" else 1
        assert getattr(target, name) == pytest.approx([sign * v / 1024 for v in row[name]])
    if teacher["kind"] == "dense":
        assert target.log_probs == pytest.approx(np.array(row["log_probs"]), abs=1e-5)
        return
    for temperature in teacher["temperatures"]:
        rows = decoded(row, teacher, temperature)
        assert np.exp(target.log_tail[temperature]) == pytest.approx([r[2] for r in rows])
    at_one = decoded(row, teacher, 1.0)
    assert target.ids.tolist() == [r[0] for r in at_one]
    assert np.exp(target.log_probs) == pytest.approx(np.array([r[1] for r in at_one]), rel=1e-4)


# --- large vocabularies, written by hand ----------------------------------------------------------


def write_teacher(path, name="big", size=200_000, k=5, change=None):
    """Write a top-k teacher of the clean view with random targets over a vocabulary of ``size``."""
    store = LocalStore(path)
    corpus = Cache.open(path).corpus
    info = TeacherInfo(
        name=name,
        task="causal_lm",
        kind="topk",
        view="clean",
        vocabulary_size=size,
        k=k,
        temperatures=(1.0, 2.0),
    )
    store.create(f"targets/{name}/teacher.json", info.model_dump_json().encode())
    draw = np.random.default_rng(0)
    kept = []
    for shard in range(len(corpus.commits)):
        table = corpus.shard(shard).table()
        lengths = [len(ids) - 1 for ids in table["input_ids"].to_pylist()]
        rows = np.repeat(np.arange(len(lengths)), lengths)
        positions = np.concatenate([np.arange(n) for n in lengths]).astype(np.uint16)
        ids = draw.integers(0, size, (len(rows), k))
        log_probs = np.sort(draw.normal(-3, 1, (len(rows), k)))[:, ::-1].astype(np.float32)
        odds = draw.normal(0, 2, (len(rows), 2)).astype(np.float32)
        scalars = {
            "gold_log_prob": np.zeros(len(rows), np.uint16),
            "gold_rank": np.zeros(len(rows), np.uint32),
            "entropy": np.zeros(len(rows), np.uint16),
        }
        columns = {"positions": positions} | encode(ids, log_probs, odds, size) | scalars
        if change is not None:
            change(columns)
        schema = kind_of(info).schema({"shard": shard, "replica": None})
        batches = kind_of(info).batches(schema, table["digest"].to_pylist(), rows, columns)
        facts = {"positions": len(rows), "tokens": 0}
        ShardSet(store, f"targets/{name}").write(unit_of(shard), schema, batches, facts)
        kept.append((rows, ids))
    return kept
