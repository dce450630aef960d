"""Build a model without memory: record what gives its tensors their values, and replay it later for
one tensor at a time (like deferred initialisation in torchdistx).

Within ``recording`` the code that builds a model runs as usual, on tensors without memory
(``FakeTensorMode``), and every operation on them is recorded. ``Filling`` replays them in the same
order: torch's generator draws the same numbers, so values are bit-identical. Tensors of files are
not read before the replay.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import init
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from rekindle.data.errors import InputError, naming

# Operators that give a tensor an entirely new value.
_OVERWRITES = ("normal_", "uniform_", "zero_", "fill_", "copy_", "exponential_", "bernoulli_")


class Undeferrable(Exception):
    """The code that builds the model looks at values, or does something that cannot be replayed.
    Users never see this error: the model is then built whole.
    """


@dataclass(frozen=True)  # not a tuple, because torch looks for tensors inside tuples
class Ref:
    """A tensor without memory: a view into ``cell``, the memory it would have."""

    cell: int
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @property
    def bytes(self) -> int:
        """Return the size of its values in bytes."""
        return prod(self.size) * self.dtype.itemsize

    def of(self, storage: torch.UntypedStorage) -> Tensor:
        """Return the tensor in real memory."""
        empty = torch.empty(0, dtype=self.dtype)
        return empty.set_(storage, self.offset, self.size, self.stride)


@dataclass(frozen=True)
class Step:
    """One call of an operator, and its effects on memory."""

    call: Callable[..., Any]
    arguments: Any  # (args, kwargs), with a Ref in place of each tensor without memory
    results: list[Any]
    reads: frozenset[int]
    makes: frozenset[int]  # cells that it creates
    writes: frozenset[int]  # cells that existed before
    covers: frozenset[int]  # those of them that it overwrites entirely
    draws: bool  # uses torch's generator

    @property
    def cells(self) -> frozenset[int]:
        """Return all cells that it needs."""
        return self.reads | self.makes | self.writes


class Stored(NamedTuple):
    """A tensor in a file."""

    file: Path
    key: str


@dataclass
class Recording:
    """What was done to tensors without memory, and what must be tried once they have values."""

    fake: FakeTensorMode = field(default_factory=lambda: FakeTensorMode(allow_non_fake_inputs=True))
    steps: list[Step] = field(default_factory=list)
    stored: dict[int, Stored] = field(default_factory=dict)  # by cell
    trials: list[Callable[[], object]] = field(default_factory=list)
    bytes: list[int] = field(default_factory=list)  # of each cell
    failed: str | None = None
    _cells: dict[int, int] = field(default_factory=dict)
    # kept alive because their addresses serve as names
    _alive: list[torch.UntypedStorage] = field(default_factory=list)

    def file_tensor(
        self, file: Path, key: str, dtype: torch.dtype, shape: tuple[int, ...]
    ) -> Tensor:
        """Return a fake tensor for a tensor in a file, which is not read."""
        with self.fake:
            tensor = torch.empty(shape, dtype=dtype)
        self.stored[self.ref(tensor).cell] = Stored(file, key)
        return tensor

    def ref(self, tensor: Tensor) -> Ref:
        """Return the cell and view of a tensor without memory."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self._cells:
            self._cells[storage._cdata] = len(self.bytes)
            self._alive.append(storage)
            self.bytes.append(storage.nbytes())
        cell = self._cells[storage._cdata]
        size, stride = tuple(tensor.shape), tensor.stride()
        return Ref(cell, tensor.dtype, size, stride, int(tensor.storage_offset()))

    def record_step(
        self, call: Any, args: Any, kwargs: Any, cells_before: int, results: Any
    ) -> None:
        """Record a call; ``cells_before``: the number of cells before it."""
        recorded_args = tree_map(self._as_ref, (args, kwargs))
        recorded_results = [self._as_ref(one) for one in tree_leaves(results)]
        inputs = [one for one in tree_leaves(recorded_args) if isinstance(one, Ref)]
        written_refs = _written_refs(call, *recorded_args)
        writes = frozenset(ref.cell for ref in written_refs)
        read_refs = list(inputs)
        for ref in written_refs:
            read_refs.remove(ref)
        makes = frozenset(
            r.cell for r in recorded_results if isinstance(r, Ref) and r.cell >= cells_before
        )
        draws = torch.Tag.nondeterministic_seeded in call.tags
        if draws and not (writes or makes):
            self.refuse(f"{call} draws numbers for a tensor that has memory")
        if not (writes or makes):
            return  # a view, or a question about shapes
        covers = frozenset[int]()
        if call._schema.name.removeprefix("aten::") in _OVERWRITES:
            covers = frozenset(r.cell for r in written_refs if r.bytes == self.bytes[r.cell])
        reads = frozenset(ref.cell for ref in read_refs) | (writes - covers)
        self.steps.append(
            Step(
                call,
                recorded_args,
                recorded_results,
                reads,
                makes,
                writes,
                covers - {r.cell for r in read_refs},
                draws,
            )
        )

    def record_draw(self, call: Callable[..., Any], tensor: Tensor, args: Any, kwargs: Any) -> None:
        """Record a ``call`` that draws all values of ``tensor`` and looks at them."""
        ref = self.ref(tensor)
        cell, none = frozenset({ref.cell}), frozenset[int]()
        covers = cell if ref.bytes == self.bytes[ref.cell] else none
        recorded_args = ((ref, *args), kwargs)
        self.steps.append(
            Step(call, recorded_args, [None], cell - covers, none, cell, covers, draws=True)
        )

    def refuse(self, reason: str) -> None:
        """Raise Undeferrable; it is remembered even if the error is changed on its way."""
        self.failed = reason
        raise Undeferrable(reason)

    def _as_ref(self, value: Any) -> Any:
        return self.ref(value) if isinstance(value, FakeTensor) else value


def _written_refs(call: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Ref]:
    """Return the tensors that a call changes in place."""
    refs = list[Ref]()
    for number, argument in enumerate(call._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[number] if number < len(args) else kwargs.get(argument.name)
            refs += [one for one in tree_leaves(value) if isinstance(one, Ref)]
    return refs


class _Recorder(TorchDispatchMode):
    def __init__(self, recording: Recording):
        super().__init__()
        self.recording = recording

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, recording = kwargs or {}, self.recording
        for one in tree_leaves((args, kwargs)):
            if isinstance(one, FakeTensor):
                recording.ref(one)
        cells_before = len(recording.bytes)
        try:
            results = func(*args, **kwargs)
            if not _are_on_meta((args, kwargs, results)):
                recording.record_step(func, args, kwargs, cells_before, results)
        except Exception as error:
            recording.failed = recording.failed or f"{func}: {type(error).__name__}"
            raise
        return results


def _are_on_meta(values: Any) -> bool:
    """Return whether all tensors are on the meta device: they get no values, so nothing
    is drawn.
    """
    devices = [one.device.type for one in tree_leaves(values) if isinstance(one, Tensor)]
    return bool(devices) and {*devices} == {"meta"}


@contextmanager
def _truncation_as_one_step(recording: Recording) -> Iterator[None]:
    """Record torch's truncated normal, which redraws values outside its bounds, as one operator."""
    original = init._no_grad_trunc_normal_

    def record(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not isinstance(tensor, FakeTensor) or tensor.device.type == "meta":
            return original(tensor, *args, **kwargs)
        recording.record_draw(original, tensor, args, kwargs)
        return tensor

    init._no_grad_trunc_normal_ = record
    try:
        yield
    finally:
        init._no_grad_trunc_normal_ = original


_ACTIVE = ContextVar[Recording | None]("recording", default=None)


@contextmanager
def recording() -> Iterator[Recording]:
    """Build without memory inside this context; raise Undeferrable if that is impossible."""
    new = Recording()
    token = _ACTIVE.set(new)
    try:
        with new.fake, _Recorder(new), _truncation_as_one_step(new):
            yield new
    except Exception as error:
        if new.failed is not None:
            raise Undeferrable(new.failed) from error
        raise
    finally:
        _ACTIVE.reset(token)


def active_recording() -> Recording | None:
    """Return the recording that this code runs in; None if there is none."""
    return _ACTIVE.get()


def try_when_filled(trial: Callable[[], object], subject: str = "") -> None:
    """Run ``trial``, which needs the values of weights, now or once they exist. ``subject`` is then
    put before its message, as the caller does now.
    """
    current = active_recording()
    if current is None:
        trial()
    else:
        current.trials.append(partial(_run_named, trial, subject))


def _run_named(trial: Callable[[], object], subject: str) -> None:
    with naming(subject) if subject else nullcontext():
        try:
            trial()
        except NotImplementedError as error:
            raise InputError(str(error)) from None
