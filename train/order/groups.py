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
from rekindle.train.ranking.config import without_groups

log = logging.getLogger("rekindle")

KEPT = 3  # epochs whose order is kept: some threads may read one epoch, others the next


class WholeGroups:
    """The groups of some sequences, in an order of each epoch's own."""

    def __init__(self, numbers: Ints, groups: Ints, seed: int):
        """``numbers`` [N] of sequences, ascending; ``groups`` [N]: the group of each."""
        order = np.argsort(groups, kind="stable")
        self._members, self._seed = numbers[order], seed
        self.sizes = np.unique(groups, return_counts=True)[1].astype(np.int64)
        self._firsts = np.cumsum(self.sizes) - self.sizes  # of a group in `_members`
        self._kept: deque[tuple[int, Ints, Ints]] = deque(maxlen=KEPT)
        self._laying = threading.Lock()

    def read(self, start: int, stop: int) -> Ints:
        """Return the sequences of the groups that begin at the places ``start`` to ``stop`` − 1 of
        the stream of epochs.
        """
        size, parts = len(self._members), [np.zeros(0, np.int64)]
        for epoch in range(start // size, (stop - 1) // size + 1):
            order, begins = self._laid_out(epoch)
            first, last = np.searchsorted(begins, [start - epoch * size, stop - epoch * size])
            for group in order[first:last].tolist():
                begin = self._firsts[group]
                parts.append(self._members[begin : begin + self.sizes[group]])
        return np.concatenate(parts)

    def _laid_out(self, epoch: int) -> tuple[Ints, Ints]:
        """Return the groups [G] in the epoch's order, and the place at which each begins [G]."""
        with self._laying:
            for known, order, begins in self._kept:
                if known == epoch:
                    return order, begins
            order = permute(
                np.arange(len(self.sizes)), len(self.sizes), seed=self._seed, epoch=epoch
            )
            ends = np.cumsum(self.sizes[order])
            self._kept.append((epoch, order, ends - self.sizes[order]))
            return order, ends - self.sizes[order]


def spread_groups(cache: Cache, held_out: Ranges, count: int) -> Ints:
    """Return ``count`` of the held-out sequences, spread evenly, ascending; all if there are
    fewer. If the corpus has groups, return whole groups, about ``count`` sequences in all.
    """
    if not cache.corpus.has_groups or count >= len(held_out):
        return held_out.spread(count)
    numbers = held_out.select(np.arange(len(held_out), dtype=np.int64))
    groups = group_numbers(cache.corpus)[numbers]
    known = np.unique(groups)
    wanted = max(1, count * len(known) // len(numbers))
    chosen = known[[i * len(known) // wanted for i in range(wanted)]]
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
        raise InputError(without_groups(key, cache.store.location))
    numbers = sequences.select(np.arange(len(sequences), dtype=np.int64))
    groups = group_numbers(cache.corpus)[numbers]
    found = WholeGroups(numbers, groups, config.seed)
    largest = int(found.sizes.max())
    if largest == 1:
        raise InputError(
            f"{key}: groups, but each of the {counted(len(numbers), 'group')} to train on "
            "has one sequence: there is nothing to compare. Give several documents of each query "
            "(corpus.group_field names what they have in common), or leave the key out"
        )
    if config.batching != "groups":
        _tell_torn(key, config, found)
        return None
    if largest > config.batch_sequences:
        large = int(numbers[groups == np.unique(groups)[found.sizes.argmax()]][0])
        named = cache.example(large).group
        raise InputError(
            f"train.batching: groups reads whole groups, and {named!r} has {largest:,} sequences, "
            f"more than train.batch_sequences {config.batch_sequences:,}. Use a larger "
            "train.batch_sequences (micro_batch_sequences bounds the memory), a corpus with fewer "
            "documents of a query, or train.batching: shuffled"
        )
    log.info(
        "train.batching: groups: %s of %d to %d sequences; a step reads whole ones, about %d "
        "sequences, at most %d",
        *(counted(len(found.sizes), "group"), found.sizes.min(), largest),
        *(config.batch_sequences, config.batch_sequences + largest - 1),
    )
    return found


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


def _tell_torn(key: str, config: TrainConfig, found: WholeGroups) -> None:
    """Log how much of a group a shuffled step holds."""
    total = int(found.sizes.sum())
    mean = float((found.sizes * (found.sizes - 1)).sum() / total)  # others in a sequence's group
    share = min(1.0, (config.batch_sequences - 1) / max(total - 1, 1))
    if mean * share < mean:
        log.warning(
            "%s compares sequences of a group. With train.batching: %s a sequence shares its step "
            "with about %.2g of the %.3g others of its group; train.batching: groups keeps all",
            *(key, config.batching, mean * share, mean),
        )
