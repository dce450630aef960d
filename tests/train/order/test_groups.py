"""Steps of whole groups: each group once per epoch, whatever the sizes, the processes, the place to
go on from.
"""

from contextlib import closing

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rekindle.data.errors import InputError
from rekindle.train.order.groups import WholeGroups
from rekindle.train.order.held_out import Ranges
from rekindle.train.order.sequences import Order
from rekindle.train.order.stream import TrainingStream

sizes_of_groups = st.lists(st.integers(1, 6), min_size=1, max_size=20)


def order(sizes, batch, seed=0, scattered=False):
    """An order over groups of these sizes; ``scattered``: their sequences stand anywhere."""
    groups = np.repeat(np.arange(len(sizes)), sizes)
    if scattered:
        groups = np.random.default_rng(1).permutation(groups)
    numbers = np.arange(len(groups)) * 3 + 5
    return Order(Ranges.of(numbers), batch, seed, groups=WholeGroups(numbers, groups, seed)), dict(
        zip(numbers.tolist(), groups.tolist(), strict=True)
    )


@settings(max_examples=60, deadline=None)
@given(sizes_of_groups, st.integers(6, 20), st.booleans())
def test_every_group_is_read_whole_and_once_per_epoch(sizes, batch, scattered):
    one, group_of = order(sizes, batch, scattered=scattered)
    total, largest = sum(sizes), max(sizes)
    steps = 3 * total // batch + 4
    read = [one.at(step).tolist() for step in range(steps)]
    for numbers in read:
        assert batch - largest + 1 <= len(numbers) <= batch + largest - 1
        for group in {group_of[number] for number in numbers}:  # whole, as often as it is there
            there = [number for number in numbers if group_of[number] == group]
            assert len(there) % sizes[group] == 0
    flat = [number for numbers in read for number in numbers]
    assert abs(len(flat) - steps * batch) < largest  # as many as a step has, on average
    for start in range(0, len(flat) - total + 1, total):
        assert sorted(flat[start : start + total]) == sorted(group_of)


def test_each_epoch_and_seed_has_an_order_of_its_own():
    one, _ = order([3, 1, 4, 2, 5, 2, 3], 20)
    epochs = [one.at(step).tolist() for step in range(4)]
    assert len({tuple(numbers) for numbers in epochs}) == 4
    assert [one.epoch(step) for step in range(4)] == [0, 1, 2, 3]
    assert order([3, 1, 4, 2, 5, 2, 3], 20, seed=1)[0].at(0).tolist() != epochs[0]
    again, _ = order([3, 1, 4, 2, 5, 2, 3], 20)  # in any order of asking
    assert [again.at(step).tolist() for step in (3, 0, 2, 1)] == [epochs[i] for i in (3, 0, 2, 1)]


class FakeCache:
    def gather(self, index, teachers, **_):
        return index.tolist()


@pytest.mark.parametrize("world", [1, 2, 3])
def test_any_world_reads_the_same(world):
    sizes = [3, 1, 4, 2, 5, 2, 3]
    expected = [order(sizes, 12)[0].at(step).tolist() for step in range(9)]
    shares = []
    for rank in range(world):
        stream = TrainingStream(
            *(FakeCache(), order(sizes, 12)[0], lambda step: [], None),
            **{"rank": rank, "world_size": world, "threads": 3},
        )
        with closing(stream.steps(0, 9)) as steps:
            shares.append([batch for _, batch in steps])
    for step, numbers in enumerate(expected):
        assert sorted(n for share in shares for n in share[step]) == sorted(numbers)
        assert min(len(share[step]) for share in shares) > 0


@given(sizes_of_groups, st.integers(1, 7), st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_all_processes_make_equally_many_micro_batches(sizes, size, processes):
    """As many as the larger share takes; one sequence more than asked where that cannot be had."""
    one, _ = order(sizes, 12)
    for step in range(4):
        numbers = one.at(step)
        if len(numbers) < processes:
            continue
        count = one.micro_batches(step, size, processes)
        shares = [len(numbers[rank::processes]) for rank in range(processes)]
        assert 1 <= count <= min(shares)
        assert -(-max(shares) // count) <= max(size, 2 if size == 1 else size)


def test_shuffled_steps_have_the_micro_batches_they_had():
    one = Order(Ranges([(0, 40)]), 12, 0)
    assert [one.micro_batches(0, size, 2) for size in (1, 4, 5, 6, 99)] == [6, 2, 2, 1, 1]


def test_more_processes_than_a_step_may_have_sequences_are_refused():
    one, _ = order([6, 1, 1], 8)
    with pytest.raises(InputError, match=r"may have only 3, fewer than the 4 processes"):
        TrainingStream(FakeCache(), one, lambda step: [], None, world_size=4)
