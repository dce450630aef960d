"""The sequences of a cache as PyTorch data sets: which one has which place in an epoch.

Items are sequence numbers, not contents; nothing is read here. A collator reads a whole batch at
once, in the process that makes it. The order is that of ``Cache.batches`` and of our own training
loop; it depends only on (seed, epoch).
"""

from collections.abc import Callable, Iterator
from copy import copy
from typing import Any, NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from rekindle.data.cache import Cache
from rekindle.data.errors import InputError
from rekindle.data.permutation import permute, sequence_numbers
from rekindle.train.config import Batching
from rekindle.train.hf.given import check_cache
from rekindle.train.order.similar_lengths import batch_turns, deal_batches, window_of

# A window of an epoch: its number, its steps, and the places that each step reads.
_Window = tuple[int, range, list[NDArray[np.int64]]]
_NO_WINDOW: _Window = (0, range(0), [])


class Place(NamedTuple):
    """A sequence of a cache in an epoch. Not a dict, so that a Trainer cannot remove its
    columns.
    """

    sequence: int  # its number in the corpus
    epoch: int  # decides which replica of the masks it is seen in
    counts: bool = True  # False: it only fills up a process's share, and has no loss
    corpus: str | None = None  # the corpus it belongs to; None: the collator's own


class Shares:
    """An epoch's order, and the part of it that one process reads.

    Place i of rank r is place i · world_size + r of the epoch, so equally large batches of all
    ranks together form a batch of a single process. All shares have the same length; if the ranks
    do not divide the epoch, the last place of some is a sequence that does not count.
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
        batching: Batching = "shuffled",
        batch_sequences: int | None = None,
    ):
        """Take the ``sequences`` (their numbers; all if None) of a cache, in the order of ``seed``.

        ``batching``: as ``train.batching``. For similar_lengths ``batch_sequences`` is the batch
        size of each process's DataLoader (a Trainer with our mixin sets it).

        Raises ValueError for a rank outside the world, an unknown batching and an empty batch;
        InputError for values that are not sequence numbers, for no sequences, and for one that the
        corpus lacks.
        """
        check_cache(cache)
        if batching not in get_args(Batching):
            raise ValueError(
                f"batching is {batching!r}; it must be {' or '.join(get_args(Batching))}"
            )
        if batch_sequences is not None and batch_sequences < 1:
            raise ValueError(f"batch_sequences must be at least 1, got {batch_sequences}")
        if cache.corpus.is_packed:
            raise InputError(
                "the corpus has several documents in a sequence, with attention within each "
                "(corpus.packing: packed), and a Trainer does not pass that on to its model. "
                "Train with `pipeline train-student`, or use packing: document"
            )
        if not 0 <= rank < world_size:
            raise ValueError(
                f"rank must lie in 0..world_size − 1, got {rank} of {world_size} processes"
            )
        self.sequences = None if sequences is None else _numbers(sequences)
        self.size = len(cache) if self.sequences is None else len(self.sequences)
        if not self.size:
            raise InputError("there is no sequence to train on: the corpus or `sequences` is empty")
        if self.sequences is not None:
            least, most = int(self.sequences.min()), int(self.sequences.max())
            if least < 0 or most >= len(cache):
                raise InputError(
                    f"sequences are numbers {least} to {most}; the corpus has 0 to {len(cache) - 1}"
                )
        self.corpus = cache.corpus.fingerprint
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.batching, self.batch_sequences = batching, batch_sequences
        self._lengths = cache.lengths if batching == "similar_lengths" else None
        self._window = _NO_WINDOW
        # Shared memory: persistent workers of a DataLoader see a new epoch, too.
        self._epoch = torch.tensor(epoch).share_memory_()
        self.repeats = False  # whether a sequence that fills up a share counts as well

    @property
    def epoch(self) -> int:
        """Return the epoch that is read now, or next."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Read this epoch from now on: in another order, with the next replica of masks."""
        self._epoch.fill_(epoch)

    def share(
        self, rank: int, world_size: int, repeats: bool = False, batch_sequences: int | None = None
    ) -> Any:
        """Return the data set as one of ``world_size`` processes reads it, in batches of
        ``batch_sequences`` if given; copies stay in the same epoch. ``repeats``: sequences that
        fill up a share count again, for means over batches.
        """
        other = copy(self)
        other.rank, other.world_size, other.repeats = rank, world_size, repeats
        other.batch_sequences, other._window = batch_sequences or self.batch_sequences, _NO_WINDOW
        return other

    @property
    def length(self) -> int:
        """Return the number of places in each share."""
        return -(-self.size // self.world_size)

    def place(self, number: int, epoch: int) -> Place:
        """Return the sequence at place ``number`` of this share of ``epoch``."""
        place = number * self.world_size + self.rank
        if self._lengths is not None:
            place = self._by_length(place, epoch, self._lengths)
        sequence = int(self._numbers(np.array([place]), epoch)[0])
        return Place(sequence, epoch, self.repeats or place < self.size, self.corpus)

    def _numbers(self, places: NDArray[np.int64], epoch: int) -> NDArray[np.int64]:
        """Return the sequences at ``places`` [B] of the shuffled epoch, which wraps around at its
        end.
        """
        numbers = permute(places % self.size, self.size, seed=self.seed, epoch=epoch)
        return numbers if self.sequences is None else self.sequences[numbers]

    def _by_length(self, at: int, epoch: int, lengths: Callable[..., NDArray[np.int64]]) -> int:
        """Return the place of the shuffled epoch that is read at ``at`` when batches have similar
        lengths. Places that do not fill a batch, at the epoch's end, are unchanged.
        """
        if (batch := self.pass_sequences) is None:
            raise InputError(
                "batching: similar_lengths needs batch_sequences, the batch size of the "
                "DataLoader that reads the data set: sequences are sorted and divided by it"
            )
        step, offset = divmod(at, batch)
        full_batches = self.length * self.world_size // batch
        if step >= full_batches:
            return at
        window_epoch, window, dealt_places = self._window
        if window_epoch != epoch or step not in window:
            window = window_of(step, 0, full_batches)
            places = np.arange(window.start * batch, window.stop * batch, dtype=np.int64)
            order, sizes = batch_turns(window, self.seed, epoch), [batch] * len(window)
            parts = deal_batches(lengths(self._numbers(places, epoch)), sizes, order)
            dealt_places = [places[part] for part in parts]
            self._window = epoch, window, dealt_places
        return int(dealt_places[step - window.start][offset])

    @property
    def pass_sequences(self) -> int | None:
        """Return the sequences that all processes read together, one batch each; None if that does
        not matter or is unknown.
        """
        if self._lengths is None or self.batch_sequences is None:
            return None
        return self.batch_sequences * self.world_size


def _numbers(sequences: ArrayLike) -> NDArray[np.int64]:
    """Return sequence numbers; raise InputError for a mask, which would be read as 0 and 1."""
    try:
        return sequence_numbers(np.asarray(sequences))
    except ValueError:
        array = np.asarray(sequences)
        raise InputError(
            f"sequences has {array.ndim} dimensions of {array.dtype}; give a list of sequence "
            "numbers (from a mask: np.flatnonzero(mask))"
        ) from None


class CacheDataset(Shares, Dataset[Place]):
    """A map-style data set: item i is place i of the epoch, already shuffled; do not
    shuffle again.
    """

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, number: int) -> Place:
        if not -len(self) <= number < len(self):
            raise IndexError(f"place {number} of an epoch of {len(self)}")
        return self.place(number % len(self), self.epoch)


class IterableCacheDataset(Shares, IterableDataset[Place]):
    """The same order as a stream that ``load_state_dict`` can continue.

    Each ``iter()`` starts at the epoch's first place, or at the loaded state. After the last place
    the next ``iter()`` starts the next epoch (unless ``set_epoch`` says otherwise; with DataLoader
    workers it must be called). An iterator that is not read to its end changes nothing.
    ``batch_sequences`` is the DataLoader's batch_size: its workers then give the batches in a
    single process's order.
    """

    def __init__(self, cache: Cache, batch_sequences: int, **settings: Any):
        """Take the same ``settings`` as CacheDataset."""
        super().__init__(cache, batch_sequences=batch_sequences, **settings)
        self._first = torch.tensor(0).share_memory_()  # the place where the next iter() begins
        self._position = 0  # places of the current epoch given by this process

    def __len__(self) -> int:
        return self.length

    def set_epoch(self, epoch: int) -> None:
        """Read this epoch next, from its first place; for the current epoch, what is left of it."""
        if epoch != self.epoch:
            self._first.fill_(0)
            self._position = 0
        super().set_epoch(epoch)

    def __iter__(self) -> Iterator[Place]:
        worker = get_worker_info()
        worker_id, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        epoch, first, size = self.epoch, int(self._first), self.batch_sequences
        assert size is not None
        for start in range(first + worker_id * size, self.length, workers * size):
            for number in range(start, min(start + size, self.length)):
                self._position = number + 1
                yield self.place(number, epoch)
        if worker is None:
            self.set_epoch(epoch + 1)

    def state_dict(self, consumed: int | None = None) -> dict[str, int]:
        """Return the stream's position, for ``load_state_dict``.

        ``consumed``: sequences of this epoch that the loop has taken from this process's share.
        None: all that the stream has given here; this is correct only without workers, which read
        ahead, each in its own copy (torchdata's StatefulDataLoader asks every copy itself).
        """
        position = self._position if consumed is None else consumed
        if not 0 <= position < self.length + (self.batch_sequences or 1):
            raise ValueError(
                f"consumed is {consumed}; it counts only this epoch's sequences, of which this "
                f"process has {self.length}"
            )
        batching_state = (
            {} if self.pass_sequences is None else {"pass_sequences": self.pass_sequences}
        )
        return batching_state | {
            "epoch": self.epoch,
            "position": max(position, int(self._first)),
            "seed": self.seed,
            "size": self.size,
            "world_size": self.world_size,
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue where the stream of ``state_dict`` stopped.

        The number of processes may change if it divides the position in the epoch. Raises
        InputError if the order differs.
        """
        for name in ("seed", "size"):
            if state[name] != getattr(self, name):
                raise InputError(
                    f"the state is of a stream with {name} {state[name]}, but this one has "
                    f"{getattr(self, name)}, so its order differs. Continue with the same cache, "
                    "sequences and seed"
                )
        if (stored := state.get("pass_sequences")) != self.pass_sequences:
            stored_text, own_text = (
                "shuffled" if size is None else f"of similar lengths, {size} in a batch of all"
                for size in (stored, self.pass_sequences)
            )
            raise InputError(
                f"the state is of a stream that is {stored_text}, but this one is {own_text}, so "
                "its order differs. Continue with the same batching and batch_sequences × processes"
            )
        position = state["position"] * state["world_size"]
        if position % self.world_size and position < self.size:
            raise InputError(
                f"the state is after {position} sequences of the epoch, which {self.world_size} "
                "processes cannot share; continue with a number of processes that divides it"
            )
        self.set_epoch(state["epoch"])
        self._first.fill_(self.length if position >= self.size else position // self.world_size)
        self._position = int(self._first)
