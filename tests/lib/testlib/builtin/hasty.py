"""Built-in models made in this process, in two steps each: they can be run, and know nothing."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

from rekindle.pipeline import make_builtin
from rekindle.pipeline.builtin.names import folder
from rekindle.pipeline.builtin.settings import SETTINGS
from rekindle.pipeline.builtin.tasks import TaskSizes
from rekindle.pipeline.processes.jobs import Report
from rekindle.pipeline.progress import Progress
from rekindle.train.record.run_folder import alone_in

_SHORT = {"steps": 2, "warmup_steps": 1, "evaluate_every": 2}
_HASTY = SETTINGS.model_copy(
    update={
        "replicas": 1,
        "documents": 300,
        "sizes": TaskSizes(train=64, dev=32, test=64),
        "pretrain": SETTINGS.pretrain | _SHORT,
        "further": SETTINGS.further | _SHORT,
        "finetune": SETTINGS.finetune | {"max_steps": 2},
    }
)


def make_hastily(names: Sequence[str]) -> None:
    """As ``make_builtin.make``, but for what is learnt."""
    where = folder()  # its name tells of the real settings, and so the models are found
    own = [name.removeprefix("python-docs/") for name in names]
    models = make_builtin.with_what_they_need([name for name in own if name in make_builtin.MODELS])
    with (
        alone_in(where, wait=True),
        tempfile.TemporaryDirectory(dir=where) as begun,
        mock.patch.object(make_builtin, "SETTINGS", _HASTY),
    ):
        documents = where / "documents"
        if not documents.exists():
            make_builtin._make_documents(Path(begun, "documents"), documents, Progress())
        for name in models:
            if not (where / name).exists():
                job = make_builtin.job_of(name, where, Path(begun))
                job.function(*job.arguments, Report())
