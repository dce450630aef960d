"""Measure a teacher's speed on this machine by timing a few units of the plan's sample rows.

Results are written to the sample's folder. One model is loaded at a time.
"""

import gc
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from rekindle.data.corpus.corpus import Corpus
from rekindle.pipeline.caching.compute_unit import Unit, UnitResult, run_unit
from rekindle.pipeline.caching.make_unit import write_unit
from rekindle.pipeline.caching.served_units import ServedTeacher
from rekindle.pipeline.caching.teachers import Teacher, TeacherPlan
from rekindle.pipeline.plan.work import bytes_without_positions

BUDGET = 10.0  # seconds per teacher, without loading
ENOUGH = 1.0  # seconds; a shard that takes this long gives a good measurement
FULL = 16  # sequences; with fewer, the fixed cost of a pass weighs too much


@dataclass(frozen=True)
class Probe:
    """What was measured for a teacher on the sample rows."""

    seconds_per_token: float  # per corpus token, in one replica
    bytes_per_position: float | None  # None if there was no position, or no measurement


def probe_teachers(plans: Sequence[TeacherPlan], steps: Corpus) -> list[Probe]:
    """Run teachers that share forward passes (or a single one) on the sample, and write their
    results beside it. Each gets an equal part of the time.

    The shards of ``steps`` grow, so a slow teacher is measured on a few sequences and a fast one on
    full batches. Raise InputError if the teacher cannot be run.
    """
    if plans[0].config.served is not None:
        return [_probe_server(plans[0], steps)]
    everything = [
        replace(plan, info=plan.info.model_copy(update={"domains": None})) for plan in plans
    ]
    teacher = Teacher(everything[0], steps)
    beside = [teacher.beside(plan) for plan in everything[1:]]
    began = time.perf_counter()
    # The first pass warms up; it is the only measurement of a teacher too slow for more.
    unit, result, rate = _run(teacher, steps, 0, beside)
    for shard, commit in enumerate(steps.commits):
        expected = rate * commit.facts["tokens"]
        if time.perf_counter() - began + expected > BUDGET:
            break
        unit, result, measured = _run(teacher, steps, shard, beside)
        rate = min(rate, measured)  # other work on the machine can only slow it down
        if measured * commit.facts["tokens"] >= ENOUGH and commit.rows >= FULL:
            break
    del teacher, beside
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    found = []
    for plan, one in zip(everything, (result, *result.beside), strict=True):
        written = write_unit(plan.info, steps, unit, one)
        own = written.bytes - bytes_without_positions(plan.info, written.rows)
        positions = written.facts["positions"]
        found.append(Probe(rate / len(plans), max(0, own) / positions if positions else None))
    return found


def _probe_server(plan: TeacherPlan, steps: Corpus) -> Probe:
    """Time one request about the sample's longest sequence."""
    teacher = ServedTeacher(plan, steps)
    places = [(shard, row) for shard, one in enumerate(steps.commits) for row in range(one.rows)]
    lengths = [int(steps.lengths(shard, row, row + 1)[0]) for shard, row in places]
    shard, row = places[int(np.argmax(lengths))]
    _, tokens, _ = teacher.sequences(Unit(shard))
    began = time.perf_counter()
    teacher.source.server.prompt_logprobs([tokens[row].tolist()], plan.info.k or 0)
    return Probe((time.perf_counter() - began) / max(lengths), None)


def _run(
    teacher: Teacher, steps: Corpus, shard: int, beside: Sequence[Teacher]
) -> tuple[Unit, UnitResult, float]:
    """Run one shard (one replica if there are several) and return its seconds per token."""
    unit = Unit(shard, teacher.info.view_class.numbers(1)[0])
    began = time.perf_counter()
    result = run_unit(teacher, unit, beside=beside)
    seconds = time.perf_counter() - began
    return unit, result, seconds / steps.commits[shard].facts["tokens"]
