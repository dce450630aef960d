"""The sequences of a cache as PyTorch data sets: which one stands where in an epoch; reads nothing.

What they give is a number, not its content: a collator reads a whole batch at once, in the process
that makes it. The order is that of ``Cache.batches`` and of our own loop, from (seed, epoch) alone.
"""

from collections.abc import Iterator
from copy import copy
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from rekindle.data.cache import Cache
from rekindle.data.errors import InputError
from rekindle.data.permutation import permute


class Place(NamedTuple):
    """A sequence of a cache in an epoch. No dict: nobody takes columns away from it."""

    sequence: int  # its number in the corpus
    epoch: int  # which replica of the masks it is seen in
    counts: bool = True  # False: it fills up a process's share, and has no loss


class Shares:
    """An epoch's order, and which part of it one process reads.

    Place i of rank r is place i · world_size + r of the epoch: batches of equal size of all ranks
    are together a batch of a single process. Every share is of the same length; where the ranks do
    not divide the epoch, the last place of some is a sequence that does not count.
    """

    def __init__(
        self,
        cache: Cache,
        *,
        seed: int = 0,
        epoch: int = 0,
        rank: int = 0,
        world_size: int = 1,
        sequences: ArrayLike | None = None,
    ):
        """Take the ``sequences`` (all of them if None) of a cache, in the order of ``seed``.

        Raises ValueError for a rank outside the world, InputError where there is no sequence or
        one that the corpus has not.
        """
        if not 0 <= rank < world_size:
            raise ValueError(
                f"rank must lie in 0..world_size − 1, got {rank} of {world_size} processes"
            )
        self.sequences = None if sequences is None else np.asarray(sequences, np.int64)
        self.size = len(cache) if self.sequences is None else len(self.sequences)
        if not self.size:
            raise InputError("there is no sequence to train on: the corpus or `sequences` is empty")
        if self.sequences is not None:
            least, most = int(self.sequences.min()), int(self.sequences.max())
            if least < 0 or most >= len(cache):
                raise InputError(
                    f"sequences are numbers {least} to {most}; the corpus has 0 to {len(cache) - 1}"
                )
        self.seed, self.rank, self.world_size = seed, rank, world_size
        # Shared memory: workers of a DataLoader that persist hear of a new epoch, too.
        self._epoch = torch.tensor(epoch).share_memory_()

    @property
    def epoch(self) -> int:
        """The epoch that is read now, or next."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Read that epoch from now on: another order, and the next replica of masks."""
        self._epoch.fill_(epoch)

    def share(self, rank: int, world_size: int) -> Any:
        """Return the same data set as one of ``world_size`` processes reads it; they stay in the
        same epoch.
        """
        other = copy(self)
        other.rank, other.world_size = rank, world_size
        return other

    @property
    def length(self) -> int:
        """Places of each share."""
        return -(-self.size // self.world_size)

    def place(self, number: int, epoch: int) -> Place:
        """Return what stands at place ``number`` of this share of ``epoch``."""
        at = number * self.world_size + self.rank
        found = int(permute(np.array([at % self.size]), self.size, seed=self.seed, epoch=epoch)[0])
        if self.sequences is not None:
            found = int(self.sequences[found])
        return Place(found, epoch, at < self.size)


class CacheDataset(Shares, Dataset[Place]):
    """A map-style data set: item i is place i of the epoch. Read it unshuffled: it is shuffled."""

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, number: int) -> Place:
        if not -len(self) <= number < len(self):
            raise IndexError(f"place {number} of an epoch of {len(self)}")
        return self.place(number % len(self), self.epoch)


class IterableCacheDataset(Shares, IterableDataset[Place]):
    """The same order as a stream, which goes on where it was left.

    Each ``iter()`` gives what is left of the epoch, and the next one begins the next epoch (unless
    ``set_epoch`` says another). ``batch_sequences`` is the DataLoader's batch_size: its workers
    then give the batches in the order of a single process.
    """

    def __init__(self, cache: Cache, batch_sequences: int, **settings: Any):
        """Take ``settings`` as of CacheDataset."""
        super().__init__(cache, **settings)
        if batch_sequences < 1:
            raise ValueError(f"batch_sequences must be at least 1, got {batch_sequences}")
        self.batch_sequences = batch_sequences
        self._first = torch.tensor(0).share_memory_()  # the place at which the next iter() begins
        self._given = 0  # places that the running epoch has given in this process

    def __len__(self) -> int:
        return self.length

    def set_epoch(self, epoch: int) -> None:
        """Read that epoch next, from its first place; of the epoch it is in, what is left."""
        if epoch != self.epoch:
            self._first.fill_(0)
            self._given = 0
        super().set_epoch(epoch)

    def __iter__(self) -> Iterator[Place]:
        worker = get_worker_info()
        number, of = (0, 1) if worker is None else (worker.id, worker.num_workers)
        epoch, first = self.epoch, int(self._first)
        for start in range(
            first + number * self.batch_sequences, self.length, of * self.batch_sequences
        ):
            for at in range(start, min(start + self.batch_sequences, self.length)):
                self._given = at + 1
                yield self.place(at, epoch)
        if worker is None:
            self.set_epoch(epoch + 1)

    def state_dict(self, consumed: int | None = None) -> dict[str, int]:
        """Return where the stream stands, to go on with ``load_state_dict``.

        ``consumed``: sequences of this epoch that the loop has taken from this process's share.
        None: all that the stream has given here; right without workers only, which read ahead, each
        in its own copy (torchdata's StatefulDataLoader asks every copy by itself).
        """
        position = self._given if consumed is None else consumed
        return {
            "epoch": self.epoch,
            "position": max(position, int(self._first)),
            "seed": self.seed,
            "size": self.size,
            "world_size": self.world_size,
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where the stream of ``state_dict`` stood.

        On another number of processes from the same place of the epoch, if that is a whole one
        there. InputError where the order is another one.
        """
        for name in ("seed", "size"):
            if state[name] != getattr(self, name):
                raise InputError(
                    f"the state is of a stream with {name} {state[name]}, this one has "
                    f"{getattr(self, name)}: its order is another one. Go on with the same cache, "
                    "sequences and seed"
                )
        taken = state["position"] * state["world_size"]
        if taken % self.world_size and taken < self.size:
            raise InputError(
                f"the state stands after {taken} sequences of the epoch, which {self.world_size} "
                "processes cannot share; go on with a number of them that divides it"
            )
        self.set_epoch(state["epoch"])
        self._first.fill_(min(taken // self.world_size, self.length))
        self._given = int(self._first)
