"""Where the numbers of a run go beside ``metrics.jsonl``, by the same names: TensorBoard, Weights &
Biases, MLflow. A run that is gone on with is the same run there, without gaps or doubles.

A new one is one class and its line in ``_TRACKERS``. What each needs to be told beyond a run (where
its server is, the key, the project) is its own matter: ``WANDB_PROJECT``, ``WANDB_MODE``,
``MLFLOW_TRACKING_URI``, ``MLFLOW_EXPERIMENT_NAME``, … as its documentation has them.
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

PROJECT = "rekindle"  # what the project or experiment is called, where nobody says
Values = Mapping[str, float]


class Tracker(Protocol):
    """A place that takes numbers by name and step."""

    def write(self, values: Values, step: int) -> None:
        """Take the values of a step; steps never go down but at a resume."""

    def sync(self) -> None:
        """Hand on all that is held back: a checkpoint must not be newer."""

    def close(self, finished: bool) -> None:
        """Hand on the rest and end; ``finished``: nothing interrupted the run."""


class _TensorBoard:
    def __init__(self, run: Path, first: int, settings: Mapping[str, Any]):
        from torch.utils.tensorboard import SummaryWriter

        self._board = SummaryWriter(str(run / "tensorboard"), purge_step=first + 1)

    def write(self, values: Values, step: int) -> None:
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def sync(self) -> None:
        self._board.flush()  # its own thread writes: some of it may still wait

    def close(self, finished: bool) -> None:
        self._board.close()


class _Wandb:
    """Nothing but numbers and settings is sent: no console, no code, no state of a checkout."""

    def __init__(self, run: Path, first: int, settings: Mapping[str, Any]):
        import wandb

        quiet = wandb.Settings(console="off", disable_code=True, disable_git=True, silent=True)
        self._run = wandb.init(
            id=_known(run, "wandb") or _remember(run, "wandb", uuid.uuid4().hex),
            resume="allow",
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=run.resolve().name,
            dir=str(run),
            config=dict(settings),
            settings=quiet,
        )

    def write(self, values: Values, step: int) -> None:
        if step >= self._run.step:  # what its server has of a resumed run it would refuse, loudly
            self._run.log(dict(values), step=step)

    def sync(self) -> None:
        pass  # its own process writes as it comes

    def close(self, finished: bool) -> None:
        self._run.finish(exit_code=0 if finished else 1)


class _MLflow:
    """Sends what has gathered at checkpoints, and in between some hundred numbers at a time."""

    _MOST_METRICS, _MOST_SETTINGS = 500, 100  # a request
    _LONGEST = 6000  # characters of a setting

    def __init__(self, run: Path, first: int, settings: Mapping[str, Any]):
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param
        from mlflow.exceptions import MlflowException

        self._client, self._metric = MlflowClient(), Metric
        self._held: list[Any] = []
        self._there: dict[str, int] | None = None  # of a resumed run, the last step by name
        if (known := _known(run, "mlflow")) is not None:
            try:
                self._client.update_run(known, status="RUNNING")
                self._id, self._there = known, {}
                return
            except MlflowException as error:
                log.warning("MLflow has no run %s any more (%s): it is a new one", known, error)
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = self._client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else self._client.create_experiment(name)
        made = self._client.create_run(experiment, run_name=run.resolve().name)
        self._id = _remember(run, "mlflow", made.info.run_id)
        told = [Param(key, f"{value}"[: self._LONGEST]) for key, value in _flat(settings)]
        for at in range(0, len(told), self._MOST_SETTINGS):
            self._client.log_batch(self._id, params=told[at : at + self._MOST_SETTINGS])

    def write(self, values: Values, step: int) -> None:
        now = int(time.time() * 1000)
        for name, value in values.items():
            allowed = re.sub(r"[^\w\-. :/]", "_", name, flags=re.ASCII)  # a mixture has a + in it
            if self._there is None or step > self._last_of(allowed):
                self._held.append(self._metric(allowed, value, now, step))
        if len(self._held) >= self._MOST_METRICS:
            self.sync()

    def _last_of(self, name: str) -> int:
        assert self._there is not None
        if name not in self._there:
            history = self._client.get_metric_history(self._id, name)
            self._there[name] = max((one.step for one in history), default=-1)
        return self._there[name]

    def sync(self) -> None:
        held, self._held = self._held, []
        for at in range(0, len(held), self._MOST_METRICS):
            self._client.log_batch(self._id, metrics=held[at : at + self._MOST_METRICS])

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
    """Raise InputError where a tracker's package is missing, or it would ask for a key."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise InputError(
                f"train.report_to has {name}, and its package is not there: {_INSTALLED[name]}, "
                f"or leave {name} out"
            )
    if "wandb" in names and os.environ.get("WANDB_MODE", "online") in ("online", "shared"):
        import wandb

        if not wandb.login(prompt=False):
            raise InputError(
                "train.report_to has wandb, and nobody is logged in: `wandb login` (or the "
                "variable WANDB_API_KEY), or WANDB_MODE=offline to send the run later "
                "(`wandb sync`)"
            )


class Trackers:
    """All trackers of a run. One that fails in the middle is left out from there on, and said: the
    run's own record has everything.
    """

    def __init__(self, names: Collection[str], run: Path, first: int, settings: Mapping[str, Any]):
        """``first``: the steps that are done already; ``settings``: of the run, by section.

        Raises InputError for one that cannot be begun.
        """
        self._each: dict[str, Tracker] = {}
        for name in names:
            try:
                self._each[name] = _TRACKERS[name](run, first, settings)
            except Exception as error:  # a server's; each library has its own
                self.close(finished=False)
                raise InputError(
                    f"train.report_to: {name} cannot be begun ({' '.join(str(error).split())}); "
                    f"mend that, or leave {name} out. metrics.jsonl has all it would be told"
                ) from None

    def write(self, values: Values, step: int) -> None:
        """Hand the values of a step to each."""
        self._tell(lambda one: one.write(values, step))

    def sync(self) -> None:
        """Have each hand on what it holds back."""
        self._tell(lambda one: one.sync())

    def close(self, finished: bool) -> None:
        """End each."""
        self._tell(lambda one: one.close(finished))

    def _tell(self, do: Callable[[Tracker], None]) -> None:
        for name, one in [*self._each.items()]:
            try:
                do(one)
            except Exception as error:  # a server's; each library has its own
                log.warning("%s takes no more of this run (%s); metrics.jsonl does", name, error)
                del self._each[name]


# --- as what a run is known there -----------------------------------------------------------------


def _known(run: Path, name: str) -> str | None:
    file = _id_file(run, name)
    return file.read_text(encoding="utf-8").strip() if file.exists() else None


def _remember(run: Path, name: str, given: str) -> str:
    write_text(_id_file(run, name), f"{given}\n")
    return given


def _id_file(run: Path, name: str) -> Path:
    return run / f"{name}.id"


def _flat(settings: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, object]]:
    """Each setting by its dotted key."""
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value
