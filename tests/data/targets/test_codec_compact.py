"""The compact profile: every integer comes back, hostile columns are refused, rows get smaller."""

import io

import duckdb
import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rekindle.data.errors import CacheFormatError
from rekindle.data.storage.columns import list_array, list_type, list_views, offsets_of
from rekindle.data.targets.codec import encode, fixed_point, high_bytes, high_planes
from rekindle.data.targets.codec_compact import HEAD_SIZE, compact_columns, from_compact, to_compact
from rekindle.data.targets.schema import rank_dtype

VOCABULARIES = [2, 300, 30_522, 65_536, 65_537, 128_256, 131_073, 262_144, 2**19]


def plain_types(k, temperatures, size):
    """The default columns as the cache describes them."""
    types = {"positions": (pa.uint16(), None), "ids": (pa.uint16(), k)}
    if high_bytes(size, k):
        types["ids_high"] = (pa.uint8(), high_bytes(size, k))
    return types | {
        "values": (pa.uint8(), k),
        "log_prob_max": (pa.uint16(), None),
        "log_prob_min": (pa.uint16(), None),
        "tail_log_odds": (pa.int16(), temperatures),
        "gold_log_prob": (pa.uint16(), None),
        "gold_rank": (pa.from_numpy_dtype(rank_dtype(size)), None),
        "entropy": (pa.uint16(), None),
    }


def wild(types, positions, size, seed):
    """Any integers the types allow, but for pad bits of the high planes."""
    draw = np.random.default_rng(seed)
    columns = {}
    for name, (dtype, width) in types.items():
        kind = np.dtype(dtype.to_pandas_dtype())
        info, shape = np.iinfo(kind), (positions,) if width is None else (positions, width)
        columns[name] = draw.integers(info.min, info.max, shape, kind, endpoint=True)
    if "ids_high" in columns:
        bits = draw.integers(0, 2, (positions, columns["ids"].shape[1] * high_planes(size)))
        columns["ids_high"] = np.packbits(bits.astype(np.uint8), axis=1, bitorder="little")
    return columns


def like_a_model(positions, k, size, seed=0):
    """Columns of rows that share their frequent ids, as a language model's do."""
    draw = np.random.default_rng(seed)
    slope = draw.uniform(1.1, 2.6, (positions, 1))
    logits = -slope * np.log(np.arange(1, 1001)) + draw.normal(0, 0.3, (positions, 1000))
    logits = -np.sort(-logits, axis=1)
    log_probs = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    topic = draw.permutation(size)[:300]
    common = np.floor(np.exp(draw.uniform(0, np.log(size), (positions, k)))).astype(np.int64)
    ids = np.where(draw.random((positions, k)) < 0.5, draw.choice(topic, (positions, k)), common)
    odds = [
        np.logaddexp.reduce(log_probs[:, :k] / t, axis=1)
        - np.logaddexp.reduce(log_probs[:, k:] / t, axis=1)
        for t in (1, 2, 4)
    ]
    encoded = encode(
        ids % size, log_probs[:, :k].astype(np.float32), np.stack(odds, 1).astype(np.float32), size
    )
    rank = np.minimum(draw.pareto(1, positions), 999).astype(np.int64)
    entropy = -(np.exp(log_probs) * log_probs).sum(axis=1)
    return encoded | {
        "positions": (np.arange(positions) % 512).astype(np.uint16),
        "gold_log_prob": fixed_point(-log_probs[np.arange(positions), rank].astype(np.float32)),
        "gold_rank": rank.astype(rank_dtype(size)),
        "entropy": fixed_point(entropy.astype(np.float32)),
    }


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, column in expected.items():
        assert found[name].dtype == column.dtype, name
        assert found[name].shape == column.shape, name
        assert np.array_equal(found[name], column), name


@settings(max_examples=150, deadline=None)
@given(
    size=st.one_of(st.sampled_from(VOCABULARIES), st.integers(1, 2**18)),
    k=st.integers(1, 70),
    positions=st.integers(0, 60),
    temperatures=st.integers(1, 4),
    seed=st.integers(0, 2**32),
)
def test_any_integers_come_back(size, k, positions, temperatures, seed):
    types = plain_types(k, temperatures, size)
    columns = wild(types, positions, size, seed)
    compact = to_compact(columns, size)
    assert_same(from_compact(compact, size), columns)
    described = compact_columns(types, size)
    assert list(described) == list(compact)
    for name, (dtype, width) in described.items():
        assert dtype == pa.uint8()
        assert compact[name].dtype == np.uint8
        assert compact[name].shape == (positions, width)


@pytest.mark.parametrize("size", VOCABULARIES)
@pytest.mark.parametrize("k", [1, HEAD_SIZE, HEAD_SIZE + 1, 64])
def test_the_ends_of_every_vocabulary_come_back(size, k):
    """All ids equal, all distinct, the largest: the table's shortest and longest."""
    for ids in (
        np.zeros((40, k), np.int64),
        np.full((40, k), size - 1),
        (np.arange(40 * k).reshape(40, k) * 7919) % size,
    ):
        columns = wild(plain_types(k, 3, size), 40, size, k)
        empty = np.zeros((40, k), np.float32)
        encoded = encode(ids, empty, empty[:, :1], size)
        columns["ids"] = encoded["ids"]
        if "ids_high" in encoded:
            columns["ids_high"] = encoded["ids_high"]
        assert_same(from_compact(to_compact(columns, size), size), columns)


@pytest.mark.parametrize("times", [3, 4])
def test_a_table_of_all_ids_and_none_come_back(times):
    """The largest table that V = 65,536 can have; then every id stands for itself."""
    columns = wild(plain_types(64, 1, 65_536), 1024 * times, 65_536, 0)
    ids = np.random.default_rng(0).permutation(65_536 * times) % 65_536
    columns["ids"] = ids.astype(np.uint16).reshape(-1, 64)
    compact = to_compact(columns, 65_536)
    size = compact["ids_table"].reshape(-1)[:4].view("<u4")[0]
    assert size == (65_536 if times == 4 else 0)
    assert_same(from_compact(compact, 65_536), columns)


def test_the_largest_place_comes_back():
    """An id that is rare beside a table of nearly all ids: the longest rest there is."""
    columns = wild(plain_types(64, 1, 65_536), 4096, 65_536, 0)
    ids = np.tile(np.arange(65_536), 4)
    ids[-2:] = 0
    columns["ids"] = ids.astype(np.uint16).reshape(-1, 64)
    compact = to_compact(columns, 65_536)
    assert compact["ids_class"].max() >> 4 == 13
    assert_same(from_compact(compact, 65_536), columns)


def test_columns_it_does_not_know_stay():
    columns = wild(plain_types(4, 1, 300), 5, 300, 0) | {"weight": np.arange(5.0)}
    assert_same(from_compact(to_compact(columns, 300), 300), columns)
    types = plain_types(4, 1, 300) | {"weight": (pa.float64(), None)}
    assert compact_columns(types, 300)["weight"] == (pa.float64(), None)


def test_a_vocabulary_too_large_for_its_classes_is_refused():
    with pytest.raises(ValueError, match="524,288"):
        compact_columns(plain_types(4, 1, 2**19 + 1), 2**19 + 1)


SIZES = st.sampled_from([300, 65_536, 65_537, 262_144])


@settings(max_examples=150, deadline=None)
@given(size=SIZES, k=st.integers(1, 20), positions=st.integers(0, 20), seed=st.integers(0, 2**32))
def test_any_bytes_are_read_or_refused(size, k, positions, seed):
    draw = np.random.default_rng(seed)
    types = plain_types(k, 2, size)
    sound = to_compact(wild(types, positions, size, seed), size)
    for name, column in sound.items():
        damaged = column.copy()
        damaged[draw.random(column.shape) < draw.choice([0.02, 1])] = draw.integers(0, 256)
        noise = draw.integers(0, 256, column.shape).astype(np.uint8)
        for hostile in (damaged, noise, np.full_like(column, 255)):
            try:
                found = from_compact(sound | {name: hostile}, size)
            except CacheFormatError:
                continue
            for plain, (dtype, width) in types.items():
                shape = (positions,) if width is None else (positions, width)
                assert found[plain].shape == shape
                assert found[plain].dtype == dtype.to_pandas_dtype()


@pytest.mark.parametrize("size", [300, 128_256])
def test_wrong_columns_are_refused(size):
    sound = to_compact(wild(plain_types(12, 3, size), 6, size, 0), size)
    for name, column in sound.items():
        rest = {n: c for n, c in sound.items() if n != name}
        for wrong in (
            column[:, :-1],
            column[:-1],
            np.concatenate([column, column], axis=1),
            column[:, :0],
            column.reshape(-1),
            column[None],
            column.astype(np.int64),
            column.astype(object),
        ):
            with pytest.raises(CacheFormatError):
                from_compact(rest | {name: wrong}, size)
        with pytest.raises(CacheFormatError):
            from_compact(rest, size)
    with pytest.raises(CacheFormatError):
        from_compact(sound, 70_000 if size == 300 else 300)


def test_places_beyond_the_vocabulary_or_the_table_are_refused():
    sound = to_compact(wild(plain_types(4, 1, 300), 6, 300, 0), 300)
    for kind in (16 * 13 - 1, 255):  # no table here: places up to 65,535, classes up to 192
        hostile = sound["ids_class"].copy()
        hostile[0, 0] = kind
        with pytest.raises(CacheFormatError, match="ids_class"):
            from_compact(sound | {"ids_class": hostile}, 300)
    hostile = sound["ids_table"].copy()
    hostile[0, :4] = 255
    with pytest.raises(CacheFormatError, match="ids_table"):
        from_compact(sound | {"ids_table": hostile}, 300)


def arrow_file(columns, lengths, level=None):
    """The bytes of an Arrow file of one record batch per 4,096 positions."""
    offsets = offsets_of(lengths)
    batch = pa.record_batch(
        [list_array(offsets, column) for column in columns.values()], names=list(columns)
    )
    codec = pa.Codec("zstd", compression_level=level) if level is not None else None
    sink = io.BytesIO()
    with pa.ipc.new_file(
        sink, batch.schema, options=pa.ipc.IpcWriteOptions(compression=codec)
    ) as file:
        file.write_batch(batch)
    return sink.getvalue()


@pytest.mark.parametrize(("size", "k"), [(30_522, 32), (128_256, 50)])
def test_a_compact_file_is_a_quarter_smaller_and_comes_back(size, k):
    columns, lengths = like_a_model(4096, k, size), [512] * 8
    compact = to_compact(columns, size)
    stored = arrow_file(compact, lengths, level=1)
    assert len(stored) <= 0.75 * len(arrow_file(columns, lengths))
    assert len(stored) <= 0.93 * len(arrow_file(columns, lengths, level=1))
    batch = pa.ipc.open_file(pa.py_buffer(stored)).get_batch(0)
    read = {name: list_views(batch.column(name), name)[1] for name in batch.schema.names}
    assert_same(from_compact(read, size), columns)


def test_other_tools_read_the_columns(tmp_path):
    columns = to_compact(like_a_model(100, 12, 70_000), 70_000)
    (tmp_path / "x.arrow").write_bytes(arrow_file(columns, [50, 0, 50], level=1))
    frame = pl.read_ipc(tmp_path / "x.arrow")
    arrow = pa.ipc.open_file(tmp_path / "x.arrow").read_all()
    for name, column in columns.items():
        assert frame.schema[name] == pl.List(pl.Array(pl.UInt8, column.shape[1]))
        read = np.concatenate([np.asarray(row) for row in frame[name].to_list() if row])
        assert np.array_equal(read, column)
        assert arrow.schema.field(name).type == list_type(pa.uint8(), column.shape[1])
    count = duckdb.sql("select sum(len(ids_class)), max(scalars_low[1][1]) from arrow").fetchall()
    assert count == [(100, max(columns["scalars_low"][[0, 50], 0]))]
