"""A cycle of tiny models whose jobs run in the test's own process."""

import json
import random
from collections.abc import Sequence
from pathlib import Path

from rekindle.pipeline.processes.jobs import Job, Report

TINY = {"hidden_size": 16, "intermediate_size": 24}
WORDS = ["river", "mountain", "city", "engine", "paper", "light"]


class Here:
    """Does what ``run_counted`` does, without processes. ``done``: the outputs, in order. It is
    interrupted before job number ``ends``.
    """

    def __init__(self) -> None:
        self.done: list[Path] = []
        self.ends: int | None = None

    def __call__(self, jobs: Sequence[Job], *_: object) -> None:
        finished: set[str] = set()
        while len(finished) < len(jobs):
            waiting = [job for job in jobs if job.name not in finished]
            job = next(job for job in waiting if finished.issuperset(job.after))
            assert job.output is not None
            if not job.output.exists():
                if len(self.done) == self.ends:
                    raise KeyboardInterrupt
                job.function(*job.arguments, Report())
                assert job.output.exists(), job.name
                self.done.append(job.output)
            finished.add(job.name)


def task_files(folder: Path, name: str, labels: tuple = ("red", "green")) -> dict:
    """Return the section of a task, with files of random words."""
    draw, files = random.Random(name), {}
    counts = {"train": 40, "dev": 8, "test": 10}
    for split, count in counts.items():
        texts = [" ".join(draw.choices(WORDS, k=6)) for _ in range(count)]
        rows = [{"text": text, "label": labels["river" in text]} for text in texts]
        files[split] = str(folder / f"{name}-{split}.jsonl")
        Path(files[split]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"name": name, **files}


def sections(corpus: Path, student: Path, tasks: list[dict]) -> dict:
    """Return a cycle's file of the smallest size."""
    return {
        "corpus": {
            "source": [str(corpus)],
            "tokenizer": str(student),
            "sequence_length": 24,
            "limit_sequences": 16,
        },
        "cache": {"replicas": 1},
        "student": {"model": str(student)},
        "train": {
            "steps": 2,
            "batch_sequences": 4,
            "evaluate_every": 2,
            "warmup_steps": 1,
            "keep_best": None,
        },
        "tasks": tasks,
        "finetune": {"epochs": 1, "batch_size": 16, "max_length": 24, "learning_rate": 1e-3},
        "seeds": 2,
    }
