"""The record of a training run: ``metrics.jsonl``, and the trackers beside it, without gaps or
doubles after a resume.
"""

import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Self

from rekindle.data.storage.atomic import write_text
from rekindle.train.record.trackers import Trackers


class RunLog:
    """Appends one JSON object per line; on resume, lines past the checkpoint's step are dropped.

    ``silent``: one of several processes, which writes nothing. ``report_to``: the trackers that are
    told, too, under kind/name; ``settings``: what they may show of the run, by section.
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
        self.path = run / "metrics.jsonl"
        if self.path.exists():
            kept = [record for record in read_metrics(run) if record["step"] <= resume_step]
            write_text(self.path, "".join(json.dumps(record) + "\n" for record in kept))
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 - lives as long as the run

    def write(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """One record: ``kind`` is train or evaluate, ``step`` the steps done.

        Of training, ``seconds`` are those the run has taken so far, as the clock on the wall goes:
        its start, waiting and evaluations before included, over all the times it was gone on with
        (but for what was lost after a checkpoint).
        """
        if self.silent:
            return
        shown = {name: float(f"{float(value):.9g}") for name, value in values.items()}
        record = {"kind": kind, "step": step} | shown
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        self._trackers.write({f"{kind}/{name}": float(v) for name, v in values.items()}, step)

    def sync(self) -> None:
        """Bring all records to the disk: a checkpoint must not be newer than its metrics."""
        if not self.silent:
            os.fsync(self._file.fileno())
            self._trackers.sync()

    def close(self, finished: bool = True) -> None:
        """Flush and close all; ``finished``: nothing interrupted the run."""
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
    """All records of a run, in order; none of one that has not begun to write."""
    records: list[dict] = []
    if not (run / "metrics.jsonl").exists():
        return records
    for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:  # the line that a kill cut short
            continue
    return records
