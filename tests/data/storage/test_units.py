"""Units have the order of their numbers, also where these outgrow five digits."""

import random

import pyarrow as pa
import pytest

from rekindle.data.corpus.additions import count_left_out
from rekindle.data.source.left_out import LeftOut
from rekindle.data.source.record import BadRecord
from rekindle.data.storage.commits import Commit, Commits
from rekindle.data.storage.shards import ShardSet, shard_schema
from rekindle.data.storage.store import LocalStore
from rekindle.data.storage.units import arrow_array, place_of, sort_key, unit_of

SHARDS = [0, 1, 9, 10, 99_998, 99_999, 100_000, 100_001, 999_999, 1_000_000, 12_345_678]


def test_a_name_says_its_place_and_no_other_name_does():
    for shard in SHARDS:
        for replica in (None, 0, 7, 999, 1000):
            assert place_of(unit_of(shard, replica)) == (shard, replica)
    for name in ("", "1", "000001", "00001-r0000", "00001-r01", "00001-r001x", "٠٠٠٠١", "00001\n"):
        assert place_of(name) is None


def test_units_are_sorted_by_number_and_strangers_come_last():
    expected = [unit_of(shard) for shard in SHARDS]
    expected = [name for unit in expected for name in (unit, f"{unit}-r000", f"{unit}-r001")]
    expected += ["000001", "notes"]
    for seed in range(5):
        shuffled = random.Random(seed).sample(expected, len(expected))
        assert sorted(shuffled, key=sort_key) == expected


def test_a_set_lists_its_units_in_that_order(tmp_path):
    shards = ShardSet(LocalStore(tmp_path), "set")
    schema = shard_schema([pa.field("n", pa.int64())], {})
    units = [unit_of(shard) for shard in (100_001, 3, 99_999, 100_000)]
    for unit in units:
        shards.write(unit, schema, [pa.record_batch([pa.array([1])], schema=schema)])
    assert [*shards.committed()] == [units[1], units[2], units[3], units[0]]


@pytest.mark.parametrize("last", [99_998, 100_000])
def test_what_is_left_out_is_counted_up_to_the_last_shard(last):
    """Of a corpus that ends by its limit: the record before its last document counts, too."""
    left_out = LeftOut()
    for document in (3, 8):
        left_out.kept_documents = document
        left_out.add(BadRecord("not JSON", "line"))
    ends = {last - 1: [5, 0], last: [9, 2]}  # the document, and its token, that comes next
    committed = {
        unit_of(shard): Commit(unit_of(shard), "data/x", 1, 1, "", (), {"next": following})
        for shard, following in ends.items()
    }
    assert count_left_out(left_out, Commits(committed), end_sequence=2)[0] == {"not JSON": 2}


def test_texts_of_a_table_are_as_they_were():
    """Lengths are of bytes, not of characters; what is no text is escaped."""
    texts = ["é00", "", "a", "日本"]
    made = arrow_array([*texts, None, "\udcff"], pa.string())
    made.validate(full=True)
    assert made.to_pylist() == [*texts, None, "\\udcff"]
