"""The scalars' own checksum: it moves with every value and with nothing else."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rekindle.data.errors import CacheFormatError
from rekindle.data.storage.columns import flat_lists, list_array, list_type, offsets_of
from rekindle.data.storage.shards import Shard, ShardSet, shard_schema
from rekindle.data.storage.store import LocalStore
from rekindle.data.targets.scalars import (
    FACT,
    ScalarChecksum,
    decode_scalars,
    read_scalars,
)
from rekindle.data.targets.schema import POSITIONED_SCALARS

TYPES = {
    "positions": np.uint16,
    "gold_log_prob": np.uint16,
    "gold_rank": np.uint16,
    "entropy": np.uint16,
}
FIELDS = [
    pa.field("digest", pa.string()),
    *(pa.field(name, list_type(pa.from_numpy_dtype(kind))) for name, kind in TYPES.items()),
    pa.field("ids", list_type(pa.uint16(), 3)),
]
SCHEMA = shard_schema(FIELDS, {"kind": "targets"})


def columns_of(counts, seed=0):
    draw = np.random.default_rng(seed)
    total = int(np.sum(counts))
    flat = {n: draw.integers(0, 1000, total).astype(kind) for n, kind in TYPES.items()}
    return flat | {"ids": draw.integers(0, 1000, (total, 3)).astype(np.uint16)}


def batch_of(counts, flat, digests=None):
    """A record batch of rows with so many positions each."""
    names = [f"{n:032x}" for n in range(len(counts))] if digests is None else digests
    offsets = offsets_of(counts)
    arrays = [pa.array(names, pa.string())]
    arrays += [list_array(offsets, flat[name]) for name in (*TYPES, "ids")]
    return pa.record_batch(arrays, schema=SCHEMA)


def sum_of(*batches):
    checksum = ScalarChecksum()
    assert list(checksum.pass_through(batches)) == list(batches)
    return checksum.facts().get(FACT)


COUNTS = [3, 0, 2, 4]


def test_the_sum_is_of_what_is_said():
    one = sum_of(batch_of(COUNTS, columns_of(COUNTS)))
    assert one == sum_of(batch_of(COUNTS, columns_of(COUNTS)))
    assert len(one) == 32


def test_the_targets_beside_them_do_not_count():
    flat = columns_of(COUNTS)
    changed = flat | {"ids": flat["ids"][::-1]}
    assert sum_of(batch_of(COUNTS, flat)) == sum_of(batch_of(COUNTS, changed))


@pytest.mark.parametrize("name", POSITIONED_SCALARS)
def test_every_bit_of_every_scalar_counts(name):
    flat = columns_of(COUNTS)
    seen = {sum_of(batch_of(COUNTS, flat))}
    for place in range(sum(COUNTS)):
        for bit in range(16):
            values = flat[name].copy()
            values[place] ^= 1 << bit
            seen.add(sum_of(batch_of(COUNTS, flat | {name: values})))
    assert len(seen) == 1 + 16 * sum(COUNTS)


def test_what_belongs_to_which_row_counts():
    flat = columns_of(COUNTS)
    divisions = [[3, 0, 2, 4], [0, 3, 2, 4], [3, 2, 0, 4], [9, 0, 0, 0], [0, 0, 0, 9]]
    assert len({sum_of(batch_of(counts, flat)) for counts in divisions}) == len(divisions)


def test_digests_and_their_order_count():
    flat = columns_of(COUNTS)
    names = [f"{n:032x}" for n in (1, 2, 3, 4)]
    orders = [names, names[::-1], [*names[:3], names[0]]]
    assert len({sum_of(batch_of(COUNTS, flat, order)) for order in orders}) == 3


def test_the_order_of_batches_counts():
    one, other = (batch_of([2], columns_of([2], seed)) for seed in (0, 1))
    assert len({sum_of(one, other), sum_of(other, one), sum_of(one), sum_of(one, one)}) == 4


def test_columns_exchanged_count():
    flat = columns_of(COUNTS)
    changed = flat | {"entropy": flat["gold_log_prob"], "gold_log_prob": flat["entropy"]}
    assert sum_of(batch_of(COUNTS, flat)) != sum_of(batch_of(COUNTS, changed))


def test_a_slice_sums_up_as_the_rows_it_shows():
    """Its offsets do not begin with 0, and its buffers hold more than it shows."""
    counts = [2, *COUNTS, 1]
    flat = columns_of(counts)
    digests = [f"{n:032x}" for n in range(6)]
    whole = batch_of(counts, flat, digests)
    part = {name: values[2 : 2 + sum(COUNTS)] for name, values in flat.items()}
    assert sum_of(whole.slice(1, 4)) == sum_of(batch_of(COUNTS, part, digests[1:5]))


def test_without_scalars_there_is_no_sum():
    plain = pa.record_batch([pa.array(["x"])], names=["digest"])
    assert ScalarChecksum().facts() == {}
    assert sum_of(plain) is None


# --- in a shard -----------------------------------------------------------------------------------


def write(folder, *batches, late=True) -> Shard:
    checksum = ScalarChecksum()
    shards = ShardSet(LocalStore(folder), "targets/t")
    facts = checksum.facts if late else dict
    commit = shards.write("00000", SCHEMA, checksum.pass_through(batches), late_facts=facts)
    return shards.open(commit)


def full(seed):
    """A record batch of 128 rows."""
    counts = np.random.default_rng(seed).integers(0, 4, 128).tolist()
    return batch_of(counts, columns_of(counts, seed))


def test_they_are_read_alone_and_equal_what_was_written(tmp_path):
    batches = [full(0), full(1), batch_of(COUNTS, columns_of(COUNTS, 2))]
    found = read_scalars(write(tmp_path, *batches))
    assert [b.schema.names for b in found] == [["digest", *POSITIONED_SCALARS]] * 3
    for one, other in zip(found, batches, strict=True):
        assert one.equals(other.select(["digest", *POSITIONED_SCALARS]))


def test_they_survive_the_way_through_a_file(tmp_path):
    """The sum that was committed is that of the batches read back: empty lists and all."""
    for number, counts in enumerate(([0, 0], [0], [5, 0, 0])):
        shard = write(tmp_path / str(number), batch_of(counts, columns_of(counts)))
        assert sum(b.num_rows for b in read_scalars(shard)) == len(counts)


def test_units_without_a_sum_are_read_as_a_whole(tmp_path):
    batches = [full(0), batch_of(COUNTS, columns_of(COUNTS))]
    shard = write(tmp_path, *batches, late=False)
    assert FACT not in shard.commit.facts
    found = read_scalars(shard)
    assert [b.to_pydict() for b in found] == [
        b.select(["digest", *POSITIONED_SCALARS]).to_pydict() for b in batches
    ]


def place_of(shard: Shard, number: int, column: str) -> tuple[int, int]:
    """Where the values of a column of a record batch lie in the file."""
    with pa.memory_map(str(shard.source.path)) as file:
        whole = file.read_buffer()
        array = pa.ipc.open_file(whole).get_batch(number)[column]
        while pa.types.is_list(array.type) or pa.types.is_fixed_size_list(array.type):
            array = array.values
        values = array.buffers()[1 if not pa.types.is_string(array.type) else 2]
        return values.address - whole.address, values.size


def overwrite(shard: Shard, number: int, column: str) -> None:
    first, size = place_of(shard, number, column)
    content = bytearray(shard.source.path.read_bytes())
    content[first : first + size] = bytes(byte ^ 0x55 for byte in content[first : first + size])
    shard.source.path.write_bytes(content)


@pytest.mark.parametrize("column", ["digest", *POSITIONED_SCALARS])
@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_changed_scalar_is_found(tmp_path, column, number):
    write(tmp_path, full(0), full(1), full(2))
    shards = ShardSet(LocalStore(tmp_path), "targets/t")
    overwrite(shards.open(shards.read_record("00000")), number, column)
    with pytest.raises(CacheFormatError):
        read_scalars(shards.open(shards.read_record("00000")))


@pytest.mark.parametrize("number", [0, 1, 2])
def test_changed_targets_beside_them_are_not_even_read(tmp_path, number):
    batches = [full(0), full(1), full(2)]
    write(tmp_path, *batches)
    shards = ShardSet(LocalStore(tmp_path), "targets/t")
    overwrite(shards.open(shards.read_record("00000")), number, "ids")
    found = read_scalars(shards.open(shards.read_record("00000")))
    assert [b.to_pydict() for b in found] == [
        b.select(["digest", *POSITIONED_SCALARS]).to_pydict() for b in batches
    ]
    with pytest.raises(CacheFormatError, match="checksum mismatch"):
        shards.open(shards.read_record("00000")).batch(number)


# --- decoding -------------------------------------------------------------------------------------


@settings(max_examples=50)
@given(st.lists(st.integers(0, 5), max_size=8), st.integers(0, 100))
def test_flat_columns_and_numbers(counts, seed):
    flat = columns_of(counts, seed)
    offsets, columns = flat_lists(batch_of(counts, flat), POSITIONED_SCALARS)
    assert np.diff(offsets).tolist() == counts
    assert columns.keys() == set(POSITIONED_SCALARS)
    found = decode_scalars(offsets, columns)
    assert found.offsets.dtype == np.int64
    assert np.array_equal(found.positions, flat["positions"])
    assert np.array_equal(found.gold_rank, flat["gold_rank"])
    assert np.allclose(found.gold_log_prob, -(flat["gold_log_prob"] / 1024.0), atol=1e-6)
    assert np.allclose(found.entropy, flat["entropy"] / 1024.0, atol=1e-6)
    assert found.gold_log_prob.dtype == found.entropy.dtype == np.float32


def test_flat_columns_of_a_slice():
    counts = [2, 3, 1, 4]
    flat = columns_of(counts)
    offsets, columns = flat_lists(batch_of(counts, flat).slice(1, 2), POSITIONED_SCALARS)
    assert offsets.tolist() == [0, 3, 4]
    assert np.array_equal(columns["entropy"], flat["entropy"][2:6])


def test_columns_of_other_lengths_are_refused():
    flat = columns_of([2, 1])
    batch = batch_of([2, 1], flat)
    other = list_array(offsets_of([1, 2]), flat["entropy"])
    wrong = batch.set_column(batch.schema.get_field_index("entropy"), "entropy", other)
    with pytest.raises(CacheFormatError, match="'entropy' has other list lengths"):
        flat_lists(wrong, POSITIONED_SCALARS)
