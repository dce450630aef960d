"""How large the shards of a new corpus are."""

import pytest

from rekindle.data.corpus.packing import LEAST, MOST, SHARDS, usual_shard_size


def test_the_rule_for_every_size():
    before = LEAST
    for sequences in range(1, 2 * SHARDS * MOST, 7):
        size = usual_shard_size(sequences)
        assert LEAST <= size <= MOST
        assert size & (size - 1) == 0
        assert size >= before
        assert size == LEAST or sequences // size >= SHARDS
        assert size == MOST or sequences < 2 * size * SHARDS
        before = size
    assert before == MOST


@pytest.mark.parametrize(("sequences", "size"), [(None, 4096), (5_000, 256), (10**9, 4096)])
def test_sizes_that_users_meet(sequences, size):
    assert usual_shard_size(sequences) == size
