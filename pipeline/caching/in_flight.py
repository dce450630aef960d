"""Transfers between the host and a teacher's device: arrays are sent there, and results come back
while the next batch runs.

On a GPU, reading a batch waits, and the next one is started before that. Copies go through pinned
memory: to the device on the computing stream, back on a stream of their own. What is on its way
back is bounded in bytes: of whole distributions a batch is more than a GPU or pinned memory should
hold, and its blocks come back one after another, so ``fetch`` too waits while the bound is reached.
On a CPU, where nothing runs in parallel, everything is available at once.
"""

from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rekindle.data.targets.codec import Columns

Arrays = dict[str, NDArray]
Finish = Callable[[Arrays], Columns]  # makes columns of results on the host
Pending = Callable[[], Columns]  # waits for results, and returns their columns

# Bytes on their way back at once: two blocks of logits on a GPU (``scoring.LOGITS_BYTES``). A batch
# of top-k targets has some ten megabytes, one of hidden states half a gigabyte.
IN_FLIGHT_BYTES = 1 << 30


class Transfer(Protocol):
    """``max_in_flight``: batches that may be on their way back at once, which bounds memory.
    ``fetches``: how many were begun, which numbers them.
    """

    max_in_flight: int
    fetches: int

    def send(self, values: NDArray) -> Tensor:
        """Return an array on the device; its memory may not be written to any more."""
        ...

    def fetch(self, results: Mapping[str, Tensor], finish: Finish) -> Pending:
        """Begin to fetch results; the returned function gives their columns, once."""
        ...

    def drain(self) -> bool:
        """Wait for all that is on its way back and free what it holds of the device; return
        whether there was any. It can still be read; so can what remains after a MemoryError.
        """
        ...

    def drop(self, fetches: range) -> None:
        """Forget what fetches of these numbers have on its way back: nobody will read it."""
        ...


class NoTransfer(Transfer):
    """No transfer: host and device are one."""

    max_in_flight, fetches = 1, 0

    def send(self, values: NDArray) -> Tensor:
        """Return the array as a tensor."""
        return torch.from_numpy(values)

    def fetch(self, results: Mapping[str, Tensor], finish: Finish) -> Pending:
        """Finish at once, so that running out of memory shows with its own batch."""
        columns = finish({name: values.numpy() for name, values in results.items()})
        return lambda: columns

    def drain(self) -> bool:
        """Return False: nothing is on its way."""
        return False

    def drop(self, fetches: range) -> None:
        """Do nothing: nothing is on its way."""


@dataclass(eq=False)
class _Copy:
    number: int  # of its fetch
    size: int  # bytes
    wait: Callable[[], Arrays] | None  # None: it has arrived
    arrays: Arrays | None = None


class TransferBeside(Transfer):
    """To a device that runs beside the host, and back: at most ``budget`` bytes at once, or the
    results of one ``fetch``.
    """

    max_in_flight = 2

    def __init__(self, budget: int = IN_FLIGHT_BYTES):
        self.budget, self._on_their_way, self.fetches = budget, deque[_Copy](), 0

    @abstractmethod
    def begin_copy(self, results: Mapping[str, Tensor]) -> Callable[[], Arrays]:
        """Begin to copy results to the host. The returned function waits for them and returns
        them in memory of the host alone; it keeps no tensor of the device. After a MemoryError it
        can be called again.
        """

    def fetch(self, results: Mapping[str, Tensor], finish: Finish) -> Pending:
        """Begin to fetch results. Where they exceed the budget with those on their way, the oldest
        of these are taken first, which waits for them.
        """
        size = sum(values.nbytes for values in results.values())
        while self._on_their_way and self._bytes + size > self.budget:
            self._take(self._on_their_way[0])
        copy = _Copy(self.fetches, size, self.begin_copy(results))
        self._on_their_way.append(copy)
        self.fetches += 1

        def read() -> Columns:
            self._take(copy)
            assert copy.arrays is not None
            arrays, copy.arrays = copy.arrays, None
            return finish(arrays)

        return read

    def drain(self) -> bool:
        """Take all that is on its way."""
        had_any = bool(self._on_their_way)
        while self._on_their_way:
            self._take(self._on_their_way[0])
        return had_any

    def drop(self, fetches: range) -> None:
        """Forget copies, without waiting: torch's allocators keep the memory of a copy on both
        sides until it is done.
        """
        kept = (copy for copy in self._on_their_way if copy.number not in fetches)
        self._on_their_way = deque(kept)

    @property
    def _bytes(self) -> int:
        return sum(copy.size for copy in self._on_their_way)

    def _take(self, copy: _Copy) -> None:
        """Wait for a copy, unless that was done before, and free what it holds. One that the host
        has no memory for stays on its way.
        """
        if copy.wait is None:
            return
        copy.arrays = copy.wait()
        copy.wait = None
        self._on_their_way.remove(copy)


class GpuTransfer(TransferBeside):
    """To a CUDA device, and back."""

    def __init__(self, device: torch.device):
        super().__init__()
        self.device = device
        # by device, for a model spread over several
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def send(self, values: NDArray) -> Tensor:
        """Return the array on the device; the copy completes before its first use."""
        return torch.from_numpy(values).pin_memory().to(self.device, non_blocking=True)

    def begin_copy(self, results: Mapping[str, Tensor]) -> Callable[[], Arrays]:
        """Copy to pinned memory, which is free again once it has been taken. The device's memory is
        free for later work when the copy is done, as ``record_stream`` tells its allocator.

        torch keeps pinned memory in sizes of powers of two and never returns it: so much as was on
        its way at once, up to twice, for each of the sizes that a run's results have.
        """
        names, pinned = list(results), dict[str, Tensor]()
        events: list[torch.cuda.Event] = []
        for device in dict.fromkeys(values.device for values in results.values()):
            if device not in self._streams:
                self._streams[device] = torch.cuda.Stream(device)
            copy_stream = self._streams[device]
            copy_stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(copy_stream):
                for name, values in results.items():
                    if values.device == device:
                        buffer = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
                        pinned[name] = buffer.copy_(values, non_blocking=True)
                        values.record_stream(copy_stream)
                events.append(torch.cuda.Event())
                events[-1].record(copy_stream)

        def wait() -> Arrays:
            for event in events:
                event.synchronize()
            return {name: np.array(pinned[name].numpy()) for name in names}

        return wait


def transfer_to(device: str) -> Transfer:
    """Return the transfers to a device, given by its name."""
    torch_device = torch.device(device)
    return GpuTransfer(torch_device) if torch_device.type == "cuda" else NoTransfer()
