"""Check before a run that this machine has what it needs: disk, memory, locks, the device.

Each check returns a sentence. One that begins with ``PROBLEM`` means that the run would fail.
"""

import fcntl
import math
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from rekindle.data.corpus.tokenizer_files import is_gguf
from rekindle.data.counted import shown_bytes
from rekindle.data.errors import InputError
from rekindle.data.hub.names import may_be_hub_id, no_such_model
from rekindle.data.storage.client import is_remote
from rekindle.kernels.losses import linear_kd_loss
from rekindle.pipeline.builtin.missing import missing
from rekindle.pipeline.config import RunConfig, references
from rekindle.pipeline.describing.encoders import find_teacher
from rekindle.pipeline.plan.figures import RunPlan
from rekindle.pipeline.plan.run import plan_run
from rekindle.pipeline.plan.staged import plan_staged_run
from rekindle.train.model.files import place
from rekindle.train.model.folder import stored_tensors
from rekindle.train.record.disk_room import free_bytes_near

PROBLEM = "PROBLEM: "
BYTES_OF = {"fp32": 4, "bf16": 2, "fp16": 2}  # bytes per weight, by precision
# largest relative error of a loss from float64, by device: rounding alone
TOLERANCE = {"cpu": 1e-4, "cuda": 2e-2}
ROWS, HIDDEN, VOCABULARY, KEPT = 8, 16, 64, 4  # sizes of the tiny step


def check_disk(config: RunConfig) -> str:
    """Compare what ``pipeline plan`` says will be written with the free space."""
    if is_remote(config.cache.path):
        return f"{config.cache.path} is in an object store: its free space is unknown here"
    plans = _plans(config)
    sizes = [plan.totals.bytes for plan in plans]
    nearest_folder, free = free_bytes_near(Path(config.cache.path))
    known_bytes = sum(size for size in sizes if size is not None)
    unknown_note = "" if plans and None not in sizes else ", plus what is not known yet"
    summary = (
        f"{shown_bytes(known_bytes)} will be written{unknown_note}; {shown_bytes(free)} are free "
        f"at {nearest_folder}"
    )
    if known_bytes <= free:
        return summary
    return (
        f"{PROBLEM}{summary}. Make room, or choose another cache.path, fewer replicas or a "
        "smaller k"
    )


def _plans(config: RunConfig) -> list[RunPlan]:
    if not config.stages:
        return [plan_run(config, probe=False)]
    return [one.plan for one in plan_staged_run(config, probe=False) if one.plan is not None]


def check_models(config: RunConfig) -> str:
    """Check that every model the run names is here, or is made by then, or may be on the hub."""
    models = {f"teacher {one.name!r}": one.model for one in config.teachers if one.served is None}
    if config.student is not None:
        models["student"] = config.student.model
    problems = [
        f"{subject}: {no_such_model(model)}"
        for subject, model in models.items()
        if not (Path(model).expanduser().is_dir() or is_remote(model) or is_gguf(model))
        and not (references(model) or missing(model) or may_be_hub_id(model))
    ]
    if problems:
        return PROBLEM + "; ".join(problems)
    return "each is a place that exists or is made when needed, or may be an id on the hub"


def check_memory(config: RunConfig) -> Iterator[tuple[str, str]]:
    """Compare each teacher's weights, by its files' headers, with the memory of its device."""
    for teacher in config.teachers:
        if teacher.served is not None or not Path(teacher.model).is_dir():
            yield (
                teacher.name,
                (f"{teacher.model or 'served'}: not a local folder, so its size is unknown"),
            )
            continue
        placement = place(teacher.precision)
        tensors = stored_tensors(find_teacher(teacher)[0]).values()
        needed = sum(math.prod(tensor.shape) for tensor in tensors) * BYTES_OF[placement.precision]
        free = free_memory(placement.device)
        summary = (
            f"{shown_bytes(needed)} of weights in {placement.precision}, {shown_bytes(free)} free "
            f"on {placement.device}"
        )
        is_spread = teacher.device_map is not None or teacher.tp_plan is not None
        if needed <= free or is_spread:
            yield teacher.name, summary + ", spread over several devices" * is_spread
        else:
            advice = "precision: bf16, device_map: auto or tp_plan: auto (docs/clusters.md)"
            yield teacher.name, f"{PROBLEM}{summary}. It does not fit: give it {advice}"


def free_memory(device: str) -> int:
    """Return the bytes a model on ``device`` may take."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0]
    lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    free = next(int(line[1]) << 10 for line in lines if line[0] == "MemAvailable:")
    limit, used = (Path(f"/sys/fs/cgroup/memory.{name}") for name in ("max", "current"))
    # A container has its own limit.
    if limit.exists() and (limit_text := limit.read_text().strip()).isdigit():
        free = min(free, int(limit_text) - int(used.read_text()))
    return free


def check_locks(folder: Path) -> str:
    """Take both kinds of locks that runs take in ``folder``, and check that a second lock is
    refused.
    """
    if not os.access(folder, os.W_OK):
        return f"{PROBLEM}{folder} cannot be written: choose a folder you may write to"
    refused = "a second process in one folder would not be noticed: use one process at a time there"
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".rekindle-lock-") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with open(file.name, "rb+") as second:
                try:
                    fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    return f"{PROBLEM}{folder}: a lock is granted twice there, so {refused}"
                except BlockingIOError:
                    pass
            fcntl.flock(file, fcntl.LOCK_UN)
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return (
            f"{PROBLEM}{folder} supports no locks ({error.strerror}), like NFS without its lock "
            f"service; {refused}, or mount it with local_lock=all (if one machine uses it)"
        )
    return f"locks in {folder} work: a second one is refused"


def tiny_step(device: torch.device) -> str:
    """Take one distillation step on ``device``, with the implementation used there, and compare its
    loss with float64 on the CPU.
    """
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, HIDDEN, generator=generator) for n in (ROWS, VOCABULARY))
    ids = torch.rand(ROWS, VOCABULARY, generator=generator).topk(KEPT).indices
    probs = torch.rand(ROWS, KEPT, generator=generator).softmax(dim=1) * 0.9
    exact = linear_kd_loss(hidden.double(), weight.double(), ids, probs.double(), impl="torch").loss
    head = weight.to(device).requires_grad_()
    loss = linear_kd_loss(hidden.to(device), head, ids.to(device), probs.to(device)).loss
    loss.backward()
    torch.optim.AdamW([head]).step()
    error_share = abs(loss.item() - exact.item()) / exact.item()
    is_finite = bool(head.isfinite().all())
    summary = f"one step on {device}: loss {loss.item():.4f}, {error_share:.1e} from float64's"
    if is_finite and error_share <= TOLERANCE[device.type]:
        return summary
    weights_note = "" if is_finite else ", and some weights are not finite"
    return f"{PROBLEM}{summary}{weights_note}: check the GPU"


def check_step() -> str:
    """Run ``tiny_step`` on the GPU; without one, on the CPU, and say so."""
    if torch.cuda.is_available():
        try:
            return tiny_step(torch.device("cuda"))
        except (RuntimeError, OSError) as error:
            first_line = str(error).partition("\n")[0]
            return f"{PROBLEM}the step on the GPU failed ({first_line}); check driver and triton"
    summary = tiny_step(torch.device("cpu"))
    return summary if summary.startswith(PROBLEM) else f"there is no CUDA device; {summary}"


def refuse_problems(facts: dict[str, str]) -> None:
    """Raise InputError if a check found a problem."""
    with_problem = [name for name, value in facts.items() if value.startswith(PROBLEM)]
    if with_problem:
        problems = "; ".join(
            f"{name}: {facts[name].removeprefix(PROBLEM)}" for name in with_problem
        )
        raise InputError(f"this machine is not ready. {problems}")
