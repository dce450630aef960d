"""What may stand between a student and its body: passes are kept for equal inputs, recorded, or
given again.

Where nothing does, each pass is run, and forgotten. Shapes: B sequences of S tokens, N rows, H
hidden.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

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
    """Runs the body once for equal inputs: several values of an evaluation share its passes."""

    def run(self, inputs: Inputs, select: Tensor | None, body: Body) -> Found:
        """Return what an equal pass gave, or run the body."""
        for known in self.passes:
            if known.answers(inputs, select):
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
