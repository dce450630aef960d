"""Where each sequence stands in an epoch, on any number of processes and workers, and after one
was left.
"""

import numpy as np
import pytest
from torch.utils.data import DataLoader

from rekindle.data.errors import InputError
from rekindle.train.hf.dataset import CacheDataset, IterableCacheDataset


@pytest.fixture(scope="module")
def cache(causal_world):
    return causal_world.open()


def numbers(places):
    return [place.sequence for place in places if place.counts]


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_the_shares_are_an_epoch_in_the_order_of_the_cache(cache, world):
    """Batches of all ranks together are those of ``Cache.batches``; each sequence stands once."""
    for epoch in (0, 3):
        shares = [CacheDataset(cache, seed=5, rank=r, world_size=world) for r in range(world)]
        for share in shares:
            share.set_epoch(epoch)
        read = [[share[i] for i in range(len(share))] for share in shares]
        assert len({len(share) for share in read}) == 1
        assert {place.epoch for share in read for place in share} == {epoch}
        everything = sorted(number for share in read for number in numbers(share))
        assert everything == list(range(len(cache)))
        for n, batch in enumerate(cache.batches([], 4 * world, seed=5, epoch=epoch)):
            ours = [number for share in read for number in numbers(share[4 * n : 4 * n + 4])]
            assert sorted(ours) == sorted(batch.index.tolist())
    assert read[0] != [CacheDataset(cache, seed=6, epoch=3)[i] for i in range(len(read[0]))]


def collated(places):
    return list(places)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_goes_on_where_it_was_left(cache, workers):
    """Its batches are those of the map-style one, with workers too."""
    whole = CacheDataset(cache, seed=1, rank=1, world_size=2)

    def stream():
        return IterableCacheDataset(cache, 4, seed=1, rank=1, world_size=2)

    def loader(data):
        return DataLoader(data, 4, collate_fn=collated, num_workers=workers)

    data = stream()
    for epoch in (0, 1):
        whole.set_epoch(epoch)
        data.set_epoch(epoch)
        assert list(loader(data)) == list(DataLoader(whole, 4, collate_fn=collated))
    expected = list(loader(data_at := stream()))
    left, read = stream(), []
    for batch in loader(left):
        read.append(batch)
        if len(read) == 3:
            break
    state = left.state_dict(consumed=12 if workers else None)
    assert state["position"] == 12
    again = stream()
    again.load_state_dict(state)
    assert read + list(loader(again)) == expected
    if not workers:
        assert again.epoch == data_at.epoch == 1
        assert len(list(again)) == len(again)  # a whole epoch, the next


def test_an_epoch_that_was_read_to_its_end_has_no_places_left(cache):
    """Also for processes that do not divide it."""
    nine = np.arange(9)
    state = IterableCacheDataset(cache, 4, sequences=nine).state_dict(consumed=9)
    for rank in range(4):
        again = IterableCacheDataset(cache, 4, sequences=nine, rank=rank, world_size=4)
        again.load_state_dict(state)
        assert list(again) == []


def test_a_mask_is_no_list_of_numbers(cache):
    for given in (np.arange(len(cache)) < 3, [0.0, 2.0], [[0, 1]], 3):
        with pytest.raises(InputError, match=r"sequences has . dimensions of \w+; give a list of"):
            CacheDataset(cache, sequences=given)
    with pytest.raises(InputError, match="no sequence to train on"):
        CacheDataset(cache, sequences=[])


def test_a_state_of_another_order_is_refused(cache):
    state = IterableCacheDataset(cache, 4, seed=1).state_dict(consumed=3)
    with pytest.raises(InputError, match=r"a stream with seed 1, but this one has 2"):
        IterableCacheDataset(cache, 4, seed=2).load_state_dict(state)
    with pytest.raises(InputError, match="after 3 sequences of the epoch, which 2 processes"):
        IterableCacheDataset(cache, 4, seed=1, world_size=2).load_state_dict(state)
    for consumed in (-1, len(cache) + 4):  # 4 more than there are: not of this epoch alone
        with pytest.raises(
            ValueError, match=f"consumed is {consumed}; it counts only this epoch's"
        ):
            IterableCacheDataset(cache, 4, seed=1).state_dict(consumed=consumed)
    with pytest.raises(InputError, match="sequences are numbers 0 to 9999"):
        CacheDataset(cache, sequences=np.array([0, 9999]))


@pytest.mark.parametrize("batch", [3, 4])
def test_batches_of_similar_lengths_are_the_same_epoch(cache, batch):
    """On any number of processes whose batches are together as large; hardly padded."""

    def read(world, **more):
        settings = {"seed": 5, "epoch": 1, "batching": "similar_lengths"} | more
        shares = [
            CacheDataset(
                cache, rank=r, world_size=world, batch_sequences=2 * batch // world, **settings
            )
            for r in range(world)
        ]
        places = [[share[i] for i in range(len(share))] for share in shares]
        assert sorted(n for share in places for n in numbers(share)) == list(range(len(cache)))
        size = 2 * batch // world
        return [
            [n for share in places for n in numbers(share[start : start + size])]
            for start in range(0, len(places[0]), size)
        ]

    alone, shuffled = read(1), read(1, batching="shuffled")
    full = len(cache) // (2 * batch)  # what does not fill a batch of all stays at the end
    assert [sorted(b) for b in read(2)[:full]] == [sorted(b) for b in alone[:full]]
    assert {*alone[-1]} == {*shuffled[-1]} or len(cache) % (2 * batch) == 0
    assert read(1, epoch=2) != alone
    computed = [
        sum(int(cache.lengths(np.array(b)).max()) * len(b) for b in batches)
        for batches in (alone, shuffled)
    ]
    assert computed[0] < computed[1]


def test_similar_lengths_need_the_size_of_a_batch(cache):
    with pytest.raises(InputError, match="needs batch_sequences"):
        CacheDataset(cache, batching="similar_lengths")[0]
    with pytest.raises(ValueError, match="batching is 'sorted'"):
        CacheDataset(cache, batching="sorted")


def test_a_stream_of_similar_lengths_goes_on_in_the_same_order_alone(cache):
    def stream(batch, **more):
        return IterableCacheDataset(cache, batch, seed=1, **more)

    one = stream(4, batching="similar_lengths")
    taken = [place for _, place in zip(range(9), one, strict=False)]
    again = stream(4, batching="similar_lengths")
    again.load_state_dict(one.state_dict())
    assert taken + list(again) == list(stream(4, batching="similar_lengths"))
    for other in (stream(4), stream(3, batching="similar_lengths")):
        with pytest.raises(InputError, match="the state is of a stream that is of similar lengths"):
            other.load_state_dict(one.state_dict())
