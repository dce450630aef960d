"""Runs without teachers, for tests of the results of a training run."""

from pathlib import Path
from typing import Any

import yaml

from rekindle.pipeline.config import RunConfig, dump_config


def write_run(folder: Path, config: RunConfig, student: Path, train: dict[str, Any]) -> Path:
    """Write ``config`` with a student and ``train`` to folder/run.yaml; return that file."""
    values: dict[str, Any] = yaml.safe_load(dump_config(config))
    values |= {"student": {"model": str(student), "task": "masked_lm"}, "train": train}
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    return folder / "run.yaml"
