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

BUDGET_SECONDS = 10.0  # seconds per teacher, without loading
ENOUGH_SECONDS = 1.0  # seconds; a shard that takes this long gives a good measurement
FULL_BATCH = 16  # sequences; with fewer, the fixed cost of a pass weighs too much


@dataclass(frozen=True)
class Probe:
    """What was measured for a teacher on the sample rows."""

    seconds_per_token: float  # per corpus token, in one replica
    bytes_per_position: float | None  # None if there was no position, or no measurement


def probe_teachers(plans: Sequence[TeacherPlan], probe_corpus: Corpus) -> list[Probe]:
    """Run teachers that share forward passes (or a single one) on the sample, and write their
    results beside it. Each gets an equal part of the time.

    The shards of ``probe_corpus`` grow, so a slow teacher is measured on a few sequences and a fast
    one on full batches. Raise InputError if the teacher cannot be run.
    """
    if plans[0].config.served is not None:
        return [_probe_server(plans[0], probe_corpus)]
    unrestricted = [
        replace(plan, info=plan.info.model_copy(update={"domains": None})) for plan in plans
    ]
    teacher = Teacher(unrestricted[0], probe_corpus)
    others = [teacher.with_plan(plan) for plan in unrestricted[1:]]
    start_time = time.perf_counter()
    # The first pass warms up; it is the only measurement of a teacher too slow for more.
    unit, result, rate = _run(teacher, probe_corpus, 0, others)
    for shard, commit in enumerate(probe_corpus.commits):
        expected = rate * commit.facts["tokens"]
        if time.perf_counter() - start_time + expected > BUDGET_SECONDS:
            break
        unit, result, measured = _run(teacher, probe_corpus, shard, others)
        rate = min(rate, measured)  # other work on the machine can only slow it down
        if measured * commit.facts["tokens"] >= ENOUGH_SECONDS and commit.rows >= FULL_BATCH:
            break
    del teacher, others
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    probes = []
    for plan, teacher_result in zip(unrestricted, (result, *result.others), strict=True):
        written_commit = write_unit(plan.info, probe_corpus, unit, teacher_result)
        position_bytes = written_commit.bytes - bytes_without_positions(
            plan.info, written_commit.rows
        )
        positions = written_commit.facts["positions"]
        probes.append(
            Probe(rate / len(plans), max(0, position_bytes) / positions if positions else None)
        )
    return probes


def _probe_server(plan: TeacherPlan, probe_corpus: Corpus) -> Probe:
    """Time one request about the sample's longest sequence."""
    teacher = ServedTeacher(plan, probe_corpus)
    places = [
        (shard, row)
        for shard, commit in enumerate(probe_corpus.commits)
        for row in range(commit.rows)
    ]
    lengths = [int(probe_corpus.lengths(shard, row, row + 1)[0]) for shard, row in places]
    shard, row = places[int(np.argmax(lengths))]
    _, tokens, _ = teacher.sequences(Unit(shard))
    start_time = time.perf_counter()
    teacher.named_server.server.prompt_logprobs([tokens[row].tolist()], plan.info.k or 0)
    return Probe((time.perf_counter() - start_time) / max(lengths), None)


def _run(
    teacher: Teacher, probe_corpus: Corpus, shard: int, others: Sequence[Teacher]
) -> tuple[Unit, UnitResult, float]:
    """Run one shard (one replica if there are several) and return its seconds per token."""
    unit = Unit(shard, teacher.info.view_class.numbers(1)[0])
    start_time = time.perf_counter()
    result = run_unit(teacher, unit, others=others)
    seconds = time.perf_counter() - start_time
    return unit, result, seconds / probe_corpus.commits[shard].facts["tokens"]
