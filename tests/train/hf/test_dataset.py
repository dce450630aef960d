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


def test_a_state_of_another_order_is_refused(cache):
    state = IterableCacheDataset(cache, 4, seed=1).state_dict(consumed=3)
    with pytest.raises(InputError, match=r"a stream with seed 1, this one has 2"):
        IterableCacheDataset(cache, 4, seed=2).load_state_dict(state)
    with pytest.raises(InputError, match="after 3 sequences of the epoch, which 2 processes"):
        IterableCacheDataset(cache, 4, seed=1, world_size=2).load_state_dict(state)
    with pytest.raises(InputError, match="sequences are numbers 0 to 9999"):
        CacheDataset(cache, sequences=np.array([0, 9999]))
