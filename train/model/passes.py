"""Wrappers around the student's body that record, share or replay its forward passes; and an
attention mask that knows whether it hides anything.

Without a wrapper, each pass is run and forgotten.

Shapes: B sequences of S tokens, N rows, H hidden.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

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
            torch.equal(inputs[name], self.inputs[name]) for name in inputs
        )
        if not same or select is None:
            return same
        return self.select is not None and torch.equal(select, self.select)


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


# --- masks that know whether they hide anything ---
# With PyTorch's own attention transformers calls ``mask.all()`` before every pass, to leave out a
# mask that hides nothing. On a GPU that call would wait for all earlier work; the host knows it.

MASK = "attention_mask"
_SAME = (Tensor.to, Tensor.bool, Tensor.long)  # what does not change the answer


class PaddingMask(Tensor):
    """A mask [B,S] that answers ``all()`` itself."""

    hides_nothing: bool

    @classmethod
    def of(cls, mask: Tensor, hides_nothing: bool) -> "PaddingMask":
        """Return the mask, with the answer."""
        marked = mask.as_subclass(cls)
        marked.hides_nothing = hides_nothing
        return marked

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
            mask = args[0] if args and isinstance(args[0], cls) else None
            if func is Tensor.all and mask is not None and len(args) == 1 and not kwargs:
                return mask.hides_nothing
            result = func(*args, **(kwargs or {}))
            if not isinstance(result, Tensor):
                return result
            if mask is not None and func in _SAME:
                return cls.of(result, mask.hides_nothing)
            return result.as_subclass(Tensor) if isinstance(result, cls) else result


def note_padding(mask: Tensor, hides_nothing: bool) -> Tensor:
    """Note on a mask whether it hides nothing; for ``with_known_padding``."""
    mask.hides_nothing = hides_nothing  # type: ignore[attr-defined]
    return mask


def with_known_padding(inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return a pass's inputs with a mask that answers by itself, if ``note_padding`` marked it."""
    hides_nothing = getattr(inputs[MASK], "hides_nothing", None)
    if hides_nothing is None:
        return inputs
    return {**inputs, MASK: PaddingMask.of(inputs[MASK], hides_nothing)}
