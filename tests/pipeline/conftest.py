"""Run configurations over tiny corpora, and a cache with a teacher of each kind of target."""

import io
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any
from unittest import mock

import pytest


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Models this small lose more at OpenMP's barriers than they gain, once cores are shared."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def built_in_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the built-in models are made, once for all tests: $REKINDLE_HOME where it is given."""
    own = tmp_path_factory.getbasetemp()
    shared = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own
    with pytest.MonkeyPatch.context() as patch:
        if "REKINDLE_HOME" not in os.environ:
            patch.setenv("REKINDLE_HOME", str(shared / "rekindle-home"))
        yield Path(os.environ["REKINDLE_HOME"])


@pytest.fixture
def command() -> Callable[..., tuple[int, str, str]]:
    """command(*arguments): exit code, stdout and stderr of ``pipeline``, run in this process."""
    from rekindle.pipeline.cli import main

    def run(*arguments: object) -> tuple[int, str, str]:
        out, errors, code = io.StringIO(), io.StringIO(), 0
        given = ["pipeline", *map(str, arguments)]
        with mock.patch.object(sys, "argv", given), redirect_stdout(out), redirect_stderr(errors):
            try:
                main()
            except SystemExit as leaving:
                code = int(leaving.code or 0)
        return code, out.getvalue(), errors.getvalue()

    return run


Configure = Callable[..., Any]


@pytest.fixture(scope="session")
def configure(corpus_file: Path, wordpiece: Path) -> Configure:
    """configure(path, teachers, corpus={…}, cache={…}) -> RunConfig over 12 short sequences.

    Three shards of 5, 5 and 2 sequences, two replicas that mask every token once between them.
    """
    from rekindle.data.settings import parse_settings
    from rekindle.pipeline.config import RunConfig

    def make(
        path: Path,
        teachers: Sequence[Mapping[str, Any]],
        corpus: Mapping[str, Any] | None = None,
        cache: Mapping[str, Any] | None = None,
    ) -> RunConfig:
        text = {
            "source": [str(corpus_file)],
            "tokenizer": str(wordpiece),
            "domain_field": "domain",
            "sequence_length": 24,
            "limit_sequences": 12,
        }
        where = {
            "path": str(path),
            "sequences_per_shard": 5,
            "replicas": 2,
            "mask": {"policy": "cover"},
        }
        values = {
            "corpus": text | dict(corpus or {}),
            "cache": where | dict(cache or {}),
            "teachers": [dict(teacher) for teacher in teachers],
        }
        return parse_settings(RunConfig, values)

    return make


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
