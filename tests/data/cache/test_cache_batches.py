"""Batches give each sequence once, and are their examples."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from rekindle.data.cache import Cache
from rekindle.data.errors import InputError
from rekindle.data.example import TokenTargets
from rekindle.data.targets.reading import reader as teacher_reader
from testlib.cache_format import PER_SHARD


def test_batches_give_each_sequence_once_over_all_ranks(cache):
    for epoch in (0, 1):
        seen = []
        for rank in range(3):
            for batch in cache.batches(
                ["mlm", "clm"], 16, seed=4, epoch=epoch, rank=rank, world_size=3
            ):
                assert batch.masked.replica == epoch
                seen += batch.index.tolist()
        assert sorted(seen) == list(range(len(cache)))


def test_a_batch_is_its_examples(cache):
    """Whatever the order and the batch size, a row has the targets of its sequence."""
    index = np.array([PER_SHARD + 1, 3, PER_SHARD - 1, 3, 0])
    batch = cache.gather(index, list(cache.teachers), epoch=1, masked_view=cache.masked_view().name)
    examples = [cache.example(int(i)) for i in index]
    assert batch.digests == [e.digest for e in examples]
    assert batch.domains == [e.domain for e in examples]
    for number, example in enumerate(examples):
        length = batch.lengths[number]
        assert batch.input_ids[number, :length].tolist() == example.input_ids.tolist()
        assert batch.attention_mask[number].sum() == length
        for name, target in batch.targets.items():
            expected = example.targets[name]
            if hasattr(target, "present"):
                assert target.present[number] == bool(expected)
                assert not expected or np.array_equal(target.logits[number], expected[0].logits)
                continue
            mine = target.rows == number
            one = expected[1] if cache.teacher(name).masked else expected[0]
            assert np.array_equal(target.positions[mine], one.positions)
            if isinstance(one, TokenTargets):
                assert np.array_equal(target.decode()[1][mine], one.log_probs)
    for name, pairs in batch.pairs.items():
        for number, example in enumerate(examples):
            assert (pairs.lengths[number] > 0) == (example.pairs[name] is not None)


def test_dense_targets_with_tokens_that_cannot_occur(cache):
    """Reading fewer candidates than can occur leaves a tail, reading more leaves none: not NaN."""
    found = cache.gather(np.arange(2), ["dense"], masked_view=cache.masked_view().name).targets[
        "dense"
    ]
    log_probs = np.full((2, found.info.vocabulary_size), -np.inf, np.float32)
    log_probs[:, [7, 3]] = np.log([0.25, 0.75])
    few = type(found)(found.info, found.rows[:2], found.positions[:2], {"log_probs": log_probs})
    for k, tail in ((1, 0.25), (2, 0.0), (5, 0.0)):
        ids, kept, log_tail = few.decode(1.0, k)
        assert ids[0, : min(k, 2)].tolist() == [3, 7][: min(k, 2)]
        assert np.exp(log_tail) == pytest.approx(tail, abs=1e-6)
        assert np.exp(kept).sum(axis=1) == pytest.approx(1 - tail, abs=1e-6)
    ids, kept, log_tail = found.decode(2.0)
    assert np.array_equal(ids[0], np.arange(found.info.vocabulary_size))
    assert np.exp(kept).sum(axis=1) == pytest.approx(1, abs=1e-5)
    assert (log_tail == -np.inf).all()


def test_what_can_be_asked_of_a_teacher(cache):
    found = cache.gather(np.arange(2), ["clm"]).targets["clm"]
    with pytest.raises(InputError, match=r"stores the temperatures \[1.0, 3.0\], not 2.0"):
        found.decode(2.0)
    for k in (0, 6):
        with pytest.raises(ValueError, match=r"1\.\.5"):
            found.decode(1.0, k)
    assert cache.teachers["clm"].k == 5
    assert cache.teachers["expert"].label_names == ("LABEL_0", "LABEL_1", "LABEL_2")
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        assert cache.teachers["clm"].nothing


class Slow(dict):
    """Gives other threads time between a look at the entries and what comes of it."""

    def __iter__(self):
        found = super().__iter__()
        time.sleep(0.1)
        return found

    def __setitem__(self, key, value):
        time.sleep(0.1)
        super().__setitem__(key, value)


def test_threads_that_read_ahead_keep_to_what_may_be_held(made, monkeypatch):
    """Two threads decode at a time: neither meets the other's insertion, nor is one kept more."""
    monkeypatch.setattr(teacher_reader, "DECODED_BATCHES", 1)
    reader = Cache.open(made).teachers["expert"]
    assert reader.kind.is_copied_on_read
    reader._lists = Slow()
    reader.row_lists(0, 0)
    decode, both = reader._read, threading.Barrier(2, timeout=30)

    def together(*key):
        found = decode(*key)
        both.wait()
        return found

    monkeypatch.setattr(reader, "_read", together)
    with ThreadPoolExecutor(2) as pool:
        read = list(pool.map(reader.row_lists, (0, 1), (1, 0)))
    assert len(reader._lists) == 1
    assert any(lists is read[0] or lists is read[1] for lists in reader._lists.values())
