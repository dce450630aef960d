"""How fast a teacher is on this machine: a few units of the plan's sample rows, timed.

What it computes goes into the sample's folder. One model is loaded at a time.
"""

import gc
import time
from dataclasses import dataclass, replace

import torch

from rekindle.data.corpus.corpus import Corpus
from rekindle.pipeline.caching.compute_unit import Unit, UnitResult, run_unit
from rekindle.pipeline.caching.make_unit import write_unit
from rekindle.pipeline.caching.teachers import Teacher, TeacherPlan
from rekindle.pipeline.plan.work import bytes_without_positions

BUDGET = 10.0  # seconds that a teacher may take, loading aside
ENOUGH = 1.0  # a shard that took so long is measured well
FULL = 16  # sequences; of fewer, what comes with every pass counts for too much


@dataclass(frozen=True)
class Probe:
    """What was measured of a teacher on the sample rows."""

    seconds_per_token: float  # of the corpus, in one replica
    bytes_per_position: float | None  # None where there was no position


def probe_teacher(plan: TeacherPlan, steps: Corpus) -> Probe:
    """Run a teacher on the sample, and write what it leaves beside the sample.

    The shards of ``steps`` grow, so a slow teacher is measured on a few sequences and a fast one on
    full batches. Raises InputError when the teacher cannot be run.
    """
    everything = replace(plan, info=plan.info.model_copy(update={"domains": None}))
    teacher = Teacher(everything, steps)
    began = time.perf_counter()
    # The first pass is a warm-up, and all there is of a teacher that is too slow for more.
    unit, result, rate = _run(teacher, steps, 0)
    for shard, commit in enumerate(steps.commits):
        expected = rate * commit.facts["tokens"]
        if time.perf_counter() - began + expected > BUDGET:
            break
        unit, result, measured = _run(teacher, steps, shard)
        rate = min(rate, measured)  # other work on the machine can only slow it down
        if measured * commit.facts["tokens"] >= ENOUGH and commit.rows >= FULL:
            break
    del teacher
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    written = write_unit(everything.info, steps, unit, result)
    own = written.bytes - bytes_without_positions(everything.info, written.rows)
    positions = written.facts["positions"]
    return Probe(rate, max(0, own) / positions if positions else None)


def _run(teacher: Teacher, steps: Corpus, shard: int) -> tuple[Unit, UnitResult, float]:
    """One shard, in one replica where there are several; with its seconds per token."""
    unit = Unit(shard, teacher.info.shown.numbers(1)[0])
    began = time.perf_counter()
    result = run_unit(teacher, unit)
    seconds = time.perf_counter() - began
    return unit, result, seconds / steps.commits[shard].facts["tokens"]
