"""Replay a recording, with memory for one tensor at a time.

A tensor lives from the step that decides its value to the last step that uses it, and is then
handed over. If it is overwritten later, only its random numbers are drawn. Of a file's tensor that
a model takes unchanged, only the wanted rows are read.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from rekindle.train.deferred.recording import Recording, Ref, Step, Stored


class Home(Protocol):
    """A destination for the values of a tensor."""

    def __call__(self, rows: Callable[[slice], Tensor], whole: Callable[[], Tensor]) -> None:
        """Take the rows it wants, or all."""


class Filling:
    """Runs the steps of a recording with real memory."""

    def __init__(self, recording: Recording, homes: Mapping[int, Sequence[tuple[Ref, Home]]]):
        self.steps, self.stored, self.bytes = recording.steps, recording.stored, recording.bytes
        self.homes = homes
        self.held: dict[int, torch.UntypedStorage] = {}
        self.maker = {cell: n for n, step in enumerate(self.steps) for cell in step.makes}
        self.settled = self._settled()

    def _settled(self) -> frozenset[int]:
        """Return the cells made only from a file, or by a function of such cells, and never written
        again: they can be made whenever they are needed.
        """
        written = frozenset(cell for step in self.steps for cell in step.writes)
        found = set(self.stored.keys() - written)
        for step in self.steps:
            alone = not (step.draws or step.writes or step.makes & written)
            if alone and step.reads <= found:
                found |= step.makes
        return frozenset(found)

    @torch.no_grad()
    def run(self) -> None:
        """Run every step that decides a value with a destination."""
        needed = self._needed()
        last: dict[int, int] = {}
        for number in needed:
            last |= dict.fromkeys(self.steps[number].cells - self.settled, number)
        for number, step in enumerate(self.steps):
            if number in needed:
                self._do(step)
                for cell in step.cells:
                    if last.get(cell) == number and (storage := self.held.pop(cell, None)):
                        self._hand_over(cell, storage)
            elif step.draws:
                self._draw(step)
        for cell in self.homes.keys() & self.settled:
            self._hand_over_settled(cell)
        left = self.homes.keys() - self.settled - last.keys()
        assert not left, left

    def _needed(self) -> frozenset[int]:
        """Return the steps that decide the value of a cell with a destination, or its random
        numbers.
        """
        wanted, found = set(self.homes.keys() - self.settled), set[int]()
        for number in range(len(self.steps) - 1, -1, -1):
            step = self.steps[number]
            # Draws that depend on tensors are made together with these.
            if not (step.makes | step.writes) & wanted and not (step.draws and step.reads):
                continue
            if step.makes <= self.settled and not step.writes:
                continue
            found.add(number)
            wanted -= step.makes | step.covers
            wanted |= step.reads - self.settled
        return frozenset(found)

    def _do(self, step: Step) -> None:
        (args, kwargs), results = tree_map(self._real, step.arguments), step.results
        for ref, made in zip(results, tree_leaves(step.call(*args, **kwargs)), strict=True):
            if isinstance(ref, Ref) and ref.cell in step.makes and ref.cell not in self.held:
                self.held[ref.cell] = self._laid(ref, made)

    def _laid(self, ref: Ref, made: Tensor) -> torch.UntypedStorage:
        """Return the memory of a result, laid out as in the recording."""
        assert (made.dtype, tuple(made.shape)) == (ref.dtype, ref.size), ref
        own = made.untyped_storage()
        as_recorded = (made.stride(), made.storage_offset()) == (ref.stride, ref.offset)
        if as_recorded and own.nbytes() == self.bytes[ref.cell]:
            return own
        storage = torch.UntypedStorage(self.bytes[ref.cell])
        ref.of(storage).copy_(made)
        return storage

    def _real(self, value: Any) -> Any:
        if not isinstance(value, Ref):
            return value
        if value.cell in self.settled:
            return value.of(self._made(value.cell))
        if value.cell not in self.held:  # only its memory is needed
            self.held[value.cell] = torch.UntypedStorage(self.bytes[value.cell])
        return value.of(self.held[value.cell])

    def _draw(self, step: Step) -> None:
        """Draw a step's random numbers, whose values nobody needs."""

        def scratch(value: Any) -> Any:
            if isinstance(value, Ref):
                return torch.empty_strided(value.size, value.stride, dtype=value.dtype)
            return value

        args, kwargs = tree_map(scratch, step.arguments)
        step.call(*args, **kwargs)

    def _made(self, cell: int) -> torch.UntypedStorage:
        """Return the memory of a settled cell."""
        if (place := self.stored.get(cell)) is not None:
            with safe_open(place.file, "pt") as file:
                return file.get_tensor(place.key).contiguous().clone().untyped_storage()
        step = self.steps[self.maker[cell]]
        args, kwargs = tree_map(self._real, step.arguments)
        for ref, made in zip(step.results, tree_leaves(step.call(*args, **kwargs)), strict=True):
            if isinstance(ref, Ref) and ref.cell == cell:
                return self._laid(ref, made)
        raise AssertionError(step)

    def _hand_over(self, cell: int, storage: torch.UntypedStorage) -> None:
        for ref, home in self.homes.get(cell, ()):
            whole = ref.of(storage)
            home(whole.__getitem__, partial(_itself, whole))

    def _hand_over_settled(self, cell: int) -> None:
        for ref, home in self.homes[cell]:
            home(partial(self._rows, ref), partial(self._whole, ref))

    def _whole(self, ref: Ref) -> Tensor:
        return ref.of(self._made(ref.cell))

    def _rows(self, ref: Ref, wanted: slice) -> Tensor:
        """Return some rows of a settled tensor; if it is in a file, no other rows are read."""
        if (place := self._in_file(ref)) is None:
            return self._whole(ref)[wanted]
        with safe_open(place.file, "pt") as file:
            found: Tensor = file.get_slice(place.key)[wanted]
        return found.to(ref.dtype)

    def _in_file(self, ref: Ref) -> Stored | None:
        """Return the file tensor that this one equals, except for its dtype; None if
        there is none.
        """
        seen = ref
        while seen.cell not in self.stored:
            step = self.steps[self.maker[seen.cell]]
            (args, _) = step.arguments
            if step.call is not torch.ops.aten._to_copy.default or args[0].size != seen.size:
                return None
            seen = args[0]
        return self.stored[seen.cell] if seen.bytes == self.bytes[seen.cell] else None


def _itself(tensor: Tensor) -> Tensor:
    return tensor
