"""Layers between a student and its body: they keep passes for equal inputs, record them, or replay
them.

Without one, each pass is run and forgotten. Shapes: B sequences of S tokens, N rows, H hidden.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

Inputs = Mapping[str, Tensor]
Found = tuple[Tensor | None, Tensor]  # hidden rows [N,H], if some are selected; states [B,S,H]
Body = Callable[[Inputs, Tensor | None], Found]


class Pass(NamedTuple):
    """The inputs and outputs of a pass of the body."""

    inputs: Inputs
    select: Tensor | None  # [N] flat indices into [B·S]
    hidden: Tensor | None  # [N,H] the output matrix's input, at the selected positions
    states: Tensor  # [B,S,H] what task heads read

    def answers(self, inputs: Inputs, select: Tensor | None) -> bool:
        """Return whether another pass would give the same, but for dropout."""
        same = inputs.keys() == self.inputs.keys() and all(
            torch.equal(inputs[name], self.inputs[name]) for name in inputs
        )
        if not same or select is None:
            return same
        return self.select is not None and torch.equal(select, self.select)


class Recorded:
    """Runs the body each time, and keeps the results."""

    ends_here = False  # whether gradients go on, to the body and to the output matrix

    def __init__(self) -> None:
        self.passes: list[Pass] = []

    def run(self, inputs: Inputs, select: Tensor | None, body: Body) -> Found:
        """Run the body."""
        self.passes.append(Pass(inputs, select, *body(inputs, select)))
        return self.passes[-1].hidden, self.passes[-1].states


class Remembered(Recorded):
    """Runs the body once for equal inputs: several values of an evaluation share its passes.

    ``known_to_all(known)``: whether the pass is ``known`` in all processes; if not, it is run.
    """

    def __init__(self, known_to_all: Callable[[bool], bool] = bool) -> None:
        super().__init__()
        self.known_to_all = known_to_all

    def run(self, inputs: Inputs, select: Tensor | None, body: Body) -> Found:
        """Return the result of an equal pass, or run the body."""
        known = next((one for one in self.passes if one.answers(inputs, select)), None)
        if self.known_to_all(known is not None) and known is not None:
            return (None if select is None else known.hidden), known.states
        return super().run(inputs, select, body)


class Replayed(Recorded):
    """Replays recorded passes in their order, as ``leaves`` at which gradients end."""

    ends_here = True

    def __init__(self, recorded: Sequence[Pass]) -> None:
        super().__init__()
        self.left, self.leaves = list(recorded), list[Tensor]()

    def run(self, inputs: Inputs, select: Tensor | None, body: Body) -> Found:
        """Return the next pass, detached; one that was not recorded is run without gradients."""
        if self.left and self.left[0].answers(inputs, select):
            _, _, hidden, states = self.left.pop(0)
        else:
            with torch.no_grad():
                hidden, states = body(inputs, select)
        hidden = None if select is None or hidden is None else self._leaf(hidden)
        return hidden, self._leaf(states)

    def _leaf(self, values: Tensor) -> Tensor:
        self.leaves.append(values.detach().requires_grad_())
        return self.leaves[-1]


# --- what a pass asks of its mask ---
# With PyTorch's own attention transformers asks ``mask.all()`` before every pass, to leave out a
# mask that hides nothing. On a GPU the answer would wait for all earlier work; the host knows it.

MASK = "attention_mask"
_SAME = (Tensor.to, Tensor.bool, Tensor.long)  # what does not change the answer


class PaddingMask(Tensor):
    """A mask [B,S] that answers ``all()`` itself."""

    full: bool  # whether it hides nothing

    @classmethod
    def of(cls, mask: Tensor, full: bool) -> "PaddingMask":
        """Return the mask, with the answer."""
        found = mask.as_subclass(cls)
        found.full = full
        return found

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Answer ``all()``; otherwise return plain tensors, unless only the type changes."""
        with torch._C.DisableTorchFunctionSubclass():
            own = args[0] if args and isinstance(args[0], cls) else None
            if func is Tensor.all and own is not None and len(args) == 1 and not kwargs:
                return own.full
            found = func(*args, **(kwargs or {}))
            if not isinstance(found, Tensor):
                return found
            if own is not None and func in _SAME:
                return cls.of(found, own.full)
            return found.as_subclass(Tensor) if isinstance(found, cls) else found


def note_padding(mask: Tensor, full: bool) -> Tensor:
    """Note on a mask whether it hides nothing; for ``with_known_padding``."""
    mask.hides_nothing = full  # type: ignore[attr-defined]
    return mask


def with_known_padding(inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return a pass's inputs with a mask that answers by itself, if ``note_padding`` marked it."""
    full = getattr(inputs[MASK], "hides_nothing", None)
    return inputs if full is None else {**inputs, MASK: PaddingMask.of(inputs[MASK], full)}
