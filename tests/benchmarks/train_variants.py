"""The contenders of the training benchmark: Rekindle's loop, loops written by hand, the Trainer.

Each trains the same weights on the same shapes, and is timed between two of its own steps, without
start, evaluation and checkpoints. The other loops get their batches from memory, read and decoded
beforehand, and check no loss for NaN.
"""

import gc
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from importlib.util import find_spec
from itertools import cycle, islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from train_setup import Bench, K, Prepared

from rekindle.data.settings import parse_settings
from rekindle.kernels.losses import linear_kd_loss
from rekindle.train.config import StudentConfig, TrainConfig
from rekindle.train.loop import train_student
from rekindle.train.model.split_model import OutputHead
from rekindle.train.outside.quiet import quiet_transformers
from rekindle.train.record.watch import LATEST
from rekindle.train.student import Student

LEARNING_RATE, WEIGHT_DECAY, MAX_NORM = 1e-4, 0.01, 1.0

Target = tuple[Tensor, ...]
Loss = Callable[[Tensor, OutputHead, Prepared, Target], Tensor]


class Segment(NamedTuple):
    """One run of one contender."""

    step: float  # seconds
    wait: float  # share of the time spent waiting for data; NaN without a reader
    peak: float  # bytes: of the GPU's memory, or the peak of the whole process


class Window:
    """Called after every step; measures the time of the steps after the warm-up.

    On a GPU ours reports a step when the next one has been given to the device, so that waiting for
    the device waits for that one, too. The last LATEST steps are not measured: they alone are
    reported less late than those before, and as many steps as are reported lie between the marks.
    """

    def __init__(self, bench: Bench):
        self.bench, self.marks, self.peak = bench, list[float](), 0
        self.first, self.last = bench.warm_up, bench.steps - LATEST

    def __call__(self, done: int) -> None:
        if done in (self.first, self.last):
            if self.bench.device.type == "cuda":
                torch.cuda.synchronize()
            self.marks.append(time.perf_counter())
        if done == self.bench.steps:
            self.peak = peak_memory(self.bench.device)

    def segment(self, wait: float = math.nan) -> Segment:
        first, last = self.marks
        return Segment((last - first) / (self.last - self.first), wait, self.peak)


def peak_memory(device: torch.device) -> int:
    """Return the peak of the bytes allocated on the GPU, or of this process's memory.

    Not getrusage: a process started by another inherits *its* peak there.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


# ---- ours
# ---------------------------------------------------------------------------------------------


def ours(
    bench: Bench, temperature: float | None, watch: Callable[[int], None] = lambda done: None
) -> Segment:
    """Run ``train_student``, with KD from the cache or without; ``watch`` is called after every
    step.
    """
    term = {"teachers": ["teacher"], "temperature": temperature}
    values = {
        "steps": bench.steps,
        "batch_sequences": bench.batch,
        "learning_rate": LEARNING_RATE,
        "warmup_steps": min(10, bench.steps // 2),
        "weight_decay": WEIGHT_DECAY,
        "max_grad_norm": MAX_NORM,
        "checkpoint_every": bench.steps + 1,
        "evaluate_every": bench.steps + 1,
        "held_out": 0,
        "objective": {"distill": [] if temperature is None else [term]},
    }
    window, waits = Window(bench), [0.0]

    def report(done: int, values: Mapping[str, float]) -> None:
        if values["tokens"] != bench.tokens:
            raise AssertionError(f"step {done} had {values['tokens']} tokens, not {bench.tokens}")
        waits.append(values["data_wait"])
        window(done)
        watch(done)

    student = StudentConfig(model=str(bench.folder / "student"))
    config = parse_settings(TrainConfig, values)
    with tempfile.TemporaryDirectory(dir=bench.folder) as out:
        train_student(bench.cache(), student, config, Path(out) / "run", report=report)
    return window.segment(waits[-1])


# ---- by hand
# ---------------------------------------------------------------------------------------------


def by_hand(bench: Bench, loss_of: Loss, target_of: Callable[[Prepared], Target]) -> Segment:
    """Run the loop that a user would write; ``target_of`` runs before the student does."""
    student = bench.model("student").train()
    optimizer = adamw(student)
    window = Window(bench)
    for done, batch in enumerate(islice(cycle(bench.held), bench.steps), 1):
        rows = batch.on(bench.device)
        target = target_of(rows)
        with bench.autocast():
            hidden = student(rows.inputs, rows.rows).hidden
            loss = loss_of(hidden, student.output_head, rows, target)
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        window(done)
    return window.segment()


def adamw(model: nn.Module) -> torch.optim.AdamW:
    """Return AdamW in one kernel, the Trainer's default."""
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in model.parameters() if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=LEARNING_RATE, fused=True)


def no_target(rows: Prepared) -> Target:
    return ()


def plain(hidden: Tensor, head: OutputHead, rows: Prepared, _: Target) -> Tensor:
    """Return PyTorch's cross-entropy at the masked positions."""
    return F.cross_entropy(F.linear(hidden, head.weight, head.bias), rows.labels)


def naive_kd(hidden: Tensor, head: OutputHead, rows: Prepared, _: Target) -> Tensor:
    """Return CE + KD at τ = 2 by PyTorch, with the cached top k scattered into a whole row
    [N,V].
    """
    logits = F.linear(hidden, head.weight, head.bias)
    wanted = torch.zeros(logits.shape, device=logits.device)
    wanted.scatter_(1, rows.target_ids, rows.target_probs)
    kl = F.kl_div(F.log_softmax(logits / 2.0, dim=1), wanted, reduction="batchmean")
    return F.cross_entropy(logits, rows.labels) + 4.0 * kl


def teacher_model(bench: Bench) -> Student:
    """Return the teacher, in bf16 on a GPU, as in stage 1."""
    teacher = bench.model("teacher").eval()
    return teacher.bfloat16() if bench.device.type == "cuda" else teacher


@torch.no_grad()
def teacher_logits(teacher: Student, rows: Prepared) -> Tensor:
    """Return the teacher's logits [N,V] only at the masked positions."""
    hidden = teacher(rows.inputs, rows.rows).hidden
    return teacher.output_head.logits(hidden)


@torch.no_grad()
def teacher_top(teacher: Student, rows: Prepared) -> Target:
    """Return what the cache would hold: ids and probabilities [N,64] at τ = 1, tail mass [N]."""
    logits = teacher_logits(teacher, rows)
    top = logits.topk(K, dim=1)
    probs = (top.values - logits.logsumexp(dim=1, keepdim=True)).exp()
    return top.indices, probs, (1.0 - probs.sum(dim=1)).clamp_min(0.0)


def sparse_kd(hidden: Tensor, head: OutputHead, rows: Prepared, target: Target) -> Tensor:
    """Return Rekindle's loss, on targets made just now."""
    ids, probs, tail = target
    return linear_kd_loss(
        hidden,
        head.weight,
        ids,
        probs,
        bias=head.bias,
        tail_prob=tail,
        labels=rows.labels,
        ce_weight=1.0,
    ).loss


def dense_kd(hidden: Tensor, head: OutputHead, rows: Prepared, target: Target) -> Tensor:
    """Return CE + exact KL to all of the teacher's probabilities [N,V], by PyTorch."""
    logits = F.linear(hidden, head.weight, head.bias)
    kl = F.kl_div(F.log_softmax(logits, dim=1), target[0], reduction="batchmean")
    return F.cross_entropy(logits, rows.labels) + kl


def live_top(bench: Bench) -> Segment:
    return by_hand(bench, sparse_kd, partial(teacher_top, teacher_model(bench)))


def live_dense(bench: Bench) -> Segment:
    teacher = teacher_model(bench)
    return by_hand(bench, dense_kd, lambda rows: (teacher_logits(teacher, rows).softmax(dim=1),))


def forward(bench: Bench) -> Segment:
    """Run only the teacher's forward pass."""
    teacher, window = teacher_model(bench), Window(bench)
    for done, batch in enumerate(islice(cycle(bench.held), bench.steps), 1):
        teacher_logits(teacher, batch.on(bench.device))
        window(done)
    return window.segment()


# ---- Hugging Face's Trainer
# ---------------------------------------------------------------------------------------------


class Sequences(torch.utils.data.Dataset[dict[str, Tensor]]):
    """The sequences of the batches in memory, repeated, as the Trainer takes them."""

    def __init__(self, bench: Bench):
        self.count = bench.steps * bench.batch
        self.rows = [row for batch in bench.held for row in self._rows(batch)]

    def _rows(self, batch: Prepared) -> Iterator[dict[str, Tensor]]:
        labels = torch.full((batch.input_ids.numel(),), -100)
        labels[batch.rows] = batch.labels
        columns = batch.inputs | {"labels": labels.view_as(batch.input_ids)}
        for number in range(len(batch.input_ids)):
            yield {name: column[number].clone() for name, column in columns.items()}

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.rows[index % len(self.rows)]


class MaskedRows(nn.Module):
    """A student whose head sees the masked positions only: the Trainer at its best."""

    def __init__(self, student: Student):
        super().__init__()
        self.student = student

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor
    ) -> dict[str, Tensor]:
        where = (labels.flatten() != -100).nonzero()[:, 0]
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        hidden, head = self.student(inputs, where).hidden, self.student.output_head
        logits = F.linear(hidden, head.weight, head.bias)
        return {"loss": F.cross_entropy(logits, labels.flatten()[where])}


def trainer(bench: Bench, masked_rows: bool) -> Segment:
    """Run ``Trainer.train`` with its own optimiser and loader, logging and saving nothing."""
    import transformers

    window = Window(bench)

    class Watch(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            window(state.global_step)

    with tempfile.TemporaryDirectory(dir=bench.folder) as out:
        arguments = transformers.TrainingArguments(
            output_dir=out,
            max_steps=bench.steps,
            per_device_train_batch_size=bench.batch,
            learning_rate=LEARNING_RATE,
            warmup_steps=min(10, bench.steps // 2),
            lr_scheduler_type="linear",
            weight_decay=WEIGHT_DECAY,
            max_grad_norm=MAX_NORM,
            bf16=isinstance(bench.autocast(), torch.autocast),
            use_cpu=bench.device.type == "cpu",
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        run = transformers.Trainer(
            model=MaskedRows(bench.model("student")) if masked_rows else whole_model(bench),
            args=arguments,
            train_dataset=Sequences(bench),
            data_collator=transformers.default_data_collator,
            callbacks=[Watch()],
        )
        run.remove_callback(transformers.PrinterCallback)
        run.train()
    return window.segment()


def whole_model(bench: Bench) -> nn.Module:
    """Return the student as its users load it."""
    import transformers

    with quiet_transformers():
        source = str(bench.folder / "student")
        model: nn.Module = transformers.AutoModelForMaskedLM.from_pretrained(source)
    return model


def no_trainer() -> str | None:
    """Return why the Trainer cannot run here; None if it can."""
    if find_spec("accelerate") is None:
        return "needs accelerate: pip install --no-deps --target FOLDER accelerate psutil; --peers"
    return None


# ---- all of them
# ---------------------------------------------------------------------------------------------

PLAIN, KD1, KD2 = "ours, plain", "ours, cached KD τ=1", "ours, cached KD τ=2"
BARE, FORWARD = "by hand, plain (S)", "teacher's forward (T)"
LIVE, NAIVE = "by hand, live teacher, top 64", "by hand, naive cached KD τ=2"
TRAINER = "Trainer"

VARIANTS: dict[str, Callable[[Bench], Segment]] = {
    PLAIN: partial(ours, temperature=None),
    KD1: partial(ours, temperature=1.0),
    KD2: partial(ours, temperature=2.0),
    BARE: partial(by_hand, loss_of=plain, target_of=no_target),
    NAIVE: partial(by_hand, loss_of=naive_kd, target_of=no_target),
    FORWARD: forward,
    LIVE: live_top,
    "by hand, live teacher, dense": live_dense,
    TRAINER: partial(trainer, masked_rows=False),
    "Trainer, head on masked rows": partial(trainer, masked_rows=True),
}


def run(name: str, bench: Bench) -> Segment:
    """Run one segment from fresh weights, with the memory of the one before released."""
    gc.collect()
    if bench.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return VARIANTS[name](bench)
