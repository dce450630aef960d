"""How large the shards of a new corpus are."""

import pytest

from rekindle.data.corpus.packing import (
    MAX_SHARD_SIZE,
    MIN_SHARD_SIZE,
    MIN_SHARDS,
    default_shard_size,
)


def test_the_rule_for_every_size():
    before = MIN_SHARD_SIZE
    for sequences in range(1, 2 * MIN_SHARDS * MAX_SHARD_SIZE, 7):
        size = default_shard_size(sequences)
        assert MIN_SHARD_SIZE <= size <= MAX_SHARD_SIZE
        assert size & (size - 1) == 0
        assert size >= before
        assert size == MIN_SHARD_SIZE or sequences // size >= MIN_SHARDS
        assert size == MAX_SHARD_SIZE or sequences < 2 * size * MIN_SHARDS
        before = size
    assert before == MAX_SHARD_SIZE


@pytest.mark.parametrize(("sequences", "size"), [(None, 4096), (5_000, 256), (10**9, 4096)])
def test_sizes_that_users_meet(sequences, size):
    assert default_shard_size(sequences) == size
