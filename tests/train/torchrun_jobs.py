"""Started by torchrun: trains several students one after another in one process group.

Arguments: a JSON file with {"cache", "jobs": [{"student", "train", "out", "resume"}]}.
"""

import json
import os
import sys
from pathlib import Path

import torch

from rekindle.data.cache import Cache
from rekindle.train.config import StudentConfig, TrainConfig
from rekindle.train.distributed import join_world
from rekindle.train.loop import train_student


def main() -> None:
    torch.set_num_threads(1)
    if not torch.cuda.is_available():
        torch.set_deterministic_debug_mode("warn")  # NaN in new memory: see testlib.kernels.memory
    given = json.loads(Path(sys.argv[1]).read_text())
    with join_world() as world:
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
