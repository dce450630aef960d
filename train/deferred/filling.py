"""Replay a recording, with memory for one tensor at a time.

A tensor lives from the step that decides its value to the last step that uses it, and is then
handed over. If it is overwritten later, only its random numbers are drawn. Of a file's tensor that
a model takes unchanged, only the rows that are needed are read.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from rekindle.train.deferred.recording import Recording, Ref, Step, Stored


class Destination(Protocol):
    """A destination for the values of a tensor."""

    def __call__(self, rows: Callable[[slice], Tensor], whole: Callable[[], Tensor]) -> None:
        """Take the rows that it needs, or all."""


class Filling:
    """Runs the steps of a recording with real memory."""

    def __init__(
        self, recording: Recording, destinations: Mapping[int, Sequence[tuple[Ref, Destination]]]
    ):
        self.steps, self.stored, self.bytes = recording.steps, recording.stored, recording.bytes
        self.destinations = destinations
        self.memory: dict[int, torch.UntypedStorage] = {}
        self.maker = {cell: n for n, step in enumerate(self.steps) for cell in step.makes}
        self.recomputable = self._recomputable_cells()

    def _recomputable_cells(self) -> frozenset[int]:
        """Return the cells made only from a file, or by a function of such cells, and never written
        again: they can be made whenever they are needed.
        """
        written = frozenset(cell for step in self.steps for cell in step.writes)
        recomputable = set(self.stored.keys() - written)
        for step in self.steps:
            is_pure = not (step.draws or step.writes or step.makes & written)
            if is_pure and step.reads <= recomputable:
                recomputable |= step.makes
        return frozenset(recomputable)

    @torch.no_grad()
    def run(self) -> None:
        """Run every step that decides a value with a destination."""
        needed = self._needed()
        last_use: dict[int, int] = {}
        for number in needed:
            last_use |= dict.fromkeys(self.steps[number].cells - self.recomputable, number)
        for number, step in enumerate(self.steps):
            if number in needed:
                self._run_step(step)
                for cell in step.cells:
                    if last_use.get(cell) == number and (storage := self.memory.pop(cell, None)):
                        self._hand_over(cell, storage)
            elif step.draws:
                self._draw(step)
        for cell in self.destinations.keys() & self.recomputable:
            self._hand_over_recomputable(cell)
        unfilled = self.destinations.keys() - self.recomputable - last_use.keys()
        assert not unfilled, unfilled

    def _needed(self) -> frozenset[int]:
        """Return the steps that decide the value of a cell with a destination, or its random
        numbers.
        """
        needed_cells, needed_steps = set(self.destinations.keys() - self.recomputable), set[int]()
        for number in range(len(self.steps) - 1, -1, -1):
            step = self.steps[number]
            # Draws that depend on tensors are made together with these.
            if not (step.makes | step.writes) & needed_cells and not (step.draws and step.reads):
                continue
            if step.makes <= self.recomputable and not step.writes:
                continue
            needed_steps.add(number)
            needed_cells -= step.makes | step.covers
            needed_cells |= step.reads - self.recomputable
        return frozenset(needed_steps)

    def _run_step(self, step: Step) -> None:
        (args, kwargs), results = tree_map(self._real_value, step.arguments), step.results
        for ref, result in zip(results, tree_leaves(step.call(*args, **kwargs)), strict=True):
            if isinstance(ref, Ref) and ref.cell in step.makes and ref.cell not in self.memory:
                self.memory[ref.cell] = self._with_recorded_layout(ref, result)

    def _with_recorded_layout(self, ref: Ref, result: Tensor) -> torch.UntypedStorage:
        """Return the memory of a result, laid out as in the recording."""
        assert (result.dtype, tuple(result.shape)) == (ref.dtype, ref.size), ref
        storage = result.untyped_storage()
        as_recorded = (result.stride(), result.storage_offset()) == (ref.stride, ref.offset)
        if as_recorded and storage.nbytes() == self.bytes[ref.cell]:
            return storage
        copy = torch.UntypedStorage(self.bytes[ref.cell])
        ref.of(copy).copy_(result)
        return copy

    def _real_value(self, value: Any) -> Any:
        if not isinstance(value, Ref):
            return value
        if value.cell in self.recomputable:
            return value.of(self._recompute(value.cell))
        if value.cell not in self.memory:  # only its memory is needed
            self.memory[value.cell] = torch.UntypedStorage(self.bytes[value.cell])
        return value.of(self.memory[value.cell])

    def _draw(self, step: Step) -> None:
        """Draw a step's random numbers, whose values nobody needs."""

        def scratch(value: Any) -> Any:
            if isinstance(value, Ref):
                return torch.empty_strided(value.size, value.stride, dtype=value.dtype)
            return value

        args, kwargs = tree_map(scratch, step.arguments)
        step.call(*args, **kwargs)

    def _recompute(self, cell: int) -> torch.UntypedStorage:
        """Return the memory of a settled cell."""
        if (stored := self.stored.get(cell)) is not None:
            with safe_open(stored.file, "pt") as file:
                return file.get_tensor(stored.key).contiguous().clone().untyped_storage()
        step = self.steps[self.maker[cell]]
        args, kwargs = tree_map(self._real_value, step.arguments)
        for ref, result in zip(step.results, tree_leaves(step.call(*args, **kwargs)), strict=True):
            if isinstance(ref, Ref) and ref.cell == cell:
                return self._with_recorded_layout(ref, result)
        raise AssertionError(step)

    def _hand_over(self, cell: int, storage: torch.UntypedStorage) -> None:
        for ref, destination in self.destinations.get(cell, ()):
            tensor = ref.of(storage)
            destination(tensor.__getitem__, partial(_identity, tensor))

    def _hand_over_recomputable(self, cell: int) -> None:
        for ref, destination in self.destinations[cell]:
            destination(partial(self._rows, ref), partial(self._whole, ref))

    def _whole(self, ref: Ref) -> Tensor:
        return ref.of(self._recompute(ref.cell))

    def _rows(self, ref: Ref, rows: slice) -> Tensor:
        """Return some rows of a settled tensor; if it is in a file, no other rows are read."""
        if (stored := self._equal_in_file(ref)) is None:
            return self._whole(ref)[rows]
        with safe_open(stored.file, "pt") as file:
            values: Tensor = file.get_slice(stored.key)[rows]
        return values.to(ref.dtype)

    def _equal_in_file(self, ref: Ref) -> Stored | None:
        """Return the file tensor that this one equals, except for its dtype; None if
        there is none.
        """
        source = ref
        while source.cell not in self.stored:
            step = self.steps[self.maker[source.cell]]
            (args, _) = step.arguments
            if step.call is not torch.ops.aten._to_copy.default or args[0].size != source.size:
                return None
            source = args[0]
        return self.stored[source.cell] if source.bytes == self.bytes[source.cell] else None


def _identity(tensor: Tensor) -> Tensor:
    return tensor
