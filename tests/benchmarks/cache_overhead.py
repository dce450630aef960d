"""Measures what stage 1 adds to the teacher's forward passes."""

import argparse
import shutil
import statistics
from pathlib import Path

import numpy as np
import torch
from cache_rows import VOCABULARY, make_corpus, save_masked_lm, timed
from results_csv import Row

from rekindle.data.corpus.corpus import Corpus
from rekindle.data.padding import length_buckets
from rekindle.data.storage.columns import split_lists
from rekindle.data.views.masked import MaskedView
from rekindle.data.views.masking import MaskConfig
from rekindle.data.views.reader import ViewReader
from rekindle.pipeline.caching.batching import padded_inputs
from rekindle.pipeline.caching.compute_unit import Unit, run_unit
from rekindle.pipeline.caching.make_unit import write_unit
from rekindle.pipeline.caching.teachers import Teacher, plan_teacher
from rekindle.pipeline.caching.views import Views
from rekindle.pipeline.teacher_config import TeacherConfig

# ---------------------------------------------------------------------------------------------


def overhead(options: argparse.Namespace, folder: Path) -> list[Row]:
    """Return the seconds of stage 1 and of the bare loop over the same batches, in turns."""
    layers, width, sequences, length = (1, 32, 16, 32) if options.toy else (6, 384, 64, 128)
    corpus = make_corpus(folder / "ours", sequences, length, sequences)
    masked = MaskedView(corpus, MaskConfig(), 0, 1)
    masked.build()
    directory = folder / "model"
    shutil.copytree(folder / "ours" / "tokenizer", directory)
    save_masked_lm(directory, layers, width, width // 32)
    config = TeacherConfig(name="teacher", model=str(directory), task="masked_lm")
    teacher = Teacher(plan_teacher(config, corpus, Views(masked), 0), corpus)
    view = ViewReader(corpus, teacher.info.view)
    batches, selected = forward_batches(teacher, corpus, view)

    @torch.inference_mode()
    def bare(_: int) -> None:
        for batch in batches:
            teacher.model(**batch)

    @torch.inference_mode()
    def selective(_: int) -> None:
        for batch, select in zip(batches, selected, strict=True):
            hidden, _ = teacher.language_model.hidden(batch, select)
            teacher.language_model.head.logits(hidden)

    def stage(turn: int) -> None:
        info = teacher.info.model_copy(update={"name": f"teacher-{turn}"})
        write_unit(info, corpus, Unit(0, 0), run_unit(teacher, Unit(0, 0)))

    works = {
        "forward, all tokens": bare,
        "forward, masked tokens": selective,
        "stage 1, written": stage,
    }
    times: dict[str, list[float]] = {name: [] for name in works}
    rounds = 3 if options.toy else 4
    for turn in range(rounds + 1):
        for name, work in works.items():
            times[name].append(timed(lambda work=work, turn=turn: work(turn)))  # type: ignore[misc]
    case = f"{sequences} x {length} L={layers} H={width} k={teacher.info.k} V={VOCABULARY}"
    print(f"\n{case}, {torch.get_num_threads()} threads, medians of {rounds} rounds")
    results: list[Row] = []
    base = times["forward, all tokens"][1:]
    for name, (_, *seconds) in times.items():  # the first round warms up
        ratio = statistics.median(s / b for s, b in zip(seconds, base, strict=True))
        print(f"{name:26}{statistics.median(seconds):9.3f} s{ratio:9.3f} x forward, all tokens")
        results.append((case, name, "time", statistics.median(seconds), "s"))
        results.append((case, name, "ratio to the forward loop", ratio, "1"))
    return results


def forward_batches(
    teacher: Teacher, corpus: Corpus, view: ViewReader, number: int = 0
) -> tuple[list[dict[str, torch.Tensor]], list[torch.Tensor]]:
    """Return the inputs that stage 1 gives the model on a shard, and the masked places, by
    batch.
    """
    shard = corpus.shard(number)
    indices = range(shard.batch_count)
    seen = [s.copy() for s in split_lists([shard.batch(i) for i in indices], "input_ids")]
    views = [view.batch(number, i, 0) for i in indices]
    positions = split_lists(views, "positions")
    for row, where, put in zip(seen, positions, split_lists(views, "input_ids"), strict=True):
        row[where] = put
    lengths = np.array([len(s) for s in seen])
    batches, selected = [], []
    for rows in length_buckets(lengths, teacher.batch_tokens):
        batches.append(padded_inputs(teacher, [seen[r] for r in rows]))
        width = batches[-1]["input_ids"].shape[1]
        flat = [i * width + positions[r].astype(np.int64) for i, r in enumerate(rows)]
        selected.append(teacher.tensor(np.concatenate(flat)))
    return batches, selected
