"""Times the distillation losses against their peers and appends the measurements to results.csv.

    python tests/benchmarks/kd_losses.py            # the four shapes of interest; needs a GPU
    python tests/benchmarks/kd_losses.py --toy      # the same path end to end on any machine
    python tests/benchmarks/kd_losses.py --shapes   # the row kernel alone, in every shape (rows/)

Two tasks, forward and backward together. "logits": CE + KD from given logits; the bound is reading
and writing them once, 4·N·V bytes at the copy bandwidth measured in this run. "linear": the same
from hidden states; the bound is three products, 6·N·V·H operations at the matrix rate measured in
this run. Peers that take only a dense teacher are given its hidden states and head ("linear-dense":
another loss for the same purpose, each checked against its own formula). Peers that take only hard
labels are timed against Rekindle's loss without distillation ("linear-ce"). Every provider first
has to agree with float64 on a small case of the same V and H; one that is not installed, or does
not agree, is reported so. Providers take turns within a repetition, so that clocks and other load
affect all alike.
"""

import argparse
import importlib
import itertools
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from results_csv import RESULTS, append, hardware, versions
from torch import Tensor

from rekindle.kernels.losses import kd_loss, linear_kd_loss
from rekindle.kernels.targets import KernelTargets

SHAPES = ((8192, 30522, 768), (8192, 50368, 768), (8192, 128256, 4096), (8192, 256000, 2304))
TOY_SHAPES = ((64, 1003, 32),)
GATE_ROWS = 48
CE_WEIGHT, KD_WEIGHT = 0.5, 0.5


class Batch(NamedTuple):
    """One step's inputs: hidden and teacher [N,H], weight [V,H], ids, probs [N,K], tail, labels."""

    hidden: Tensor
    weight: Tensor
    ids: Tensor
    probs: Tensor
    tail: Tensor
    labels: Tensor
    teacher: Tensor
    tau: float


Provider = Callable[[Batch, Tensor], Tensor]  # (batch, logits or hidden) -> loss


def make_batch(rows: int, shape: tuple[int, int, int], k: int, tau: float, device: str) -> Batch:
    """Return a student with Zipf-like biases and a teacher near it: rows as peaked as
    trained ones.
    """
    _, vocabulary, width = shape
    g = torch.Generator(device=device).manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    hidden = torch.randn(rows, width, generator=g, device=device)
    weight = torch.randn(vocabulary, width, generator=g, device=device) * 3 / width**0.5
    weight[:, 0] -= torch.arange(1, vocabulary + 1, device=device).log() / 2
    hidden[:, 0] = 1.0
    teacher = hidden + 0.3 * torch.randn(hidden.shape, generator=g, device=device)
    ids, probs, tail, labels = [], [], [], []
    for x in teacher.split(256):  # the teacher's [N,V] is not kept
        p = (x @ weight.t() / tau).softmax(1)
        top = p.topk(k, dim=1)
        ids.append(top.indices)
        probs.append(top.values)
        tail.append(1 - top.values.sum(1))
        labels.append(torch.multinomial(p, 1, generator=g)[:, 0])
    targets = (torch.cat(t) for t in (ids, probs, tail, labels))
    return Batch(hidden.to(dtype), weight.to(dtype), *targets, teacher.to(dtype), tau)


# ---- providers
# ---------------------------------------------------------------------------------------------


def eager(batch: Batch, z: Tensor) -> Tensor:
    """The hand-written form: two log-softmaxes in float32, the tail as 1 − Σ."""
    z = z.float()
    log_p = F.log_softmax(z / batch.tau, 1).gather(1, batch.ids)
    log_rest = torch.log1p(-log_p.exp().sum(1).clamp(max=1 - 1e-6))
    kd = (batch.probs * (batch.probs.clamp(min=1e-30).log() - log_p)).sum(1)
    kd = kd + batch.tail * (batch.tail.clamp(min=1e-30).log() - log_rest)
    return CE_WEIGHT * F.cross_entropy(z, batch.labels) + KD_WEIGHT * batch.tau**2 * kd.mean()


def ours_logits(batch: Batch, z: Tensor) -> Tensor:
    return kd_loss(
        z, batch.ids, batch.probs, tail_prob=batch.tail, labels=batch.labels,
        temperature=batch.tau, ce_weight=CE_WEIGHT, kd_weight=KD_WEIGHT,
    ).loss  # fmt: skip


def ours_linear(batch: Batch, x: Tensor) -> Tensor:
    return linear_kd_loss(
        x, batch.weight, batch.ids, batch.probs, tail_prob=batch.tail, labels=batch.labels,
        temperature=batch.tau, ce_weight=CE_WEIGHT, kd_weight=KD_WEIGHT,
    ).loss  # fmt: skip


def ours_ce(batch: Batch, x: Tensor) -> Tensor:
    none = batch.ids[:, :0], batch.probs[:, :0]
    return linear_kd_loss(x, batch.weight, *none, labels=batch.labels, ce_weight=1.0).loss


def eager_ce(batch: Batch, x: Tensor) -> Tensor:
    return F.cross_entropy((x @ batch.weight.t()).float(), batch.labels)


def _dense(batch: Batch, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits, and log-probabilities at τ of student and teacher [N,V]."""
    z = (x @ batch.weight.t()).float()
    t = (batch.teacher @ batch.weight.detach().t()).float()
    return z, F.log_softmax(z / batch.tau, 1), F.log_softmax(t / batch.tau, 1)


def eager_dense(batch: Batch, x: Tensor) -> Tensor:
    z, p, q = _dense(batch, x)
    kl = F.kl_div(p, q, log_target=True, reduction="none").sum(1).mean()
    return CE_WEIGHT * F.cross_entropy(z, batch.labels) + KD_WEIGHT * batch.tau**2 * kl


def eager_jsd(batch: Batch, x: Tensor) -> Tensor:
    _, p, q = _dense(batch, x)
    m = torch.logaddexp(p, q) - math.log(2)
    return 0.5 * ((p.exp() * (p - m)).sum(1) + (q.exp() * (q - m)).sum(1)).mean()


def liger_jsd() -> Provider:
    module = importlib.import_module("liger_kernel.transformers.functional")
    return lambda batch, x: module.liger_fused_linear_jsd(
        x, batch.weight, batch.teacher, batch.weight.detach(), temperature=batch.tau
    )


def orda() -> Provider:
    module = importlib.import_module("orda_kernel")

    def loss(batch: Batch, x: Tensor) -> Tensor:
        teacher = module.PrecomputedTeacher(
            teacher_hidden=batch.teacher, teacher_weight=batch.weight.detach()
        )
        out = module.distillation_loss(
            x, batch.weight, batch.labels, teacher, student_ce_weight=CE_WEIGHT,
            kl_weight=KD_WEIGHT, kl_temperature=batch.tau, kl_divergence="forward",
        )  # fmt: skip
        return out.loss  # type: ignore[no-any-return]

    return loss


def torch_linear_cross_entropy() -> Provider:
    function = F.linear_cross_entropy  # type: ignore[attr-defined]
    return lambda batch, x: function(x, batch.weight, batch.labels)


def liger() -> Provider:
    module = importlib.import_module("liger_kernel.transformers.functional")
    return lambda batch, x: module.liger_fused_linear_cross_entropy(x, batch.weight, batch.labels)


def cut_cross_entropy() -> Provider:
    module = importlib.import_module("cut_cross_entropy")
    return lambda batch, x: module.linear_cross_entropy(x, batch.weight, batch.labels)


def compiled(function: Provider) -> Callable[[], Provider]:
    return lambda: torch.compile(function)  # type: ignore[return-value]


def linear(function: Provider) -> Provider:
    return lambda batch, x: function(batch, x @ batch.weight.t())


# the first of each task is Rekindle's, the second the float64 truth's formula
TASKS: dict[str, dict[str, Callable[[], Provider]]] = {
    "logits": {
        "rekindle": lambda: ours_logits,
        "eager": lambda: eager,
        "torch.compile": compiled(eager),
    },
    "linear": {
        "rekindle": lambda: ours_linear,
        "eager": lambda: linear(eager),
        "torch.compile": compiled(linear(eager)),
    },
    "linear-dense": {
        "rekindle": lambda: ours_linear,
        "eager": lambda: eager_dense,
        "torch.compile": compiled(eager_dense),
        "liger-kernel JSD": liger_jsd,
        "orda-kernel": orda,
    },
    "linear-ce": {
        "rekindle": lambda: ours_ce,
        "eager": lambda: eager_ce,
        "torch.compile": compiled(eager_ce),
        "F.linear_cross_entropy": torch_linear_cross_entropy,
        "liger-kernel": liger,
        "cut-cross-entropy": cut_cross_entropy,
    },
}


def run(task: str, provider: Provider, batch: Batch, logits: Tensor | None) -> tuple[Tensor, ...]:
    """Do one forward and backward pass; return the loss and the gradients."""
    if task == "logits":
        assert logits is not None
        z = logits.detach().requires_grad_()
        loss = provider(batch, z)
        return loss, *torch.autograd.grad(loss, z)
    x, w = (t.detach().requires_grad_() for t in (batch.hidden, batch.weight))
    loss = provider(batch._replace(weight=w), x)
    return loss, *torch.autograd.grad(loss, (x, w))


def truth_of(task: str, name: str) -> Provider:
    """Return the formula that a provider of a linear task is checked against."""
    if task == "linear-ce":
        return eager_ce
    if task == "linear-dense" and name != "rekindle":
        return eager_jsd if name.endswith("JSD") else eager_dense
    return linear(eager)


def agrees(task: str, name: str, provider: Provider, batch: Batch) -> bool:
    """Return whether loss and gradients agree with float64 to the inputs' own precision."""
    floats = ("hidden", "teacher", "weight", "probs", "tail")
    exact = batch._replace(**{field: getattr(batch, field).double() for field in floats})
    truth = truth_of(task, name)
    if task == "logits":
        logits = batch.hidden @ batch.weight.t()
        expected = run(task, _in_float64(eager), exact, logits.double())
        found = run(task, provider, batch, logits)
    else:
        expected = run(task, _in_float64(truth), exact, None)
        found = run(task, provider, batch, None)
    tolerance = 3e-2 if batch.hidden.dtype == torch.bfloat16 else 1e-4
    return all(
        (a.double() - b).norm() <= tolerance * b.norm()
        for a, b in zip(found, expected, strict=True)
    )


def _in_float64(provider: Provider) -> Provider:
    """Return the same formula with `.float()` left out."""

    def exact(batch: Batch, x: Tensor) -> Tensor:
        original = Tensor.float
        Tensor.float = lambda self, *_: self  # type: ignore[method-assign,assignment]
        try:
            return provider(batch, x)
        finally:
            Tensor.float = original  # type: ignore[method-assign]

    return exact


# ---- measuring
# ---------------------------------------------------------------------------------------------


def timed(work: Callable[[], Any], device: str) -> float:
    """Return the milliseconds of one call; on a GPU after its L2 was overwritten."""
    if device != "cuda":
        start = time.perf_counter()
        work()
        return 1e3 * (time.perf_counter() - start)
    torch.empty(2**28, dtype=torch.int8, device=device).zero_()
    start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start_event.record()
    work()
    end_event.record()
    torch.cuda.synchronize()
    return start_event.elapsed_time(end_event)


def take_turns(
    works: dict[str, Callable[[], Any]], device: str, repeats: int
) -> dict[str, list[float]]:
    """Return the times of every work, one of each a round."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(3 + repeats):
        for name, work in works.items():
            elapsed = timed(work, device)
            if turn >= 3:
                times[name].append(elapsed)
    return times


def machine_rates(device: str, size: int, repeats: int) -> tuple[float, float]:
    """Return (bytes/s of a copy, operations/s of a square product) of this device, now."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    a = torch.randn(size, size, device=device).to(dtype)
    source = torch.empty(8 * size * size, dtype=dtype, device=device).zero_()
    target = torch.empty_like(source)
    times = take_turns(
        {"copy": lambda: target.copy_(source), "product": lambda: a @ a}, device, repeats
    )
    copy, product = (statistics.median(times[n]) / 1e3 for n in ("copy", "product"))
    return 2 * source.numel() * source.element_size() / copy, 2 * size**3 / product


def peak_bytes(work: Callable[[], Any], device: str) -> int | None:
    """Return the memory above what is held before the call; None if the device does not
    count it.
    """
    if device != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def admitted(task: str, batch: Batch) -> tuple[dict[str, Provider], dict[str, str]]:
    """Return the providers that are installed and correct, and why the others are missing."""
    providers, absent = {}, {}
    for name, build in TASKS[task].items():
        try:
            provider = build()
            if agrees(task, name, provider, batch):
                providers[name] = provider
            else:
                absent[name] = "does not agree with float64"
        except (ImportError, AttributeError) as error:
            absent[name] = f"absent: {error}"
        except Exception as error:  # a peer's failure is a finding, not an error of the benchmark
            absent[name] = f"failed: {type(error).__name__}: {str(error).splitlines()[0][:80]}"
    return providers, absent


def measure(
    task: str,
    shape: tuple[int, int, int],
    k: int,
    tau: float,
    device: str,
    repeats: int,
    rates: tuple[float, float],
) -> list[tuple[str, str, float, str]]:
    """Print one table; return (provider, metric, value, unit)."""
    rows, vocabulary, width = shape
    providers, absent = admitted(task, make_batch(GATE_ROWS, shape, k, tau, device))
    batch = make_batch(rows, shape, k, tau, device)
    logits = batch.hidden @ batch.weight.t() if task == "logits" else None
    works = {name: (lambda p=p: run(task, p, batch, logits)) for name, p in providers.items()}
    times = take_turns(works, device, repeats)
    if task == "logits":
        size = 2 * batch.hidden.element_size()  # read once and written once
        bound, of = 1e3 * size * rows * vocabulary / rates[0], "of copy"
    else:
        bound, of = 1e3 * 6 * rows * vocabulary * width / rates[1], "of matmul"
    print(f"\n{task} N={rows} V={vocabulary} H={width} k={k} tau={tau:g}")
    found = []
    ours = statistics.median(times["rekindle"]) if "rekindle" in times else float("nan")
    for name in works:
        median = statistics.median(times[name])
        peak = peak_bytes(works[name], device)
        memory = "" if peak is None else f"{peak / 2**20:9.0f} MiB"
        print(
            f"  {name:24s} {median:10.3f} ms  {100 * bound / median:6.1f} % {of}"
            f"  {median / ours:7.2f} x ours {memory}"
        )
        found += [(name, "time", median, "ms"), (name, f"share {of}", bound / median, "1")]
        found += [(name, "time ratio to rekindle", median / ours, "1")]
        found += [] if peak is None else [(name, "peak memory", peak / 2**20, "MiB")]
    for name, why in absent.items():
        print(f"  {name:24s} {why}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--toy", action="store_true", help="toy sizes, few repetitions")
    parser.add_argument("--shapes", action="store_true", help="the row kernel in every shape")
    parser.add_argument("--cubins", type=Path, help="and clusters compiled by rows/cubins.py")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not options.toy:
        parser.error("no GPU here: the full shapes need one; --toy runs anywhere")
    shapes, repeats = (TOY_SHAPES, 5) if options.toy else (SHAPES, 30)
    kept, temperatures = ((8,), (1.0, 2.0)) if options.toy else ((8, 64, 256), (1.0, 2.0, 3.0))
    rates = machine_rates(device, 256 if options.toy else 8192, repeats)
    print(f"{hardware()}: copy {rates[0] / 1e12:.3f} TB/s, product {rates[1] / 1e12:.3f} TFLOP/s")
    name = "kd_losses --toy" if options.toy else "kd_losses"
    about = versions("torch", "triton", "liger_kernel", "cut_cross_entropy", "orda_kernel")
    if options.shapes:
        if options.toy:  # interpreted: a second a call
            shapes, temperatures, repeats = ((2, 4099, 8),), (2.0,), 1
        k = 8 if options.toy else 64
        for shape, tau in itertools.product(shapes, temperatures):
            batch = make_batch(shape[0], shape, k, tau, device)
            targets = KernelTargets(batch.ids, batch.probs, batch.tail, batch.labels)
            logits = batch.hidden @ batch.weight.t()
            found = importlib.import_module("rows.shapes").measure(
                logits, targets, tau, repeats, take_turns, options.cubins
            )
            case = f"row kernel N={shape[0]} V={shape[1]} k={k} tau={tau:g}"
            append(
                [(case, *row) for row in found], f"{name} --shapes", hardware(), about, options.out
            )
        return
    for task, shape, k, tau in itertools.product(TASKS, shapes, kept, temperatures):
        if task == "linear-ce" and (k, tau) != (kept[0], temperatures[0]):
            continue  # it has neither
        found = measure(task, shape, k, tau, device, repeats, rates)
        case = f"{task} N={shape[0]} V={shape[1]} H={shape[2]} k={k} tau={tau:g}"
        append([(case, *row) for row in found], name, hardware(), about, options.out)


if __name__ == "__main__":
    main()
