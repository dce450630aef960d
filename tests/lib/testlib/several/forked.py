"""The processes of one world as torchrun starts them, but forked, because imports take seconds."""

import os
import socket
from collections.abc import Callable

from testlib.processes import Child

PROCESSES = 2


def forked_world(work: Callable[[], object], processes: int = PROCESSES) -> list[Child]:
    """Fork processes that run ``work``, each with the environment torchrun would give.

    This process must have a single thread: OpenMP's others are not forked.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": processes}
    shared |= {"LOCAL_WORLD_SIZE": processes, "OMP_NUM_THREADS": 1}

    def begin(rank: int) -> Child:
        def run() -> None:
            own = shared | {"RANK": rank, "LOCAL_RANK": rank}
            os.environ |= {name: str(value) for name, value in own.items()}
            work()

        return Child(run)

    return [begin(rank) for rank in range(processes)]


def end_well(children: list[Child]) -> None:
    for child in children:
        assert child.wait(300) == 0, child.errors
