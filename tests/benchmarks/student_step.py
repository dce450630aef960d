"""Measures the cost of the KD term in a student's training step: masked LM with and without it,
interleaved in one run.

    python tests/benchmarks/student_step.py [--sequences 32] [--rounds 15] [--toy]

A BERT-mini step (4 layers, hidden 256, V = 30,522, sequences of 128, 15 % masked): forward, loss,
backward and AdamW. Targets (k = 64) enter as the cache stores them, so decoding is included. The
naive form is what a user writes without this package: full logits at the masked positions,
log_softmax twice, gather. Prints medians and ratios to the plain step and appends them to
results.csv.

Prediction before the first run (2026-11-20): KD costs 8 % at τ = 1 (one softmax serves both terms)
and 12 % at τ = 2; naive costs 30 %.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from results_csv import Row, append, hardware, versions

from rekindle.data.batch import TokenTargetBatch
from rekindle.data.targets.codec import encode
from rekindle.data.targets.schema import TeacherInfo
from rekindle.kernels.losses import linear_kd_loss
from rekindle.train.device_batch import sparse_targets
from rekindle.train.student import Student

LENGTH = 128


def make_student(toy: bool) -> Student:
    size = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}
    if toy:
        size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.BertConfig(
        vocab_size=30_522, intermediate_size=4 * size["hidden_size"], **size
    )
    torch.manual_seed(0)
    return Student(transformers.BertForMaskedLM(config), "masked_lm").train()


def make_targets(rows: int, vocabulary: int, k: int) -> TokenTargetBatch:
    """Return targets with an entropy of about 2 nats, encoded as the cache does."""
    draw = np.random.default_rng(0)
    ids = np.stack([draw.permutation(vocabulary)[:k] for _ in range(rows)])
    scores = -1.2 * np.log(np.arange(1, k + 1)) + 0.1 * draw.normal(size=(rows, k))
    scores = -np.sort(-scores, axis=1)
    log_probs = scores - np.log(np.exp(scores).sum(axis=1, keepdims=True)) + np.log(0.95)
    odds = np.full((rows, 2), np.log(0.95 / 0.05))
    encoded = encode(ids, log_probs.astype(np.float32), odds.astype(np.float32), vocabulary)
    info = TeacherInfo(
        name="t",
        task="masked_lm",
        kind="topk",
        view="masked-x",
        vocabulary_size=vocabulary,
        k=k,
        temperatures=(1.0, 2.0),
    )
    columns = dict(encoded)
    zeros = np.zeros(rows, np.int64)
    return TokenTargetBatch(info, zeros, zeros, columns)


def naive(student: Student, hidden: torch.Tensor, labels: torch.Tensor, sparse, tau: float):
    """CE + τ²·KL with a tail bucket, the way it is usually written."""
    head = student.output_head
    logits = F.linear(hidden, head.weight, head.bias)
    ce = F.cross_entropy(logits, labels)
    log_p = F.log_softmax(logits / tau, dim=1).gather(1, sparse.ids)
    rest = torch.log1p(-log_p.exp().sum(dim=1).clamp(max=1 - 1e-6))
    kl = (sparse.probs * (sparse.probs.clamp_min(1e-30).log() - log_p)).sum(dim=1)
    kl = kl + sparse.tail * (sparse.tail.clamp_min(1e-30).log() - rest)
    return ce + tau**2 * kl.mean()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--toy", action="store_true", help="a tiny model, to see that it runs")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    student = make_student(arguments.toy).to(device)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4)
    count, masked = arguments.sequences, round(0.15 * LENGTH)
    ids = torch.randint(1000, 30_000, (count, LENGTH), device=device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    rows = torch.arange(count * LENGTH, device=device).view(count, LENGTH)[:, :masked].reshape(-1)
    labels = ids.view(-1)[rows]
    target = make_targets(len(rows), 30_522, 64)
    nothing = torch.full((len(rows), 1), -1, device=device)

    def head_loss(hidden: torch.Tensor, tau: float | None) -> torch.Tensor:
        head = student.output_head
        kept, probs, tail = nothing, torch.zeros(nothing.shape, device=device), None
        if tau is not None:
            kept, probs, tail = sparse_targets(target, tau, None, device)
        return linear_kd_loss(
            hidden,
            head.weight,
            kept,
            probs,
            bias=head.bias,
            tail_prob=tail,
            labels=labels,
            temperature=tau or 1.0,
            ce_weight=1.0,
            kd_weight=0.0 if tau is None else 1.0,
        ).loss

    def step(loss_of: Callable[[torch.Tensor], torch.Tensor]) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        loss_of(student(inputs, rows).hidden).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    def naive_of(tau: float) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda h: naive(student, h, labels, sparse_targets(target, tau, None, device), tau)

    def plain(hidden: torch.Tensor) -> torch.Tensor:
        head = student.output_head
        return F.cross_entropy(F.linear(hidden, head.weight, head.bias), labels)

    variants = {
        "plain (torch cross_entropy)": plain,
        "plain (ours)": lambda h: head_loss(h, None),
        "kd tau=1": lambda h: head_loss(h, 1.0),
        "kd tau=2": lambda h: head_loss(h, 2.0),
        "naive kd tau=1": naive_of(1.0),
        "naive kd tau=2": naive_of(2.0),
    }
    for loss_of in variants.values():
        step(loss_of)
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(arguments.rounds):
        for name, loss_of in variants.items():
            times[name].append(step(loss_of))
    base = times["plain (torch cross_entropy)"]
    print(f"{device.type}, torch {torch.__version__}, {count} sequences of {LENGTH}")
    case = f"{'toy' if arguments.toy else 'bert-mini'} {count}x{LENGTH} k=64"
    rows: list[Row] = []
    for name, seconds in times.items():
        ratio = statistics.median(s / b for s, b in zip(seconds, base, strict=True))
        print(f"{name:30} {1e3 * statistics.median(seconds):9.1f} ms   {ratio:6.3f} x plain")
        rows.append((case, name, "time", ratio, "x plain torch step"))
    append(rows, "student_step", hardware(), versions("torch"))


if __name__ == "__main__":
    main()
