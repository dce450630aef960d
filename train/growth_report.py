"""Measure what growth does to a student on held-out text before the first step (ELLE): the largest
and mean |Δlogit|, and cross-entropy and perplexity before and after.
"""

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rekindle.data.batch import Batch
from rekindle.data.counted import counted
from rekindle.data.storage.atomic import write_json
from rekindle.train.device_batch import language_rows
from rekindle.train.evaluate import EvaluationData
from rekindle.train.growth.grow import Shape
from rekindle.train.model.student_config import GrowConfig
from rekindle.train.prepare import Prepared
from rekindle.train.record.run_folder import read_record
from rekindle.train.student import Student

log = logging.getLogger("rekindle")

GROWTH_FILE = "growth.json"
ROWS = 512  # positions whose whole-vocabulary logits are held at once

Report = dict[str, Any]


def measure_growth(run: Path, prepared: Prepared) -> Report | None:
    """Return the report of a grown student; None if it has not grown, or its report exists."""
    if prepared.ungrown is None or (run / GROWTH_FILE).exists():
        return None
    config = GrowConfig.model_validate(prepared.about["student"]["grow"])
    device = next(prepared.student.parameters()).device
    ungrown = prepared.ungrown().to(device)
    report = compare_students(ungrown, prepared.student, prepared.held_out, config, device)
    _log_report(report)
    grown = {key for key, count in report["from"].items() if report["to"][key] > count}
    if config.noise_std == 0 and grown - {"layers", "parameters"}:
        log.warning(
            "student grown without noise: copies of neurons stay equal for ever, copies of heads "
            "and hidden dimensions unless dropout separates them, and they learn nothing of "
            "their own. Set student.grow.noise_std (0.01 in ELLE)"
        )
    return report


def compare_students(
    ungrown: Student,
    grown: Student,
    data: EvaluationData,
    config: GrowConfig,
    device: torch.device,
) -> Report:
    """Compare both students on at most ``config.measure_sequences`` held-out sequences, evenly
    spaced.

    Logits are over the tokenizer's tokens at the positions with an LM loss (for a masked LM: those
    masked in replica 0), in float32, without dropout. ``ce`` is in nats per position; values are
    None if nothing is held out.
    """
    count = min(config.measure_sequences, len(data.index))
    index = data.index[np.arange(count) * len(data.index) // max(count, 1)]
    largest, total, losses, rows = 0.0, 0.0, np.zeros(2), 0
    for batch in replace(data, index=index, teachers=()).batches():
        for old, new, labels in _logits((ungrown, grown), batch, device):
            change = (new - old).abs()
            largest = max(largest, float(change.max()))
            total += float(change.sum(dtype=torch.float64))
            losses += [float(F.cross_entropy(z, labels, reduction="sum")) for z in (old, new)]
            rows += len(labels)
    return {
        "preserve": config.preserve,
        "noise_std": config.noise_std,
        "from": _describe_size(ungrown),
        "to": _describe_size(grown),
        "sequences": count,
        "positions": rows,
        "max_logit_change": largest if rows else None,
        "mean_logit_change": total / (rows * ungrown.vocabulary_size) if rows else None,
        "before": _text_values(float(losses[0]), rows),
        "after": _text_values(float(losses[1]), rows),
    }


@torch.no_grad()
def _logits(
    students: Sequence[Student], batch: Batch, device: torch.device
) -> Iterator[tuple[Tensor, ...]]:
    """Yield the logits [C,V] of each student, and the labels [C], for one block of rows
    at a time.
    """
    rows = language_rows(batch, students[0].task, device)
    inputs = [student.eval().with_domains(rows.inputs, batch.domains) for student in students]
    hidden = [
        s(student_inputs, rows.select).hidden
        for s, student_inputs in zip(students, inputs, strict=True)
    ]
    for first in range(0, len(rows.labels), ROWS):
        block = slice(first, first + ROWS)
        logits = [s.output_head.logits(h[block]) for s, h in zip(students, hidden, strict=True)]
        yield *logits, rows.labels[block]


def _text_values(total: float, rows: int) -> dict[str, float | None]:
    if not rows:
        return {"ce": None, "perplexity": None}
    ce = total / rows
    return {"ce": ce, "perplexity": math.exp(min(ce, 700.0))}  # 700: float64 ends near 709


def _describe_size(student: Student) -> dict[str, int]:
    parameters = sum(p.numel() for p in student.model.parameters())
    return Shape.of(student.model.config)._asdict() | {"parameters": parameters}


def _log_report(report: Report) -> None:
    old, new = report["from"], report["to"]
    grown = [f"{name} {old[name]:,} to {new[name]:,}" for name in old if old[name] != new[name]]
    if not report["positions"]:
        log.info("student grown: %s; nothing is held out to measure it on", ", ".join(grown))
        return
    log.info(
        f"student grown: {', '.join(grown) or 'nothing'}; |Δlogit| max "
        f"{report['max_logit_change']:.2g}, mean {report['mean_logit_change']:.2g}; perplexity "
        f"{report['before']['perplexity']:.2f} before, {report['after']['perplexity']:.2f} after "
        f"({counted(report['sequences'], 'held-out sequence')})"
    )


def save_growth(run: Path, report: Report | None) -> None:
    """Write the report into the run's directory."""
    if report is not None:
        write_json(run / GROWTH_FILE, report)


def saved_growth(run: Path) -> Report:
    """Return {"growth": the report} of a run with a grown student, else {}."""
    report = read_record(run / GROWTH_FILE, "remove it and resume: it is made again")
    return {} if report is None else {"growth": report}
