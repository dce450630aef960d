"""``train.batching: groups``: a step reads whole groups, such as all documents of a query.

An epoch lays its groups one after another, in an order of its own: its N sequences take N places.
Epochs follow each other in one endless stream of places. Step t owns the places t·B to (t+1)·B − 1
and reads every group that begins there, whole. So every group is read once per epoch; steps have
``train.batch_sequences`` B on average, and between B − L + 1 and B + L − 1, where L is the size of
the largest group. The sequences of a step follow from (seed, step), whatever the number of
processes. Memory is a few numbers per sequence.
"""

import logging
import threading
from collections import deque

import numpy as np

from rekindle.data.batch import Ints
from rekindle.data.cache import Cache
from rekindle.data.counted import counted
from rekindle.data.errors import InputError
from rekindle.data.permutation import permute
from rekindle.train.config import TrainConfig
from rekindle.train.order.held_out import Ranges, group_numbers
from rekindle.train.ranking.config import missing_groups_message

log = logging.getLogger("rekindle")

CACHED_EPOCHS = 3  # epochs whose order is kept: some threads may read one epoch, others the next


class WholeGroups:
    """The groups of some sequences, in an order of each epoch's own."""

    def __init__(self, numbers: Ints, groups: Ints, seed: int):
        """``numbers`` [N] of sequences, ascending; ``groups`` [N]: the group of each."""
        order = np.argsort(groups, kind="stable")
        self._members, self._seed = numbers[order], seed
        self.sizes = np.unique(groups, return_counts=True)[1].astype(np.int64)
        self._firsts = np.cumsum(self.sizes) - self.sizes  # of a group in `_members`
        self._cached: deque[tuple[int, Ints, Ints]] = deque(maxlen=CACHED_EPOCHS)
        self._lock = threading.Lock()

    def read(self, start: int, stop: int) -> Ints:
        """Return the sequences of the groups that begin at the places ``start`` to ``stop`` − 1 of
        the stream of epochs.
        """
        size, sequences = len(self._members), [np.zeros(0, np.int64)]
        for epoch in range(start // size, (stop - 1) // size + 1):
            order, begins = self._order_of(epoch)
            first, last = np.searchsorted(begins, [start - epoch * size, stop - epoch * size])
            for group in order[first:last].tolist():
                begin = self._firsts[group]
                sequences.append(self._members[begin : begin + self.sizes[group]])
        return np.concatenate(sequences)

    def _order_of(self, epoch: int) -> tuple[Ints, Ints]:
        """Return the groups [G] in the epoch's order, and the place at which each begins [G]."""
        with self._lock:
            for cached_epoch, order, begins in self._cached:
                if cached_epoch == epoch:
                    return order, begins
            order = permute(
                np.arange(len(self.sizes)), len(self.sizes), seed=self._seed, epoch=epoch
            )
            ends = np.cumsum(self.sizes[order])
            self._cached.append((epoch, order, ends - self.sizes[order]))
            return order, ends - self.sizes[order]


def spread_groups(cache: Cache, held_out: Ranges, count: int) -> Ints:
    """Return ``count`` of the held-out sequences, spread evenly, ascending; all if there are
    fewer. If the corpus has groups, return whole groups, about ``count`` sequences in all.
    """
    if not cache.corpus.has_groups or count >= len(held_out):
        return held_out.spread(count)
    numbers = held_out.select(np.arange(len(held_out), dtype=np.int64))
    groups = group_numbers(cache.corpus)[numbers]
    group_ids = np.unique(groups)
    chosen_count = max(1, count * len(group_ids) // len(numbers))
    chosen = group_ids[[i * len(group_ids) // chosen_count for i in range(chosen_count)]]
    return numbers[np.isin(groups, chosen)]


def whole_groups(cache: Cache, config: TrainConfig, sequences: Ranges) -> WholeGroups | None:
    """Return the groups of the training sequences if batches consist of whole ones.

    Raise InputError if the run needs groups and the corpus has none, or one sequence in each; and
    if a group is larger than a batch. Warn if batches split groups, and return None.
    """
    key = config.key_of_groups
    if key is None or not len(sequences):
        return None
    if not cache.corpus.has_groups:
        raise InputError(missing_groups_message(key, cache.store.location))
    numbers = sequences.select(np.arange(len(sequences), dtype=np.int64))
    group_of = group_numbers(cache.corpus)[numbers]
    groups = WholeGroups(numbers, group_of, config.seed)
    largest = int(groups.sizes.max())
    if largest == 1:
        raise InputError(
            f"{key}: groups, but each of the {counted(len(numbers), 'group')} to train on "
            "has one sequence: there is nothing to compare. Give several documents of each query "
            "(corpus.group_field names what they have in common), or leave the key out"
        )
    if config.batching != "groups":
        _warn_split_groups(key, config, groups)
        return None
    if largest > config.batch_sequences:
        sequence = int(numbers[group_of == np.unique(group_of)[groups.sizes.argmax()]][0])
        group_name = cache.example(sequence).group
        raise InputError(
            f"train.batching: groups reads whole groups, and {group_name!r} has {largest:,} "
            f"sequences, more than train.batch_sequences {config.batch_sequences:,}. Use a larger "
            "train.batch_sequences (micro_batch_sequences bounds the memory), a corpus with fewer "
            "documents of a query, or train.batching: shuffled"
        )
    log.info(
        "train.batching: groups: %s of %d to %d sequences; a step reads whole ones, about %d "
        "sequences, at most %d",
        *(counted(len(groups.sizes), "group"), groups.sizes.min(), largest),
        *(config.batch_sequences, config.batch_sequences + largest - 1),
    )
    return groups


def check_processes(batch: int, largest: int, processes: int) -> None:
    """Raise InputError if a step of whole groups may have fewer sequences than there are
    processes.
    """
    if batch - largest + 1 < processes:
        raise InputError(
            f"train.batching: groups: with groups of up to {largest} sequences a step of "
            f"train.batch_sequences {batch} may have only {batch - largest + 1}, fewer than the "
            f"{processes} processes. Use a larger train.batch_sequences, or fewer processes"
        )


def _warn_split_groups(key: str, config: TrainConfig, groups: WholeGroups) -> None:
    """Log how much of a group a shuffled step holds."""
    total = int(groups.sizes.sum())
    # how many others a sequence's group has, on average
    mean_others = float((groups.sizes * (groups.sizes - 1)).sum() / total)
    share = min(1.0, (config.batch_sequences - 1) / max(total - 1, 1))
    if mean_others * share < mean_others:
        log.warning(
            "%s compares sequences of a group. With train.batching: %s a sequence shares its step "
            "with about %.2g of the %.3g others of its group; train.batching: groups keeps all",
            *(key, config.batching, mean_others * share, mean_others),
        )
