"""What may stand between a student and its body: passes are kept for equal inputs, recorded, or
given again.

Where nothing does, each pass is run, and forgotten. Shapes: B sequences of S tokens, N rows, H
hidden.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

Inputs = Mapping[str, Tensor]
Found = tuple[Tensor | None, Tensor]  # hidden rows [N,H], where some are selected; states [B,S,H]
Body = Callable[[Inputs, Tensor | None], Found]


class Pass(NamedTuple):
    """What went into a pass of the body, and what came out."""

    inputs: Inputs
    select: Tensor | None  # [N] flat indices into [B·S]
    hidden: Tensor | None  # [N,H] what the output matrix multiplies, at the selected positions
    states: Tensor  # [B,S,H] what task heads read

    def answers(self, inputs: Inputs, select: Tensor | None) -> bool:
        """Whether another pass would give the same, but for dropout."""
        same = inputs.keys() == self.inputs.keys() and all(
            torch.equal(inputs[name], self.inputs[name]) for name in inputs
        )
        if not same or select is None:
            return same
        return self.select is not None and torch.equal(select, self.select)


class Recorded:
    """Runs the body each time, and keeps what came out."""

    ends_here = False  # whether gradients go on, to the body and to the output matrix

    def __init__(self) -> None:
        self.passes: list[Pass] = []

    def run(self, inputs: Inputs, select: Tensor | None, body: Body) -> Found:
        """Run the body."""
        self.passes.append(Pass(inputs, select, *body(inputs, select)))
        return self.passes[-1].hidden, self.passes[-1].states


class Remembered(Recorded):
    """Runs the body once for equal inputs: several values of an evaluation share its passes.

    ``known_to_all(known)``: whether a pass is ``known`` in all processes; in some, it is run.
    """

    def __init__(self, known_to_all: Callable[[bool], bool] = bool) -> None:
        super().__init__()
        self.known_to_all = known_to_all

    def run(self, inputs: Inputs, select: Tensor | None, body: Body) -> Found:
        """Return what an equal pass gave, or run the body."""
        known = next((one for one in self.passes if one.answers(inputs, select)), None)
        if self.known_to_all(known is not None) and known is not None:
            return (None if select is None else known.hidden), known.states
        return super().run(inputs, select, body)


class Replayed(Recorded):
    """Gives recorded passes once more, in their order, as ``leaves`` where gradients end."""

    ends_here = True

    def __init__(self, recorded: Sequence[Pass]) -> None:
        super().__init__()
        self.left, self.leaves = list(recorded), list[Tensor]()

    def run(self, inputs: Inputs, select: Tensor | None, body: Body) -> Found:
        """Return the next pass, cut off; one that was not recorded is run without gradients."""
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
# transformers asks ``mask.all()`` before every pass with PyTorch's own attention, to leave a mask
# out that hides nothing. On a GPU the answer would be waited for until all that was asked before is
# done; the host knows it.

MASK = "attention_mask"
_SAME = (Tensor.to, Tensor.bool, Tensor.long)  # what leaves the answer as it is


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
        """Answer ``all()``; of all else give plain tensors, but where only the type is another."""
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
    """Return a pass's inputs with a mask that answers by itself, where that is noted on it."""
    full = getattr(inputs[MASK], "hides_nothing", None)
    return inputs if full is None else {**inputs, MASK: PaddingMask.of(inputs[MASK], full)}
