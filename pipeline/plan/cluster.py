"""Estimate what a planned cache costs on many machines: time, files, requests, money.

Pure arithmetic: GPU speed and all prices are assumptions, and the output lists them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import Field

from rekindle.data.counted import counted, shown_bytes
from rekindle.data.errors import InputError
from rekindle.data.settings import Settings, parse_settings
from rekindle.pipeline.plan.figures import CorpusPlan, RunPlan, TeacherWork
from rekindle.pipeline.plan.text import format_seconds
from rekindle.pipeline.yaml_text import parse_yaml

NAMES_PER_LISTING = 1000  # names an object store lists per request
ROLL_UP_BYTES = 160  # bytes per unit in the roll-up of commit records, roughly
MANY_UNITS = 1_000_000  # units; with more, files and requests cost more than they should
UNITS_AIMED_FOR = 250_000  # units the advice aims for


class Assumptions(Settings):
    """Values of `--assume KEY=VALUE`. Default prices are a large cloud's list prices in 2026."""

    gpus_per_node: int = Field(8, gt=0, description="stage 1 processes per node")
    tokens_per_second: float | None = Field(
        None,
        gt=0,
        description=("of a teacher on one GPU; null: as the probe measured on this machine"),
    )
    gpu_hour: float = Field(2.5, ge=0, description="price of a GPU hour, dollars")
    gigabyte_month: float = Field(
        0.023, ge=0, description=("price of storage, dollars per GB and month")
    )
    thousand_writes: float = Field(
        0.005, ge=0, description=("price of 1,000 writes or listings, dollars")
    )
    thousand_reads: float = Field(0.0004, ge=0, description="price of 1,000 reads, dollars")
    listing_seconds: float = Field(
        0.1, ge=0, description=("seconds for a request that lists 1,000 names")
    )
    megabytes_per_second: float = Field(
        100, gt=0, description=("read speed from the object store, per process")
    )


@dataclass(frozen=True)
class ClusterPlan:
    """A new cache made on ``nodes``. Fields are None where the teachers' time is unknown."""

    nodes: int
    assumed: dict[str, Any]
    units: int  # corpus, views and teachers together; each unit is a data file and a commit record
    objects: int
    bytes: int
    roll_up_bytes: int  # all roll-ups of commit records together
    listings: int  # requests to list all commit records once
    open_seconds: float  # to open the cache in an object store
    writes: int  # requests
    gpu_hours: float | None
    seconds: float | None  # until all teachers are done
    writes_per_second: float | None
    bytes_per_second: float | None  # written by each node
    gpu_dollars: float | None
    month_dollars: float  # to store it
    write_dollars: float
    read_dollars: float  # requests of a student that reads everything once
    advice: str | None  # set if there are too many files


def parse_assumptions(assignments: Sequence[str]) -> Assumptions:
    """Parse the values of ``--assume``. Raise InputError for an unknown key or a wrong value."""
    values: dict[str, object] = {}
    for assignment in assignments:
        key, separator, text = assignment.partition("=")
        if not separator:
            raise InputError(f"--assume takes KEY=VALUE, got {assignment!r}")
        values[key.strip()] = parse_yaml(text, f"--assume {key}")
    return parse_settings(Assumptions, values, "--assume")


def on_nodes(plan: RunPlan, nodes: int, assume: Assumptions) -> ClusterPlan:
    """Estimate what the cache of ``plan`` costs on ``nodes``. Raise InputError if the size of the
    corpus is unknown.
    """
    corpus = plan.corpus
    if corpus.sequences is None or corpus.tokens is None or plan.totals.bytes is None:
        raise InputError(f"--nodes: the corpus is not known; {corpus.basis}")
    shards = math.ceil(corpus.sequences / (corpus.sequences_per_shard or 1))
    sets = [shards, *(view.units_to_make + view.units_present for view in plan.views)]
    sets += [(t.units_to_make or 0) + (t.units_present or 0) for t in plan.teachers]
    units = sum(sets)
    listings = sum(math.ceil(count / NAMES_PER_LISTING) for count in sets)
    seconds = [_seconds(work, corpus, assume) for work in plan.teachers]
    known_seconds = [teacher_seconds for teacher_seconds in seconds if teacher_seconds is not None]
    busy_seconds = (
        sum(known_seconds) if len(known_seconds) == len(seconds) and known_seconds else None
    )
    processes = nodes * assume.gpus_per_node
    wall_seconds = None
    # teachers run one after another; the last units of each leave some processes idle
    if busy_seconds is not None:
        wall_seconds = 0.0
        for work, teacher_seconds in zip(plan.teachers, known_seconds, strict=True):
            count = work.units_to_make or 1
            wall_seconds += math.ceil(count / processes) * teacher_seconds / count
    size = plan.totals.bytes
    return ClusterPlan(
        nodes=nodes,
        assumed=assume.model_dump(),
        units=units,
        objects=2 * units,
        bytes=size,
        roll_up_bytes=ROLL_UP_BYTES * units,
        listings=listings,
        open_seconds=listings * assume.listing_seconds
        + ROLL_UP_BYTES * units / (1e6 * assume.megabytes_per_second),
        writes=2 * units,
        gpu_hours=None if busy_seconds is None else busy_seconds / 3600,
        seconds=wall_seconds,
        writes_per_second=2 * units / wall_seconds if wall_seconds else None,
        bytes_per_second=size / wall_seconds / nodes if wall_seconds else None,
        gpu_dollars=None if busy_seconds is None else busy_seconds / 3600 * assume.gpu_hour,
        month_dollars=size / 1e9 * assume.gigabyte_month,
        write_dollars=2 * units / 1000 * assume.thousand_writes,
        read_dollars=(2 * units * assume.thousand_reads + listings * assume.thousand_writes) / 1000,
        advice=_advice(units, corpus),
    )


def _seconds(work: TeacherWork, corpus: CorpusPlan, assume: Assumptions) -> float | None:
    """Return the seconds one process needs for a teacher."""
    if assume.tokens_per_second is None:
        return work.seconds
    assert corpus.tokens is not None
    tokens = corpus.tokens * work.replicas * (1.0 if work.share is None else work.share)
    return tokens / assume.tokens_per_second / (1 + len(work.shares))


def _advice(units: int, corpus: CorpusPlan) -> str | None:
    size = corpus.sequences_per_shard or 1
    if units <= MANY_UNITS:
        return None
    larger = size * 2 ** math.ceil(math.log2(units / UNITS_AIMED_FOR))
    return (
        f"{units:,} units are many files: cache.sequences_per_shard: {larger} makes them "
        f"{math.ceil(units * size / larger):,} (now {size}; a unit is what a kill loses)"
    )


def cluster_lines(plan: ClusterPlan) -> list[str]:
    """Format the plan as lines of text."""
    assumptions = ", ".join(
        f"{key}={value:g}" for key, value in plan.assumed.items() if value is not None
    )
    time = "time and GPU hours are not known: --assume tokens_per_second=N, of one GPU"
    dollars = ""
    if plan.seconds is not None and plan.gpu_hours is not None:
        rate = plan.assumed["tokens_per_second"]
        basis = (
            "" if rate else (", assuming each GPU is as fast as this process was during the probe")
        )
        time = f"{format_seconds(plan.seconds)}, {plan.gpu_hours:,.0f} GPU hours{basis}"
        if plan.writes_per_second is not None:  # None if nothing is left to write
            bytes_text = shown_bytes(round(plan.bytes_per_second or 0))
            time += f"; {bytes_text}/s a node and {plan.writes_per_second:,.1f} requests/s to write"
        dollars = f"{plan.gpu_dollars:,.0f} for GPUs, "
    lines = [
        f"on {counted(plan.nodes, 'node')} of {plan.assumed['gpus_per_node']} GPUs: {time}",
        f"files: {plan.objects:,} (a data file and a commit record for each of {plan.units:,} "
        f"units, including the corpus), {shown_bytes(plan.bytes)}; roll-ups of the records: "
        f"{shown_bytes(plan.roll_up_bytes)}",
        f"opening it in an object store: {counted(plan.listings, 'listing')} and the roll-ups, "
        f"{plan.open_seconds:,.1f} seconds; on a disk that records when a folder changed, no "
        "listing",
        f"dollars: {dollars}{plan.month_dollars:,.2f} a month for storage, "
        f"{plan.write_dollars:,.2f} for write requests, {plan.read_dollars:,.2f} for the requests "
        "of a student that reads everything once",
        f"assumed (--assume KEY=VALUE): {assumptions}",
    ]
    return lines + ([f"warning: {plan.advice}"] if plan.advice else [])
