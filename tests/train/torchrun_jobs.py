"""Started by torchrun: trains several students one after another in one process group.

Arguments: a JSON file with {"cache", "jobs": [{"student", "train", "out", "resume"}]}.
"""

import json
import os
import sys
from pathlib import Path

import torch

from rekindle.data.cache import Cache
from rekindle.pipeline.exits import errors_as_exit_codes
from rekindle.train.config import StudentConfig, TrainConfig
from rekindle.train.distributed import join_world
from rekindle.train.loop import train_student
from rekindle.train.objective.objective import Objective


def no_memory_at(step: int) -> None:
    """This process alone runs out of memory, in the midst of a step."""
    real, calls = Objective.loss, []

    def loss(*arguments: object) -> object:
        calls.append(1)
        if len(calls) == step:
            raise MemoryError
        return real(*arguments)

    Objective.loss = loss


def main() -> None:
    torch.set_num_threads(1)
    if not torch.cuda.is_available():
        torch.set_deterministic_debug_mode("warn")  # NaN in new memory: see testlib.kernels.memory
    given = json.loads(Path(sys.argv[1]).read_text())
    with errors_as_exit_codes(), join_world() as world:
        if world.rank == given.get("out_of_memory"):
            no_memory_at(3)
        for job in given["jobs"]:
            train_student(
                Cache.open(given["cache"]),
                StudentConfig.model_validate(job["student"]),
                TrainConfig.model_validate(job["train"]),
                Path(job["out"]),
                resume=job.get("resume", False),
                world=world,
            )
    sys.stdout.flush()
    # A thread of gloo that still holds a tensor at the interpreter's own end would abort.
    os._exit(0)


if __name__ == "__main__":
    main()
