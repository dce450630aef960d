"""Trackers that receive a run's numbers besides ``metrics.jsonl``, under the same names:
TensorBoard, Weights & Biases, MLflow. A resumed run continues there, without gaps or duplicates.

A new tracker is one class and its line in ``_TRACKERS``. What a tracker itself needs (its server,
key, project) is configured in its own way: ``WANDB_PROJECT``, ``WANDB_MODE``,
``MLFLOW_TRACKING_URI``, ``MLFLOW_EXPERIMENT_NAME``, … as its documentation says.
"""

import importlib.util
import logging
import os
import re
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from rekindle.data.errors import InputError
from rekindle.data.storage.atomic import write_text

log = logging.getLogger("rekindle")

PROJECT = "rekindle"  # default name of the project or experiment
Values = Mapping[str, float]


class Tracker(Protocol):
    """A receiver of numbers by name and step."""

    def write(self, values: Values, step: int) -> None:
        """Take the values of a step; steps decrease only at a resume."""

    def sync(self) -> None:
        """Pass on everything held back: a checkpoint must not be newer."""

    def close(self, finished: bool) -> None:
        """Pass on the rest and end; ``finished``: nothing interrupted the run."""


class _TensorBoard:
    def __init__(self, run: Path, first: int, settings: Mapping[str, Any]):
        from torch.utils.tensorboard import SummaryWriter

        self._board = SummaryWriter(str(run / "tensorboard"), purge_step=first + 1)

    def write(self, values: Values, step: int) -> None:
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def sync(self) -> None:
        self._board.flush()  # its own thread writes, so some of it may still wait

    def close(self, finished: bool) -> None:
        self._board.close()


class _Wandb:
    """Only numbers and settings are sent: no console, no code, no state of a checkout."""

    def __init__(self, run: Path, first: int, settings: Mapping[str, Any]):
        import wandb

        quiet = wandb.Settings(console="off", disable_code=True, disable_git=True, silent=True)
        self._run = wandb.init(
            id=_read_run_id(run, "wandb") or _write_run_id(run, "wandb", uuid.uuid4().hex),
            resume="allow",
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=run.resolve().name,
            dir=str(run),
            config=dict(settings),
            settings=quiet,
        )

    def write(self, values: Values, step: int) -> None:
        # its server would loudly refuse the steps of a resumed run that it already has
        if step >= self._run.step:
            self._run.log(dict(values), step=step)

    def sync(self) -> None:
        pass  # its own process writes as values come

    def close(self, finished: bool) -> None:
        self._run.finish(exit_code=0 if finished else 1)


class _MLflow:
    """Sends collected values at checkpoints, and in between some hundred numbers at a time."""

    _MOST_METRICS, _MOST_SETTINGS = 500, 100  # per request
    _LONGEST = 6000  # characters per setting

    def __init__(self, run: Path, first: int, settings: Mapping[str, Any]):
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param
        from mlflow.exceptions import MlflowException

        self._client, self._metric = MlflowClient(), Metric
        self._pending: list[Any] = []
        self._last_steps: dict[str, int] | None = None  # for a resumed run, the last step by name
        if (run_id := _read_run_id(run, "mlflow")) is not None:
            try:
                self._client.update_run(run_id, status="RUNNING")
                self._id, self._last_steps = run_id, {}
                return
            except MlflowException as error:
                log.warning("MLflow no longer has run %s (%s): a new one is made", run_id, error)
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        existing = self._client.get_experiment_by_name(name)
        experiment = existing.experiment_id if existing else self._client.create_experiment(name)
        new_run = self._client.create_run(experiment, run_name=run.resolve().name)
        self._id = _write_run_id(run, "mlflow", new_run.info.run_id)
        params = [Param(key, f"{value}"[: self._LONGEST]) for key, value in _flatten(settings)]
        for start in range(0, len(params), self._MOST_SETTINGS):
            self._client.log_batch(self._id, params=params[start : start + self._MOST_SETTINGS])

    def write(self, values: Values, step: int) -> None:
        now = int(time.time() * 1000)
        for name, value in values.items():
            # for example, a mixture's name has a +
            valid_name = re.sub(r"[^\w\-. :/]", "_", name, flags=re.ASCII)
            if self._last_steps is None or step > self._last_of(valid_name):
                self._pending.append(self._metric(valid_name, value, now, step))
        if len(self._pending) >= self._MOST_METRICS:
            self.sync()

    def _last_of(self, name: str) -> int:
        assert self._last_steps is not None
        if name not in self._last_steps:
            history = self._client.get_metric_history(self._id, name)
            self._last_steps[name] = max((metric.step for metric in history), default=-1)
        return self._last_steps[name]

    def sync(self) -> None:
        pending, self._pending = self._pending, []
        for start in range(0, len(pending), self._MOST_METRICS):
            self._client.log_batch(self._id, metrics=pending[start : start + self._MOST_METRICS])

    def close(self, finished: bool) -> None:
        self.sync()
        self._client.set_terminated(self._id, "FINISHED" if finished else "KILLED")


_TRACKERS: dict[str, Callable[[Path, int, Mapping[str, Any]], Tracker]] = {
    "tensorboard": _TensorBoard,
    "wandb": _Wandb,
    "mlflow": _MLflow,
}

_INSTALLED = {
    "tensorboard": "pip install tensorboard",
    "wandb": "pip install -e '.[wandb]'",
    "mlflow": "pip install -e '.[mlflow]'",
}


def check_trackers(names: Collection[str]) -> None:
    """Raise InputError if a tracker's package is missing, or it would ask for a key."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise InputError(
                f"train.report_to has {name}, but its package is not installed: "
                f"{_INSTALLED[name]}, or leave {name} out"
            )
    if "wandb" in names and os.environ.get("WANDB_MODE", "online") in ("online", "shared"):
        import wandb

        if not wandb.login(prompt=False):
            raise InputError(
                "train.report_to has wandb, but nobody is logged in: `wandb login` (or the "
                "variable WANDB_API_KEY), or WANDB_MODE=offline to send the run later (`wandb "
                "sync`)"
            )


class Trackers:
    """All trackers of a run. One that fails during the run is dropped with a warning: the run's own
    record has everything.
    """

    def __init__(self, names: Collection[str], run: Path, first: int, settings: Mapping[str, Any]):
        """``first``: the steps already done; ``settings``: of the run, by section.

        Raises InputError for a tracker that cannot be started.
        """
        self._trackers: dict[str, Tracker] = {}
        for name in names:
            try:
                self._trackers[name] = _TRACKERS[name](run, first, settings)
            except Exception as error:  # a server's error; each library has its own
                self.close(finished=False)
                raise InputError(
                    f"train.report_to: {name} cannot be started ({' '.join(str(error).split())}); "
                    f"fix that, or leave {name} out. metrics.jsonl has all its values"
                ) from None

    def write(self, values: Values, step: int) -> None:
        """Pass the values of a step to each."""
        self._call_each(lambda tracker: tracker.write(values, step))

    def sync(self) -> None:
        """Make each pass on what it holds back."""
        self._call_each(lambda tracker: tracker.sync())

    def close(self, finished: bool) -> None:
        """End each."""
        self._call_each(lambda tracker: tracker.close(finished))

    def _call_each(self, call: Callable[[Tracker], None]) -> None:
        for name, tracker in [*self._trackers.items()]:
            try:
                call(tracker)
            except Exception as error:  # a server's error; each library has its own
                log.warning(
                    "%s accepts no more values of this run (%s); metrics.jsonl has them",
                    name,
                    error,
                )
                del self._trackers[name]


# --- as what a run is known there -----------------------------------------------------------------


def _read_run_id(run: Path, name: str) -> str | None:
    file = _id_file(run, name)
    return file.read_text(encoding="utf-8").strip() if file.exists() else None


def _write_run_id(run: Path, name: str, run_id: str) -> str:
    write_text(_id_file(run, name), f"{run_id}\n")
    return run_id


def _id_file(run: Path, name: str) -> Path:
    return run / f"{name}.id"


def _flatten(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, object]]:
    """Yield each setting with its dotted key."""
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
