"""Transfers between the host and a teacher's device: arrays are sent there, and results come back
while the next batch runs.

On a GPU, only reading a batch waits, and the next one is started before that. Copies go through
pinned memory: to the device on the computing stream, back on a stream of their own. On a CPU, where
nothing runs in parallel, everything is available at once.
"""

from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rekindle.data.targets.codec import Columns

Arrays = dict[str, NDArray]
Finish = Callable[[Arrays], Columns]  # makes columns of results on the host
Pending = Callable[[], Columns]  # waits for results, and returns their columns


class Transfer(Protocol):
    """``max_in_flight``: batches that may be on their way back at once, which bounds memory."""

    max_in_flight: int

    def send(self, values: NDArray) -> Tensor:
        """Return an array on the device; its memory may not be written to any more."""
        ...

    def fetch(self, results: Mapping[str, Tensor], finish: Finish) -> Pending:
        """Begin to fetch results; the returned function gives their columns, once."""
        ...


class NoTransfer(Transfer):
    """No transfer: host and device are one."""

    max_in_flight = 1

    def send(self, values: NDArray) -> Tensor:
        """Return the array as a tensor."""
        return torch.from_numpy(values)

    def fetch(self, results: Mapping[str, Tensor], finish: Finish) -> Pending:
        """Finish at once, so that running out of memory shows with its own batch."""
        columns = finish({name: values.numpy() for name, values in results.items()})
        return lambda: columns


class GpuTransfer(Transfer):
    """To a CUDA device, and back."""

    max_in_flight = 2

    def __init__(self, device: torch.device):
        self.device = device
        # by device, for a model spread over several
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def send(self, values: NDArray) -> Tensor:
        """Return the array on the device; the copy completes before its first use."""
        return torch.from_numpy(values).pin_memory().to(self.device, non_blocking=True)

    def fetch(self, results: Mapping[str, Tensor], finish: Finish) -> Pending:
        """Copy to pinned memory, which is freed as soon as it has been read."""
        pinned: dict[str, Tensor] = {}
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

        def wait_and_finish() -> Columns:
            for event in events:
                event.synchronize()
            arrays = {name: np.array(pinned[name].numpy()) for name in results}
            pinned.clear()
            return finish(arrays)

        return wait_and_finish


def transfer_to(device: str) -> Transfer:
    """Return the transfers to a device, given by its name."""
    torch_device = torch.device(device)
    return GpuTransfer(torch_device) if torch_device.type == "cuda" else NoTransfer()
