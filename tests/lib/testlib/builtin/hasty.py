"""Make built-in models in this process with two training steps each: they run but know nothing."""

from collections.abc import Sequence
from pathlib import Path
from unittest import mock

from rekindle.pipeline import make_builtin
from rekindle.pipeline.builtin.settings import SETTINGS
from rekindle.pipeline.builtin.tasks import TaskSizes
from rekindle.pipeline.processes.jobs import Job, Report
from rekindle.pipeline.progress import Progress

_SHORT = {"steps": 2, "warmup_steps": 1, "evaluate_every": 2}
_HASTY = SETTINGS.model_copy(
    update={
        "replicas": 1,
        "documents": 300,
        "sizes": TaskSizes(train=64, dev=32, test=64),
        "pretrain": SETTINGS.pretrain | _SHORT,
        "further": SETTINGS.further | _SHORT,
        "finetune": SETTINGS.finetune | {"max_steps": 2},
        "encoder": SETTINGS.encoder | {"steps": 2},
    }
)


def make_hastily(names: Sequence[str]) -> None:
    """Do as ``make_builtin.make``, into the folder of the real ones, with tiny settings."""
    patched = {"SETTINGS": _HASTY, "warm_up": lambda: None, "run_jobs": _run_here}
    with mock.patch.multiple(make_builtin, **patched):
        make_builtin.make(names, Progress())


def _run_here(jobs: Sequence[Job], log_file: Path, progress: Progress) -> None:
    for job in jobs:
        assert job.output is not None
        if not job.output.exists():
            job.function(*job.arguments, Report())
