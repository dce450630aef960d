"""What a run trains on and is evaluated on: every index, any world, any place to go on from."""

from contextlib import closing

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rekindle.data.errors import InputError
from rekindle.data.permutation import permute
from rekindle.data.settings import parse_settings
from rekindle.train.config import TrainConfig
from rekindle.train.order.held_out import Ranges, split_corpus
from rekindle.train.order.replay import Replay
from rekindle.train.order.sequences import Order, choose_sequences
from rekindle.train.order.stream import TrainingStream

NEW = Ranges([(0, 11), (30, 36)])
EASY = Ranges([(3, 8)])
MEMORIES = {"a": Ranges([(100, 107)]), "b": Ranges([(200, 203)])}
FIRST = 9  # steps of the curriculum's part


def numbers_of(sequences):
    return sequences.select(np.arange(len(sequences), dtype=np.int64)).tolist()


def order(batch=6, every=3, fraction=0.3, first=True):
    replay = Replay(MEMORIES, fraction, batch, 0, every)
    return Order(NEW, batch, 0, EASY if first else None, FIRST if first else 0, replay)


class FakeCache:
    """Hands out the indices it is asked for, with the epoch of their masks."""

    def gather(self, index, teachers, *, epoch, masked_view, allow_missing, scalars):
        return index.tolist(), epoch


def losses(done):
    return {"ce/a": 1 / done, "ce/b": 2 - done % 4 / 10}


def read(one, start, stop, every=3, **world):
    """What a stream gives, told of its evaluations as the loop tells it."""
    stream = TrainingStream(FakeCache(), one, lambda step: [], None, **world)
    found = []
    with closing(stream.steps(start, stop)) as steps:
        for step, batch in steps:
            assert stream.order.at(step).tolist()[stream.rank :: stream.world_size] == batch[0]
            found.append(batch)
            if (step + 1) % every == 0:
                one.replay.learn(step + 1, losses(step + 1))
    return found


# --- phases and replay ---


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(0, 12), st.sampled_from([None, 0.1, 0.5]), st.integers(1, 20))
def test_every_sequence_is_read_once_per_epoch_of_its_phase(batch, first, fraction, size):
    """Replayed ones aside, which stand at the end of each batch."""
    whole, part = Ranges([(0, size)]), Ranges([(0, max(1, size // 2))])
    replay = None if fraction is None else Replay(MEMORIES, fraction, batch, 0)
    one = Order(whole, batch, 0, part, first, replay)
    steps = first + 3 * size
    own = [[n for n in one.at(step).tolist() if n < 100] for step in range(steps)]
    assert all(len(one.at(step)) == batch for step in range(steps))
    epochs = [one.epoch(step) for step in range(steps)]
    assert epochs == sorted(epochs)
    for phase, sequences in ((own[:first], part), (own[first:], whole)):
        flat = [number for numbers in phase for number in numbers]
        length = len(sequences)
        for start in range(0, len(flat) - length + 1, length):
            assert sorted(flat[start : start + length]) == list(range(length))


def test_without_more_it_is_the_plain_order():
    one = Order(Ranges.of(np.arange(50, 61)), 4, 7)
    flat = np.concatenate([one.at(step) for step in range(11)])
    for epoch in range(4):
        expected = permute(np.arange(11), 11, seed=7, epoch=epoch) + 50
        assert np.array_equal(flat[epoch * 11 : (epoch + 1) * 11], expected)
    assert [one.epoch(step) for step in range(6)] == [0, 0, 0, 1, 1, 1]
    assert one.replay.state() is None
    assert one.replay.knows(10**9)


def test_the_masks_go_on_to_new_replicas_when_the_curriculum_ends():
    one = Order(NEW, 6, 0, EASY, FIRST)
    # 54 sequences of 5 are 11 epochs, the last unfinished.
    assert [one.epoch(step) for step in (0, FIRST - 1, FIRST, FIRST + 3)] == [0, 9, 11, 12]


def test_the_first_steps_read_only_the_first_part():
    one = order()
    for step in range(30):
        own = {n for n in one.at(step).tolist() if n < 100} if one.replay.knows(step) else set()
        assert own <= set(numbers_of(EASY)) or step >= FIRST


@pytest.mark.covering
@pytest.mark.parametrize("world", [1, 2, 3, 6])
@pytest.mark.parametrize("threads", [1, 7])
def test_any_world_and_any_threads_read_the_same(world, threads):
    """Threads that could read past an evaluation wait for it: every third step there is one."""
    expected = read(order(), 0, 40)
    parts = [
        read(order(), 0, 40, rank=rank, world_size=world, threads=threads) for rank in range(world)
    ]
    for step, (whole, epoch) in enumerate(expected):
        woven = np.full(6, -1)
        for rank in range(world):
            woven[rank::world], masks = parts[rank][step]
            assert masks == epoch
        assert woven.tolist() == whole


@pytest.mark.parametrize("threads", [1, 2, 3])  # every stop by one of them
def test_a_run_that_goes_on_anywhere_reads_the_same(threads):
    expected = read(order(), 0, 40)
    for stop in range(threads, 40, 3):
        first, again = order(), order()
        read(first, 0, stop)
        again.replay.restore(first.replay.state())
        assert read(again, stop, 40, threads=threads) == expected[stop:]


def test_an_evaluation_at_every_step_is_waited_for():
    one = order(every=1)
    assert len(read(one, 0, 50, every=1, threads=16)) == 50
    assert len(one.replay.state()["losses"]) == 50


# --- what a configuration chooses ---


def chosen(world, **values):
    quick = {"held_out": 0.2, "batch_sequences": 4, "steps": 10}
    return choose_sequences(world.open(), parse_settings(TrainConfig, quick | values))


def domains_of(world):
    corpus = world.open().corpus
    return [
        name
        for shard in range(len(corpus.commits))
        for batch in range(corpus.shard(shard).batch_count)
        for name in corpus.shard(shard).batch(batch)["domain"].to_pylist()
    ]


def test_one_domain_is_trained_on_and_held_out_of_what_is_held_out_anyway(masked_world):
    domains, split = domains_of(masked_world), split_corpus(masked_world.open(), 0.2)
    held_out, train = set(numbers_of(split.held_out)), set(numbers_of(split.train))
    for name in ("odd", "even"):
        found = chosen(masked_world, domains=[name], evaluate_sequences=10**6)
        own = {number for number, domain in enumerate(domains) if domain == name}
        assert set(numbers_of(found.order.sequences)) == train & own
        assert set(found.held_out.tolist()) == held_out & own
        assert found.domains == {}
    both = chosen(masked_world, domains=["odd", "even", "odd"], evaluate_sequences=10**6)
    assert numbers_of(both.order.sequences) == numbers_of(split.train)


def test_all_domains_are_evaluated_whatever_is_trained_on(masked_world):
    domains = domains_of(masked_world)
    found = chosen(masked_world, domains="odd", evaluate_domains=True, evaluate_sequences=6)
    assert list(found.domains) == ["even", "odd"]
    for name, index in found.domains.items():
        assert len(index) == 3
        assert {domains[number] for number in index} == {name}


def test_replay_reads_the_memory_of_its_domains_and_evaluates_them(masked_world):
    domains = domains_of(masked_world)
    replay = {"domains": ["even"], "fraction": 0.5, "choose": "loss_change"}
    found = chosen(masked_world, domains=["odd"], replay=replay)
    held_out = set(numbers_of(split_corpus(masked_world.open(), 0.2).held_out))
    for step in range(20):
        batch = found.order.at(step).tolist()
        assert [domains[number] for number in batch] == ["odd", "odd", "even", "even"]
        assert not held_out & set(batch)
    assert list(found.domains) == ["even"]
    plain = chosen(masked_world, domains=["odd"], replay=replay | {"choose": "uniform"})
    assert plain.domains == {}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"domains": ["od"]}, r"train\.domains.*'od'.*even"),
        ({"domains": ["odd"], "replay": {"domains": ["ever"]}}, r"train\.replay\.domains.*'ever'"),
        ({"replay": {"domains": ["even"]}}, r"trained on anyway"),
        ({"domains": ["even"], "replay": {"domains": ["even"]}}, r"trained on anyway"),
        (
            {"domains": ["odd"], "replay": {"domains": ["even"]}, "held_out": 0.0},
            r"loss_change needs the held-out loss",
        ),
    ],
)
def test_what_cannot_be_had_is_refused(masked_world, values, words):
    with pytest.raises(InputError, match=words):
        chosen(masked_world, **values)


def test_domains_without_anything_held_out_are_named(masked_world, caplog):
    found = chosen(masked_world, evaluate_domains=True, held_out=0.0)
    assert found.domains == {}
    assert "nothing of even, odd is held out" in caplog.text
