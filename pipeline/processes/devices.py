"""Where the processes of a machine work: each on a device and a share of the threads."""

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """One process's: its CUDA device as CUDA_VISIBLE_DEVICES names it (None: the CPU)."""

    device: str | None
    threads: int

    def take(self) -> None:
        """Make this process work here; before it looks at any device."""
        if self.device is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = self.device
        import torch

        torch.set_num_threads(self.threads)


def visible_devices() -> list[str]:
    """The CUDA devices that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",")[:count] if named else [str(number) for number in range(count)]


def places_for(workers: int) -> list[Place]:
    """A place for each worker: they share the devices in turn, and all the threads of one."""
    import torch

    threads = max(1, torch.get_num_threads() // workers)
    devices = visible_devices()
    if not devices:
        return [Place(None, threads)] * workers
    return [Place(devices[number % len(devices)], threads) for number in range(workers)]


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
