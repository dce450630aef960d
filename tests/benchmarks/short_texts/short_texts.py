"""Measures the saving of `train.batching: similar_lengths` and `corpus.packing: packed` on short
texts, and the former's cost in held-out loss (packed documents have the same losses as alone).

    python tests/benchmarks/short_texts/short_texts.py rate     # seven runs in turn
    python tests/benchmarks/short_texts/short_texts.py rate --whole  # without micro-batches
    python tests/benchmarks/short_texts/short_texts.py losses   # three seeds of each

The texts are SST-2's (a sentence or a part of one, 13 tokens on average), a sequence each; packed,
several to a row. A batch has about the same number of tokens in both cases; rates are computed from
tokens and given as texts. `rate` also counts this process's CPU time, which other work on the
machine hardly changes.
"""

import argparse
import logging
import os
import statistics
import sys
import time
from itertools import islice, product
from pathlib import Path

import torch

from rekindle.data.cache import Cache
from rekindle.data.settings import parse_settings
from rekindle.pipeline.caching.cache_teachers import cache_teachers
from rekindle.pipeline.config import RunConfig
from rekindle.train.config import StudentConfig, TrainConfig
from rekindle.train.loop import train_student

sys.path.insert(0, str(Path(__file__).parents[1]))

from results_csv import Row, append, hardware, versions
from train_setup import SHARED, Shape, write_model

BATCHINGS = ("shuffled", "similar_lengths")
BATCH, LENGTH = 32, 64
RATE_TEXTS, LOSS_TEXTS = 1_500, 8_000
RATE, LOSSES, TEACHER = Shape(4, 256, 4), Shape(2, 128, 2), Shape(2, 128, 2)
PACKED = {64: 7, 128: 3, 256: 2}  # rows of a batch, by their length: about as many texts as BATCH
WARM_UP = 4  # steps of a part that are not measured


def cache(folder: Path, texts: int, teacher: Path, packed: int | None = None) -> Cache:
    """Cache the first ``texts`` of SST-2 and the teacher's targets, k = 64. ``packed``: in rows of
    that length.
    """
    part = folder.with_suffix(".jsonl")
    with open(SHARED / "glue" / "sst2_train.jsonl", encoding="utf-8") as lines:
        part.write_text("".join(islice(lines, texts)), encoding="utf-8")
    values = {
        "corpus": {
            "source": str(part),
            "text_field": "sentence1",
            "tokenizer": str(teacher),
            "sequence_length": packed or LENGTH,
            "packing": "packed" if packed else "document",
        },
        "cache": {"path": str(folder), "replicas": 1},
        "teachers": [
            {
                "name": "teacher",
                "model": str(teacher),
                "task": "masked_lm",
                "targets": {"kind": "topk", "k": 64},
            }
        ],
    }
    cache_teachers(parse_settings(RunConfig, values))
    return Cache.open(str(folder))


def config(batching: str, steps: int, **more: object) -> TrainConfig:
    distill = [{"teachers": ["teacher"]}]
    quick = {"evaluate_every": 10**6, "keep_best": None, "checkpoint_every": 10**6}
    values = quick | {
        "steps": steps,
        "batch_sequences": BATCH,
        "batching": batching,
        "objective": {"distill": distill},
        "log_gradients_every": None,
    }
    return parse_settings(TrainConfig, values | more)


def rate(folder: Path, rounds: int, steps: int, whole: bool = False) -> list[Row]:
    """Measure texts per second of each arm, in turn, in ``rounds`` of ``steps``."""
    write_model(folder / "student", RATE, 0)
    write_model(folder / "teacher", TEACHER, 1)
    data = {None: cache(folder / "cache", RATE_TEXTS, folder / "teacher")}
    for size in PACKED:
        data[size] = cache(folder / f"cache-{size}", RATE_TEXTS, folder / "teacher", size)
    tokens = data[None].corpus.tokens / len(data[None])  # of a text
    arms: list[tuple] = list(product(BATCHINGS, (None,) if whole else (None, BATCH // 4)))
    arms += [("packed", size) for size in PACKED]
    wall: dict[tuple, list[float]] = {arm: [] for arm in arms}
    busy: dict[tuple, list[float]] = {arm: [] for arm in arms}
    for number, arm in product(range(rounds), arms):
        times = [(time.perf_counter(), time.process_time())]
        read: list[float] = []

        def note(step: int, values: dict, times: list = times, read: list = read) -> None:
            times.append((time.perf_counter(), time.process_time()))
            read.append(values["tokens"])

        batching, micro = arm
        more: dict[str, object] = {"micro_batch_sequences": micro}
        if batching == "packed":
            batching, more = "shuffled", {"batch_sequences": PACKED[micro]}
        chosen = config(batching, steps, **more, seed=number, held_out=0.0)
        out = folder / f"{arm[0]}-{micro}-{number}"
        student = StudentConfig(model=str(folder / "student"))
        read_from = data[micro if arm[0] == "packed" else None]
        train_student(read_from, student, chosen, out, report=note)
        measured = times[WARM_UP:-1]  # what ends a run, too, is no step
        done = sum(read[WARM_UP:-1]) / tokens  # texts, in the steps between these times
        for kept, which in ((wall, 0), (busy, 1)):
            kept[arm].append((measured[-1][which] - measured[0][which]) / done)
    rows: list[Row] = []
    for arm in arms:
        parts = f", {'rows' if arm[0] == 'packed' else 'micro-batches'} of {arm[1]}"
        name = arm[0] + (parts if arm[1] else "")
        for kept, metric in ((wall, "wall"), (busy, "cpu_time")):
            ratios = [1 / seconds for seconds in kept[arm]]
            against = [a / b for a, b in zip(kept[arms[0]], kept[arm], strict=True)]
            rows.append(("rate", name, metric, statistics.median(ratios), "texts/s"))
            rows.append(("rate", name, f"{metric} over shuffled", statistics.median(against), "x"))
    return rows


def losses(folder: Path, seeds: int, steps: int) -> list[Row]:
    """Measure held-out loss, cross-entropy and divergence of both at equal steps, by seed."""
    write_model(folder / "start", TEACHER, 1)
    write_model(folder / "student", LOSSES, 0)
    plain = cache(folder / "first", LOSS_TEXTS, folder / "start")
    alone = config("shuffled", steps, objective={}, learning_rate=1e-3, seed=17)
    train_student(plain, StudentConfig(model=str(folder / "start")), alone, folder / "teacher")
    data = cache(folder / "cache", LOSS_TEXTS, folder / "teacher")
    rows: list[Row] = []
    for seed, batching in product(range(seeds), BATCHINGS):
        chosen = config(batching, steps, seed=seed, learning_rate=1e-3, evaluate_sequences=1024)
        student = StudentConfig(model=str(folder / "student"), from_scratch=True)
        found = train_student(data, student, chosen, folder / f"{batching}-{seed}").evaluation
        case = f"losses, seed {seed}"
        rows += [(case, batching, name, value, "nats") for name, value in sorted(found.items())]
        print(*rows[-len(found) :], sep="\n", flush=True)
    return rows


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("what", choices=("rate", "losses"))
    asked.add_argument("--folder", type=Path, default=Path("/tmp/loop/short-texts"))
    asked.add_argument("--steps", type=int, help="steps of a run: 14 (rate), 200 (losses)")
    asked.add_argument("--times", type=int, default=3, help="rounds, or seeds")
    asked.add_argument("--threads", type=int, default=1)
    asked.add_argument("--whole", action="store_true", help="rate: each batch in a single pass")
    given = asked.parse_args()
    logging.getLogger("rekindle").setLevel(logging.ERROR)
    torch.set_num_threads(given.threads)
    folder = given.folder / given.what
    if given.what == "rate":
        rows = rate(folder, given.times, given.steps or 14, given.whole)
    else:
        rows = losses(folder, given.times, given.steps or 200)
    for row in rows:
        print(*row)
    load = f"load {os.getloadavg()[0]:.1f}; {given.threads} thread"
    append(rows, "short_texts", f"{hardware()}, {load}", versions("torch", "transformers"))


if __name__ == "__main__":
    main()
