"""Write the record of a training run, ``metrics.jsonl``, and its trackers, without gaps or
duplicates after a resume.
"""

import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Self

from rekindle.data.errors import CheckpointError
from rekindle.data.storage.atomic import write_text
from rekindle.train.record.trackers import Trackers

METRICS_FILE = "metrics.jsonl"


class RunLog:
    """Appends one JSON object per line; on resume, lines after the checkpoint's step are dropped.

    ``silent``: one of several processes, which writes nothing. ``report_to``: trackers that also
    get the values, under kind/name; ``settings``: settings of the run for them, by section.
    """

    def __init__(
        self,
        run: Path,
        resume_step: int,
        silent: bool = False,
        report_to: Collection[str] = ("tensorboard",),
        settings: Mapping[str, Any] = MappingProxyType({}),
    ):
        self.silent = silent
        if silent:
            return
        self._trackers = Trackers(report_to, run, resume_step, settings)
        self.path = run / METRICS_FILE
        if self.path.exists():
            kept_records = [record for record in read_metrics(run) if record["step"] <= resume_step]
            write_text(self.path, "".join(json.dumps(record) + "\n" for record in kept_records))
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 - stays open as long as the run

    def write(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Write one record: ``kind`` is train or evaluate, ``step`` the steps done.

        In training records ``seconds`` is the wall time the run has taken so far, including its
        start, waiting and evaluations, over all resumes (without what was lost after a checkpoint).
        """
        if self.silent:
            return
        rounded = {name: float(f"{float(value):.9g}") for name, value in values.items()}
        record = {"kind": kind, "step": step} | rounded
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        self._trackers.write({f"{kind}/{name}": float(v) for name, v in values.items()}, step)

    def sync(self) -> None:
        """Bring all records to the disk: a checkpoint must not be newer than its metrics."""
        if not self.silent:
            os.fsync(self._file.fileno())
            self._trackers.sync()

    def close(self, finished: bool = True) -> None:
        """Flush and close everything; ``finished``: nothing interrupted the run."""
        if self.silent:
            return
        self._file.close()
        self._trackers.close(finished)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close(finished=kind is None)


def read_metrics(run: Path) -> list[dict]:
    """Return all records of a run in order; empty if it has not begun to write.

    A last line that is not JSON was cut short by a kill, and is left out. Raises CheckpointError,
    naming the line, for any other invalid line.
    """
    path = run / METRICS_FILE
    lines = path.read_bytes().splitlines() if path.exists() else []
    records: list[dict] = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            if number == len(lines):
                break
            record = None
        if problem := _record_problem(record):
            raise CheckpointError(
                f"{path} is damaged: line {number} {problem}. Restore the file from a copy, or "
                "remove the line: the run continues without it"
            )
        records.append(record)
    return records


def _record_problem(record: object) -> str:
    """Return what keeps a line from being a record; empty if nothing does."""
    if not isinstance(record, dict):
        return "is not a JSON object"
    if not isinstance(record.get("kind"), str):
        return "has no kind (train, or evaluate)"
    for name, value in record.items():
        if name != "kind" and type(value) not in (int, float):
            return f"has {value!r} for {name}, which must be a number"
    if type(step := record.get("step")) is not int or step < 0:
        return f"has {step!r} for step, which must be a whole number"
    return ""
