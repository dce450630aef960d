"""Stage 1, including its files, compared with the bare forward loop with its head on the masked
rows.
"""

import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))
from cache_overhead import forward_batches
from cache_rows import VOCABULARY, make_corpus, save_masked_lm
from results_csv import Row

from rekindle.data.views.masked import MaskedView
from rekindle.data.views.masking import MaskConfig
from rekindle.data.views.reader import ViewReader
from rekindle.pipeline.caching.compute_unit import Unit
from rekindle.pipeline.caching.make_unit import UnitRunner
from rekindle.pipeline.caching.teachers import plan_teacher
from rekindle.pipeline.caching.views import Views
from rekindle.pipeline.teacher_config import TargetsConfig, TeacherConfig
from rekindle.train.model.passes import with_known_padding

BARE, STAGE, ONE_BY_ONE = "forward, masked tokens", "stage 1", "stage 1, a unit at a time"
ROUNDS = 3


def measure(toy: bool, add: Callable[[Row], None], left: Callable[[], float]) -> None:
    """Measure tokens per second of each, in turns; stage 1 as a share of the bare loop. A round's
    rows are added when it ends, and one that is not likely to be done is not begun.
    """
    layers, width, units, rows, length = (1, 32, 2, 8, 32) if toy else (12, 768, 6, 2048, 128)
    with tempfile.TemporaryDirectory() as given:
        folder = Path(given)
        corpus = make_corpus(folder, units * rows, length, rows)
        masked = MaskedView(corpus, MaskConfig(), 0, 1)
        masked.build()
        model = folder / "tokenizer"  # the model beside its tokenizer
        save_masked_lm(model, layers, width, width // 32 if toy else width // 64)
        kept = TargetsConfig(kind="topk", k=64)
        config = TeacherConfig(name="teacher", model=str(model), task="masked_lm", targets=kept)
        plan = plan_teacher(config, corpus, Views(masked), 0)
        runner = UnitRunner((plan,), corpus)
        (teacher,) = runner.teachers
        view = ViewReader(corpus, teacher.info.view)
        batches = [
            pair
            for shard in range(units)
            for pair in zip(*forward_batches(teacher, corpus, view, shard), strict=True)
        ]
        work = [Unit(shard, 0) for shard in range(units)]
        on_gpu, turn = teacher.placement.device != "cpu", 0

        @torch.inference_mode()
        def bare() -> None:
            for inputs, select in batches:
                hidden, _ = teacher.language_model.hidden(
                    with_known_padding(inputs, teacher.model.config), select
                )
                teacher.language_model.head.logits(hidden)

        def named() -> UnitRunner:
            nonlocal turn
            turn += 1
            info = plan.info.model_copy(update={"name": f"teacher-{turn}"})
            runner.teachers = [teacher.with_plan(replace(plan, info=info))]
            return runner

        works: dict[str, Callable[[], object]] = {
            BARE: bare,
            STAGE: lambda: [*named().run_many(work)],
            ONE_BY_ONE: lambda: [*map(named().make, work)],
        }
        case = f"{units} units of {rows} x {length}, L={layers} H={width} k=64 V={VOCABULARY}"
        seconds: dict[str, float] = {}
        for number in range(2 if toy else ROUNDS + 1):
            if number > 1 and left() < 1.5 * sum(seconds.values()):
                print(f"no time for round {number} of {ROUNDS}", flush=True)
                break
            for name, do in works.items():
                began = time.perf_counter()
                do()
                if on_gpu:
                    torch.cuda.synchronize()
                seconds[name] = time.perf_counter() - began
            for name, spent in seconds.items() if number else ():  # the first round warms up
                about = f"{case}, round {number}"
                add((about, name, "tokens/s", units * rows * length / spent, "1/s"))
                share = seconds[BARE] / spent
                add((about, name, "share of the forward loop's rate", share, "1"))
        if on_gpu:
            add((case, STAGE, "peak memory", torch.cuda.max_memory_allocated() / 2**20, "MiB"))
