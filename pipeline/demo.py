"""The demo command: the whole knowledge-rekindle cycle on Python's own documentation, as a list of jobs.

What each job does is in demo_stages; nothing of the method itself is here. A finished job is recognised by what it
leaves, so the same command again goes on where it stopped.
"""

import json
import logging
import os
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rekindle.data.errors import InputError
from rekindle.data.settings import Settings, parse_settings
from rekindle.pipeline import demo_stages as stages
from rekindle.pipeline.config import RunConfig, dump_config
from rekindle.pipeline.demo_jobs import Job, run_jobs, warm_up
from rekindle.pipeline.demo_tasks import TASKS, TaskSizes, write_corpus
from rekindle.pipeline.progress import Progress

log = logging.getLogger("rekindle")

DEMO_FILE = "demo.json"  # marks the directory of a demo, and says which one
LM = "base-lm"  # the base model as a masked-LM teacher
WITHOUT, WITH = "without-kd", "with-kd"
HEADINGS = {
    "expert": "expert",
    WITHOUT: "student without KD",
    WITH: "student with KD",
}


class DemoSettings(Settings):
    """How large the demo is and how its models are trained. Students and experts share everything."""

    name: str
    seed: int = 0
    vocabulary: int
    model: dict[str, Any]
    sequence_length: int = 48
    replicas: int
    sizes: TaskSizes
    base: dict[str, Any]
    student: dict[str, Any]
    kd: list[dict[str, Any]]
    finetune: dict[str, Any]
    seeds: int
