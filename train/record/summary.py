"""Read a finished run's summary.json completely, or refuse it naming the wrong key."""

from pathlib import Path
from typing import Any

from pydantic import ConfigDict, Field

from rekindle.data.settings import Settings, parse_settings
from rekindle.train.model.unfinished import SUMMARY_FILE
from rekindle.train.record.run_folder import read_record, reading_record


class _Summary(Settings):
    """The types of its contents; older runs have fewer."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=True)

    steps: int = Field(0, ge=0)
    seconds: float = 0.0
    evaluation: dict[str, float] = Field(default_factory=dict)
    coverage: dict[str, float] = Field(default_factory=dict)
    best: dict[str, object] | None = None


def read_summary(run: Path, advice: str = "") -> dict[str, Any]:
    """Return the summary of a finished run; empty for others. Raise CheckpointError, naming the
    key, for a damaged summary.
    """
    path = run / SUMMARY_FILE
    summary = read_record(path, advice) or {}
    with reading_record(path, advice):
        parse_settings(_Summary, summary)
    return summary
