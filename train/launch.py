"""Read and check the environment that torchrun sets for its processes. Does not import torch.

Clusters set the same names for their own purposes, and leave them set in shells.
"""

import os
from typing import NamedTuple

from rekindle.data.errors import InputError

# besides WORLD_SIZE, if there are several processes
NEEDED = ("RANK", "MASTER_ADDR", "MASTER_PORT")


class Launch(NamedTuple):
    """One process of a run, as torchrun started it; or the only one."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0


def current_launch() -> Launch:
    """Return what the environment says about this process.

    Raises InputError for values that torchrun does not set.
    """
    size = _read_number("WORLD_SIZE", "1", 1)
    if size == 1:
        return Launch()
    missing = [name for name in NEEDED if not os.environ.get(name)]
    if missing:
        raise InputError(
            f"the environment has WORLD_SIZE={size}, but no {', '.join(missing)}: this process "
            "was not started by torchrun. For several processes: `torchrun --nproc-per-node "
            f"{size} --no-python pipeline …`; for one, `unset WORLD_SIZE`"
        )
    rank, local = _read_number("RANK", "0", 0), local_rank() or 0
    if rank >= size:
        raise InputError(f"the environment has RANK={rank} and WORLD_SIZE={size}. {UNSET}")
    return Launch(rank, size, local)


def local_rank() -> int | None:
    """Return this process's number on its machine; None if the environment does not say."""
    return _read_number("LOCAL_RANK", "0", 0) if "LOCAL_RANK" in os.environ else None


def is_one_of_many() -> bool:
    """Return whether torchrun started this process beside others."""
    try:
        return current_launch().world_size > 1
    except InputError:
        return False


UNSET = "Start several processes with torchrun, which sets them all; for one, unset them all"


def _read_number(name: str, default: str, minimum: int) -> int:
    text = os.environ.get(name, default)
    if not text.isdecimal() or int(text) < minimum:
        raise InputError(
            f"the environment has {name}={text!r}, which is not a whole number of {minimum} or "
            f"more. {UNSET}"
        )
    return int(text)
