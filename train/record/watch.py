"""Decide when to stop a run whose loss is not finite or explodes."""

import math
import statistics
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

WINDOW = 100  # steps whose median is the usual loss
EARLIEST = 20  # steps needed for a median; until then the first loss is the usual one
LATEST = 1  # number of steps by which a loss may be known late
AT_LEAST = 1.0  # nats above the usual loss: twenty times almost nothing is not an explosion


Weights = tuple[float, ...]  # weights of the terms of a loss


class Usual(NamedTuple):
    """The loss a step is compared with; none may exceed ``limit``."""

    value: float
    name: str
    limit: float


class LossWatch:
    """Remembers the last losses and reports what is wrong with the next one. The same after a
    resume.

    A loss is compared with losses at similar weights, so a term whose schedule begins is not an
    explosion. ``late``: how many preceding losses are unknown when a step is judged; the same
    everywhere, also in a resumed run.
    """

    def __init__(
        self, factor: float | None, recent: Iterable[tuple[float, Weights]] = (), late: int = 0
    ):
        self.factor, self.late = factor, late
        self._recent: deque[tuple[float, Weights]] = deque(recent, maxlen=WINDOW + late)
        self._unjudged = 0  # steps begun and not judged yet

    def usual(self, weights: Weights = ()) -> Usual:
        """Return what the next step's loss is compared with; call it once, when the step begins."""
        recent = list(self._recent)
        known_losses = recent[: max(len(recent) - (self.late - self._unjudged), 0)][-WINDOW:]
        self._unjudged += 1
        value, name = _usual(known_losses, weights)
        return Usual(value, name, max((self.factor or math.inf) * value, value + AT_LEAST))

    def complaint(
        self, loss: float, grad_norm: float, weights: Weights = (), usual: Usual | None = None
    ) -> str | None:
        """Return why the run must stop, or None; remember the loss. ``usual``: from the step's
        beginning; None: it begins and ends now.
        """
        usual = usual or self.usual(weights)
        self._unjudged -= 1
        for name, value in (("loss", loss), ("grad_norm", grad_norm)):
            if not math.isfinite(value):
                return f"the {name} is {value}"
        if loss > usual.limit:
            comparison = f"more than {self.factor:g} times {usual.name}, {usual.value:.4g}"
            return f"the loss is {loss:.4g}, {comparison}"
        self._recent.append((loss, weights))
        return None


def _usual(known_losses: Iterable[tuple[float, Weights]], weights: Weights) -> tuple[float, str]:
    """Return the loss to compare with, and its name; infinite before there is any."""
    # A loss of 0 belongs to a step that taught nothing: masks may leave one without targets.
    comparable = [
        loss
        for loss, earlier_weights in known_losses
        if loss and _are_similar(earlier_weights, weights)
    ]
    if len(comparable) >= EARLIEST:
        return statistics.median(comparable), f"the median of the last {len(comparable)} steps"
    # A first loss near 0 belongs to a term whose weight is still rising.
    if comparable and comparable[0] >= AT_LEAST:
        return comparable[0], "the first step's"
    return math.inf, ""


def _are_similar(earlier_weights: Weights, weights: Weights) -> bool:
    """Return whether no weight has more than doubled or halved."""
    return all(max(a, b) <= 2 * min(a, b) for a, b in zip(earlier_weights, weights, strict=True))


def recent_losses(
    records: Iterable[Mapping[str, Any]],
    until: int,
    weights: Callable[[int], Weights] = lambda step: (),
) -> list[tuple[float, Weights]]:
    """Return the last losses in a run's metrics up to ``until`` steps, for a resumed watch;
    ``weights`` gives those of a step (0-based).
    """
    losses = (r for r in records if r["kind"] == "train" and "loss" in r)
    until_then = [r for r in losses if r["step"] <= until]
    return [(r["loss"], weights(r["step"] - 1)) for r in until_then[-(WINDOW + LATEST) :]]
