"""Run configurations over tiny corpora, and a cache with a teacher of each kind of target."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from testlib.command import pipeline


@pytest.fixture(scope="session", autouse=True)
def _one_thread(one_thread: None) -> None:
    """In every test of this folder."""


def _home(tmp_path_factory: pytest.TempPathFactory, name: str) -> str:
    """A folder that all processes of this test run share."""
    own = tmp_path_factory.getbasetemp()
    return str((own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / name)


@pytest.fixture(scope="session")
def built_in_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the built-in models are made, once for all tests: $REKINDLE_HOME where it is given."""
    with pytest.MonkeyPatch.context() as patch:
        if "REKINDLE_HOME" not in os.environ:
            patch.setenv("REKINDLE_HOME", _home(tmp_path_factory, "rekindle-home"))
        yield Path(os.environ["REKINDLE_HOME"])


@pytest.fixture
def hasty_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """A home of built-in models that have learnt nothing: trained for two steps, in this process.

    For tests that ask whether something runs, not how well.
    """
    from testlib.builtin.hasty import make_hastily

    monkeypatch.setenv("REKINDLE_HOME", _home(tmp_path_factory, "hasty-home"))
    monkeypatch.setattr("rekindle.pipeline.builtin.missing._make", make_hastily)


@pytest.fixture
def command() -> Callable[..., tuple[int, str, str]]:
    """command(*arguments): exit code, stdout and stderr of ``pipeline``, run in this process."""

    def run(*arguments: object) -> tuple[int, str, str]:
        done = pipeline(*arguments)
        return done.returncode, done.stdout, done.stderr

    return run


Configure = Callable[..., Any]
MethodRun = Callable[..., Path]


@pytest.fixture(scope="session")
def method_run(configure: Configure) -> MethodRun:
    """method_run(folder, teachers, student, objective, steps=…, …) -> a run file over 12 sequences.

    Every step reads all of them, and the learning rate is too small to change a student: what a
    step's loss is can be worked out from the student it began with.
    """
    import yaml

    from rekindle.pipeline.config import dump_config

    def make(
        folder: Path,
        teachers: Sequence[Mapping[str, Any]],
        student: Mapping[str, Any],
        objective: Mapping[str, Any],
        corpus: Mapping[str, Any] | None = None,
        cache: Mapping[str, Any] | None = None,
        **train: Any,
    ) -> Path:
        config = configure(folder / "cache", teachers, corpus, cache)
        still = {"learning_rate": 1e-12, "warmup_steps": 0, "held_out": 0.0, "weight_decay": 0.0}
        whole = {"batch_sequences": 12, "checkpoint_every": 100, "evaluate_every": 100}
        values = yaml.safe_load(dump_config(config))
        values["student"] = dict(student)
        values["train"] = {"steps": 1, **still, **whole, **train, "objective": dict(objective)}
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "run.yaml"
        path.write_text(yaml.safe_dump(values))
        return path

    return make
