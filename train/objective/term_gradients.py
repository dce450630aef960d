"""How strongly each term of the loss acts on the student: the norm of its gradient alone.

The gradient is measured where the heads begin: for token losses at the rows that the output matrix
multiplies, for task heads and methods at the body's final states. The body is neither run nor
backpropagated again: its states come from the step's own passes, detached, and the terms' losses
are formed again from them, one by one, with the weights of the step. Training is unchanged to the
bit.

A step's rows are those of all its micro-batches and processes, and no row is in two of them: the
squares of a term's norms add up to that of the whole step.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from rekindle.train.measures import GRADIENT, GRADIENT_RATIO
from rekindle.train.model.network import StudentNetwork
from rekindle.train.model.passes import Pass, ReplayedPasses
from rekindle.train.objective.selection import Add

HARD = "ce"


def squared_gradient_norms(
    student: StudentNetwork,
    passes: Sequence[Pass],
    form_terms: Callable[[Add], None],
    device: torch.device,
) -> dict[str, Tensor]:
    """Return the squared norm [] of each term's gradient in a micro-batch, by GRADIENT plus
    its name.

    ``passes``: those of the micro-batch's loss; ``form_terms(add)`` forms its terms again, one by
    one. A term that depends on no state of a head has none. Dropout in a task head is drawn anew.
    """
    losses: dict[str, Tensor] = {}

    def add(name: str, loss: Tensor | None, shown: Tensor) -> None:
        if loss is not None and loss.requires_grad:
            losses[name] = losses[name] + loss if name in losses else loss

    replayed = ReplayedPasses(passes)
    # These random draws must not change those of the next micro-batch.
    with (
        student.through(replayed),
        torch.random.fork_rng([device] if device.type == "cuda" else []),
    ):
        form_terms(add)
    squares = {name: _squared_norm(loss, replayed.leaves) for name, loss in losses.items()}
    return {GRADIENT + name: square for name, square in squares.items() if square is not None}


def _squared_norm(loss: Tensor, leaves: Sequence[Tensor]) -> Tensor | None:
    """Return the squared norm of a loss's gradient with respect to all leaves; None if it
    has none.
    """
    gradients = torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True)
    norms = [torch.linalg.vector_norm(g, dtype=torch.float32) for g in gradients if g is not None]
    return torch.stack(norms).square().sum() if norms else None


def describe_gradients(values: Mapping[str, float]) -> str:
    """Return a line with the norm of each term's gradient, relative to the cross-entropy's if there
    is one; empty if ``values``, a logged step, have no gradients.
    """
    ratios = [
        f"{n.removeprefix(GRADIENT_RATIO)} {v:.3g}"
        for n, v in values.items()
        if n.startswith(GRADIENT_RATIO)
    ]
    if ratios:
        return f"gradients over {HARD}'s: {', '.join(ratios)}"
    norms = [
        f"{n.removeprefix(GRADIENT)} {v:.3g}" for n, v in values.items() if n.startswith(GRADIENT)
    ]
    return f"gradients: {', '.join(norms)}" if norms else ""


def with_norms(values: Mapping[str, float]) -> dict[str, float]:
    """Return a step's values with norms instead of squares, and each norm's ratio to the
    cross-entropy's. A term without a norm has neither.
    """
    squares = {
        name.removeprefix(GRADIENT): v for name, v in values.items() if name.startswith(GRADIENT)
    }
    norms = {name: math.sqrt(square) for name, square in squares.items() if square > 0}
    ratios = {n: norm / norms[HARD] for n, norm in norms.items() if HARD in norms and n != HARD}
    return (
        {name: value for name, value in values.items() if not name.startswith(GRADIENT)}
        | {GRADIENT + name: norm for name, norm in norms.items()}
        | {GRADIENT_RATIO + name: ratio for name, ratio in ratios.items()}
    )
