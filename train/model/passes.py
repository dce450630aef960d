"""Wrappers around the student's body that record, share or replay its forward passes; and the
attention mask of a pass, which need not be asked of the device.

Without a wrapper, each pass is run and forgotten.

Shapes: B sequences of S tokens, N rows, H hidden.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rekindle.train.host.known import Known, are_equal, values_of

Inputs = Mapping[str, Tensor]
PassResult = tuple[Tensor | None, Tensor]  # hidden rows [N,H], if some are selected; states [B,S,H]
Body = Callable[[Inputs, Tensor | None], PassResult]


class Pass(NamedTuple):
    """The inputs and outputs of a pass of the body."""

    inputs: Inputs
    select: Tensor | None  # [N] flat indices into [B·S]
    hidden: Tensor | None  # [N,H] the output matrix's input, at the selected positions
    states: Tensor  # [B,S,H] what task heads read

    def covers(self, inputs: Inputs, select: Tensor | None) -> bool:
        """Return whether this pass already holds the result for these arguments (dropout aside)."""
        same = inputs.keys() == self.inputs.keys() and all(
            are_equal(inputs[name], self.inputs[name]) for name in inputs
        )
        if not same or select is None:
            return same
        return self.select is not None and are_equal(select, self.select)


class RecordedPasses:
    """Runs the body each time, and keeps the results."""

    # True: gradients end at the replayed states, and reach neither the body nor the output matrix.
    stops_gradients = False

    def __init__(self) -> None:
        self.passes: list[Pass] = []

    def run(self, inputs: Inputs, select: Tensor | None, body: Body) -> PassResult:
        """Run the body."""
        self.passes.append(Pass(inputs, select, *body(inputs, select)))
        return self.passes[-1].hidden, self.passes[-1].states


class SharedPasses(RecordedPasses):
    """Runs the body once for equal inputs: several values of an evaluation share its passes.

    ``all_processes_agree(found)``: whether all processes have found an equal pass; if one has not,
    all run it.
    """

    def __init__(self, all_processes_agree: Callable[[bool], bool] = bool) -> None:
        super().__init__()
        self.all_processes_agree = all_processes_agree

    def run(self, inputs: Inputs, select: Tensor | None, body: Body) -> PassResult:
        """Return the result of an equal pass, or run the body."""
        equal_pass = next((one for one in self.passes if one.covers(inputs, select)), None)
        if self.all_processes_agree(equal_pass is not None) and equal_pass is not None:
            return (None if select is None else equal_pass.hidden), equal_pass.states
        return super().run(inputs, select, body)


class ReplayedPasses(RecordedPasses):
    """Replays recorded passes in their order, as ``leaves`` at which gradients end."""

    stops_gradients = True

    def __init__(self, recorded: Sequence[Pass]) -> None:
        super().__init__()
        self.remaining, self.leaves = list(recorded), list[Tensor]()

    def run(self, inputs: Inputs, select: Tensor | None, body: Body) -> PassResult:
        """Return the next pass, detached; one that was not recorded is run without gradients."""
        if self.remaining and self.remaining[0].covers(inputs, select):
            _, _, hidden, states = self.remaining.pop(0)
        else:
            with torch.no_grad():
                hidden, states = body(inputs, select)
        hidden = None if select is None or hidden is None else self._leaf(hidden)
        return hidden, self._leaf(states)

    def _leaf(self, values: Tensor) -> Tensor:
        self.leaves.append(values.detach().requires_grad_())
        return self.leaves[-1]


MASK = "attention_mask"


def with_known_padding(inputs: Mapping[str, Tensor], config: Any) -> Mapping[str, Tensor]:
    """Return a pass's inputs with a mask that says itself whether it hides anything, if the host
    knows it (``note``).

    A model of ``config`` with flex attention gets the plain mask: it compiles what reads it, which
    PyTorch does for no class of tensors, and would compute all scores uncompiled.
    """
    values = values_of(inputs[MASK])
    if values is None or getattr(config, "_attn_implementation", None) == "flex_attention":
        return inputs
    return {**inputs, MASK: Known.of(inputs[MASK], values)}
