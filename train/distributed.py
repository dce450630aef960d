"""One process, or many under torchrun: who writes, what is summed, and how gradients are combined.

There is no transport of our own: process groups, DistributedDataParallel and FSDP2 are PyTorch's. A
single process takes the same path with a world of one.
"""

import logging
import math
import os
import socket
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rekindle.data.errors import InputError, RekindleError, first_words
from rekindle.train.deferred.recording import Recording, Undeferrable
from rekindle.train.deferred.shards import fill_in_shards
from rekindle.train.host.known import give_plain_tensors
from rekindle.train.launch import current_launch, local_rank
from rekindle.train.student import Student

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

log = logging.getLogger("rekindle")

Answer = TypeVar("Answer")
Parallel = Literal["ddp", "fsdp"]
PATIENCE = timedelta(days=30)  # timeout while the main process works alone


class ElsewhereError(RekindleError):
    """The main process failed and says why; this process ends silently with the same exit code."""

    def __init__(self, exit_code: int):
        super().__init__()
        self.exit_code = exit_code


@dataclass(frozen=True)
class World:
    """The processes of a run, seen from one of them."""

    rank: int
    size: int
    device: torch.device
    sum_device: torch.device  # for small sums: the CPU if possible, so that no GPU is waited for

    @classmethod
    def alone(cls) -> "World":
        """Return a single process, on the GPU if there is one."""
        cpu = torch.device("cpu")
        if not torch.cuda.is_available():
            return cls(0, 1, cpu, cpu)
        # Include the index, as tensors do, so that anything stored by device is stored once.
        return cls(0, 1, torch.device("cuda", torch.cuda.current_device()), cpu)

    @property
    def main(self) -> bool:
        """Return whether this process writes files and logs."""
        return self.rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """Return the sums of ``values`` over all processes, in float64; the same everywhere."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.sum_device)
        with reporting_lost_processes():
            dist.all_reduce(total)
        sums: list[float] = total.tolist()
        return sums

    def sum_on_device(self, values: Tensor) -> Tensor:
        """Return the sums of ``values`` [n] over all processes, on the device: no GPU is waited
        for.
        """
        if self.size > 1:
            with reporting_lost_processes():
                dist.all_reduce(values)
        return values

    def gather(self, value: Answer) -> list[Answer]:
        """Return every process's ``value``, by rank; the same everywhere."""
        gathered = [value] * self.size
        if self.size > 1:
            with reporting_lost_processes():
                dist.all_gather_object(gathered, value)
        return gathered

    def gather_rows(self, values: Tensor, counts: Sequence[int]) -> Tensor:
        """Return every process's rows of ``values`` [R,…] by rank, of which it has ``counts``, on
        the device: no GPU is waited for.
        """
        if self.size == 1 or not max(counts):
            return values
        padded = values.new_zeros((max(counts), *values.shape[1:]))
        padded[: len(values)] = values
        gathered = [torch.empty_like(padded) for _ in counts]
        with reporting_lost_processes():
            dist.all_gather(gathered, padded)
        return torch.cat([rows[:count] for rows, count in zip(gathered, counts, strict=True)])

    def agree(self, make: Callable[[], Answer]) -> Answer:
        """Return what ``make`` returns here, once it has succeeded in every process.

        If it fails with an error of ours, the first process in which it failed raises that error
        and the others raise ElsewhereError, so that an error common to all is reported once.
        """
        if self.size == 1:
            return make()
        answer, error = None, None
        try:
            answer = make()
        except RekindleError as raised:
            error = raised
        codes = self.gather(None if error is None else error.exit_code)
        failed = next((rank for rank, code in enumerate(codes) if code is not None), None)
        if failed is None:
            return cast(Answer, answer)
        if error is not None and failed == self.rank:
            raise error
        raise ElsewhereError(codes[failed] or 1)

    def in_turn(self, make: Callable[[], Answer]) -> Answer:
        """Do as ``agree``, but on each machine in one process after another, the main one last, so
        that the memory ``make`` needs is used once per machine.
        """
        hosts = self.gather(socket.gethostname())
        ranks_here = [rank for rank, host in enumerate(hosts) if host == hosts[self.rank]][::-1]
        result: Answer | None = None
        for turn in range(max(Counter(hosts).values())):
            if ranks_here[turn : turn + 1] == [self.rank]:
                result = self.agree(make)
            else:
                self.agree(lambda: None)
        return cast(Answer, result)

    def mesh(self, parallel: Parallel) -> "DeviceMesh | None":
        """Return the mesh that FSDP2 shards a student over; None without FSDP. Call it in every
        process.
        """
        if self.size == 1 or parallel != "fsdp":
            return None
        from torch.distributed.device_mesh import init_device_mesh

        return init_device_mesh(self.device.type, (self.size,))

    def decide(self, make: Callable[[], Answer], patient: bool = False) -> Answer:
        """Return in every process what ``make`` returns in the main process; its error too.

        The main process raises the error; the others raise ElsewhereError with its exit code. They
        wait for half an hour, or with ``patient`` as long as it takes.
        """
        if self.size == 1:
            return make()
        group = dist.new_group(backend="gloo", timeout=PATIENCE) if patient else None
        message: list[object] = [None, None]  # the answer, or the exit code of an error
        error: BaseException | None = None
        if self.main:
            try:
                message[0] = make()
            except BaseException as raised:
                error = raised
                message[1] = getattr(raised, "exit_code", 1)
        try:
            with reporting_lost_processes():
                broadcast_device = torch.device("cpu") if patient else self.sum_device
                dist.broadcast_object_list(message, src=0, group=group, device=broadcast_device)
        finally:
            if error is not None:  # it says more than that the other processes are gone
                raise error
        if message[1] is not None:
            raise ElsewhereError(cast(int, message[1]))
        return cast(Answer, message[0])


@contextmanager
def reporting_lost_processes() -> Iterator[None]:
    """Wrap a collective: another process that has ended is not a bug of this one."""
    try:
        yield
    except RuntimeError as error:
        raise RekindleError(
            "another process of this run has ended or cannot be reached; its own message gives "
            f"the reason ({first_words(error, 200)})"
        ) from error


@contextmanager
def join_world() -> Iterator[World]:
    """Yield the world that torchrun's environment describes (gloo on CPUs, NCCL on GPUs), or a
    single process.

    A process group that the caller has already made is used as it is, whatever the environment
    says; without LOCAL_RANK, on the GPU that the caller has chosen.
    """
    makes_group, cuda = not dist.is_initialized(), torch.cuda.is_available()
    if makes_group:
        launch = current_launch()
        if launch.world_size == 1:
            yield World.alone()
            return
        own_rank = launch.local_rank
    else:
        env_rank = local_rank()
        own_rank = env_rank if env_rank is not None else torch.cuda.current_device() if cuda else 0
    device = torch.device("cuda", own_rank) if cuda else torch.device("cpu")
    if cuda and own_rank >= torch.cuda.device_count():
        raise InputError(
            f"{os.environ.get('LOCAL_WORLD_SIZE', own_rank + 1)} processes on a machine with "
            f"{torch.cuda.device_count()} GPUs: each process needs its own. Give torchrun a "
            "smaller --nproc-per-node"
        )
    if cuda:
        torch.cuda.set_device(device)
    if makes_group:
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    gloo = "gloo" in str(dist.get_backend_config())
    sum_device = torch.device("cpu") if gloo else device
    world = World(dist.get_rank(), dist.get_world_size(), device, sum_device)
    if not world.main:
        log.setLevel(logging.ERROR)  # the main process reports for all
    yield world
    # Only after success: while others wait in a collective, destroying the group would hang.
    if makes_group:
        dist.destroy_process_group()


class _WrappedStudent(nn.Module):
    """The module that DDP or FSDP2 wraps; any function of the student runs inside its forward.

    Both prepare and gather parameters around a forward pass. The loss multiplies by the output
    matrix after the student's own forward, so the loss must run inside as well.
    """

    def __init__(self, student: Student):
        super().__init__()
        self.student = student

    def forward(self, work: Callable[..., Answer], *arguments: object) -> Answer:
        return work(self.student, *arguments)


class ParallelStudent:
    """A student, and how all processes of a world run it together."""

    def __init__(
        self,
        student: Student,
        world: World,
        mesh: "DeviceMesh | None" = None,
        recorded: Recording | None = None,
    ):
        """``mesh``: from ``World.mesh``; the student is sharded over it, moving from the CPU to the
        devices part by part. ``recorded``: how to fill a student without memory; its trials run
        then, and raise InputError.
        """
        self.student, self.world, self.sharded = student, world, mesh is not None
        self.module: Any = _WrappedStudent(student)
        if mesh is not None and recorded is not None:
            shard = partial(_shard, self.module, mesh)
            fill_in_shards(self.module, recorded, shard, world.device, local_rows)
            if recorded.trials:
                self.run(lambda _: [trial() for trial in recorded.trials])
                cast(Any, self.module).reshard()  # otherwise weights loaded later would be ignored
        elif mesh is not None:
            _shard(self.module, mesh)
        elif world.size > 1:
            with warnings.catch_warnings():  # older versions that we support lack its new name
                warnings.simplefilter("ignore", FutureWarning)
                self.module = nn.parallel.DistributedDataParallel(
                    self.module,
                    broadcast_buffers=False,
                    find_unused_parameters=True,  # heads without rows, terms of weight 0
                    gradient_as_bucket_view=True,
                )

    def run(self, work: Callable[..., Answer], *arguments: object) -> Answer:
        """Return ``work(student, *arguments)``, with all parameters gathered."""
        answer: Answer = self.module(work, *arguments)
        return answer

    def accumulating(self, last: bool) -> AbstractContextManager:
        """Wrap a micro-batch: gradients are exchanged only after the ``last`` one."""
        if self.sharded:
            self.module.set_requires_gradient_sync(last)
        elif self.world.size > 1 and not last:
            no_sync: AbstractContextManager = self.module.no_sync()
            return no_sync
        return nullcontext()

    def clip(self, max_norm: float) -> Tensor:
        """Clip all gradients to a total norm; return the norm before clipping."""
        return full_tensor(nn.utils.clip_grad_norm_(self.student.parameters(), max_norm))


class Built(Protocol):
    """What comes with a student that was built."""

    @property
    def student(self) -> Student:
        """Return the student."""

    @property
    def deferred_init(self) -> Recording | None:
        """Return the operations that give it its values, if it is built on fake tensors."""


AnyBuilt = TypeVar("AnyBuilt", bound=Built)


def build_in_shards(
    build: Callable[[bool], AnyBuilt], world: World, mesh: "DeviceMesh", grows: bool
) -> tuple[AnyBuilt, ParallelStudent | None]:
    """Return what ``build`` makes, deferred (True) or whole, and the student in shards if it is
    filled already.

    All processes fill a student without memory at once. A student that ``grows``, or cannot be
    deferred, is built whole by one process of a machine after another. The main process is last and
    keeps it whole, because its growth is measured.
    """
    reason = "it grows"
    if not grows:
        try:
            built = world.agree(lambda: build(True))
            return built, world.agree(
                lambda: ParallelStudent(built.student, world, mesh, built.deferred_init)
            )
        except Undeferrable as error:
            reason = str(error)
    log.info("student: built whole, on each machine by one process after another (%s)", reason)

    def build_whole() -> tuple[AnyBuilt, ParallelStudent | None]:
        built = build(False)
        return built, None if world.main else ParallelStudent(built.student, world, mesh)

    return world.in_turn(build_whole)


def _shard(module: _WrappedStudent, mesh: "DeviceMesh") -> None:
    """Shard each block of the model by itself with FSDP2, and the rest as one."""
    from torch.distributed.fsdp import fully_shard

    for block in blocks(module.student.model):
        fully_shard(block, mesh=mesh)
    # The root's parameters stay gathered until the backward pass: the loss needs the output matrix.
    fully_shard(module, mesh=mesh, reshard_after_forward=False)


def blocks(model: nn.Module) -> list[nn.Module]:
    """Return the outermost repeated layers of a model, which are sharded and compiled one
    by one.
    """
    layers: list[nn.Module] = []
    for module in model.modules():
        inside = any(module in set(block.modules()) for block in layers)
        if isinstance(module, nn.ModuleList) and len(module) > 1 and not inside:
            layers += list(module) if len({type(layer) for layer in module}) == 1 else []
    return layers


def compile_blocks(student: Student) -> None:
    """Compile each block by itself: equal blocks share code, and parameters keep their names."""
    layers = blocks(student.model)
    if not layers:
        log.warning("train.compile: %s has no repeated blocks", type(student.model).__name__)
    for block in layers:
        block.compile()
        give_plain_tensors(block)


def full_tensor(tensor: Tensor) -> Tensor:
    """Return a sharded tensor gathered on every process; a plain one unchanged."""
    gathered = getattr(tensor, "full_tensor", None)
    full: Tensor = tensor if gathered is None else gathered()
    return full


def local_rows(tensor: Tensor) -> tuple[Tensor, int]:
    """Return the rows of a sharded tensor that this process holds, in its own memory, and the index
    of the first; a plain tensor unchanged.
    """
    mesh = getattr(tensor, "device_mesh", None)
    if mesh is None:
        return tensor.detach(), 0
    # as FSDP2 divides: the last processes may have fewer
    rows_per_process = math.ceil(len(tensor) / mesh.size())
    rows: Tensor = tensor.detach().to_local()  # type: ignore[attr-defined]
    return rows, min(mesh.get_local_rank() * rows_per_process, len(tensor))
