"""What torchrun says in the environment of the processes it starts, checked. Torch is not imported.

Clusters set the same names for purposes of their own, and leave them in shells.
"""

import os
from typing import NamedTuple

from rekindle.data.errors import InputError

NEEDED = ("RANK", "MASTER_ADDR", "MASTER_PORT")  # beside WORLD_SIZE, where there are several


class Launch(NamedTuple):
    """One of the processes of a run, as torchrun has started it; or the only one."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0


def launched() -> Launch:
    """What the environment says of this process.

    Raises InputError where it says something that torchrun does not say.
    """
    size = _number("WORLD_SIZE", "1", 1)
    if size == 1:
        return Launch()
    missing = [name for name in NEEDED if not os.environ.get(name)]
    if missing:
        raise InputError(
            f"the environment has WORLD_SIZE={size}, and no {', '.join(missing)}: no torchrun has "
            "started this process. For several processes: `torchrun --nproc-per-node "
            f"{size} --no-python pipeline …`; for one, `unset WORLD_SIZE`"
        )
    rank, local = _number("RANK", "0", 0), local_rank() or 0
    if rank >= size:
        raise InputError(f"the environment has RANK={rank} and WORLD_SIZE={size}. {UNSET}")
    return Launch(rank, size, local)


def local_rank() -> int | None:
    """Which of its machine's processes this one is; None where the environment does not say."""
    return _number("LOCAL_RANK", "0", 0) if "LOCAL_RANK" in os.environ else None


def one_of_many() -> bool:
    """Whether torchrun has started this process beside others."""
    try:
        return launched().world_size > 1
    except InputError:
        return False


UNSET = "Start several processes with torchrun, which sets them all; for one, unset them all"


def _number(name: str, usual: str, least: int) -> int:
    text = os.environ.get(name, usual)
    if not text.isdecimal() or int(text) < least:
        raise InputError(
            f"the environment has {name}={text!r}, which is no whole number of {least} or more. "
            f"{UNSET}"
        )
    return int(text)
