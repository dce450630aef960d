"""When to stop a run whose loss is not finite, or explodes, and what to leave for the search."""

import math
import statistics
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

WINDOW = 100  # steps whose median is the usual loss
EARLIEST = 20  # steps before there is a median; until then the first loss is the usual one
LATEST = 1  # steps that a loss may be known late
AT_LEAST = 1.0  # nats above it: twenty times next to nothing is no explosion


Weights = tuple[float, ...]  # of the terms of a loss


class Usual(NamedTuple):
    """What a step's loss is held against: none may be above ``limit``."""

    value: float
    name: str
    limit: float


class LossWatch:
    """Knows the last losses; says what is wrong with the next one. The same after a resume.

    A loss is held against those of about the same weights: that a schedule lets a term begin is no
    explosion. ``late``: how many steps before it are not known yet when a step is judged, as it
    then is everywhere, wherever a run goes on.
    """

    def __init__(
        self, factor: float | None, recent: Iterable[tuple[float, Weights]] = (), late: int = 0
    ):
        self.factor, self.late = factor, late
        self._recent: deque[tuple[float, Weights]] = deque(recent, maxlen=WINDOW + late)
        self._ahead = 0  # steps that were begun and are not judged yet

    def usual(self, weights: Weights = ()) -> Usual:
        """What the next step's loss is held against; asked once, when it is begun."""
        known = list(self._recent)
        known = known[: max(len(known) - (self.late - self._ahead), 0)][-WINDOW:]
        self._ahead += 1
        value, name = _usual(known, weights)
        return Usual(value, name, max((self.factor or math.inf) * value, value + AT_LEAST))

    def complaint(
        self, loss: float, grad_norm: float, weights: Weights = (), usual: Usual | None = None
    ) -> str | None:
        """Why the run must stop, or None; remembers the loss. ``usual``: of when the step began;
        None: it begins and ends now.
        """
        usual = usual or self.usual(weights)
        self._ahead -= 1
        for name, value in (("loss", loss), ("grad_norm", grad_norm)):
            if not math.isfinite(value):
                return f"the {name} is {value}"
        if loss > usual.limit:
            told = f"more than {self.factor:g} times {usual.name}, {usual.value:.4g}"
            return f"the loss is {loss:.4g}, {told}"
        self._recent.append((loss, weights))
        return None


def _usual(known: Iterable[tuple[float, Weights]], weights: Weights) -> tuple[float, str]:
    """What a loss is compared with, and what that is called; infinite before there is any."""
    # A loss of 0 is of a step that taught nothing: masks from losses may leave one without.
    alike = [loss for loss, then in known if loss and _alike(then, weights)]
    if len(alike) >= EARLIEST:
        return statistics.median(alike), f"the median of the last {len(alike)} steps"
    # A loss that begins near 0 belongs to a term whose weight is on its way up.
    if alike and alike[0] >= AT_LEAST:
        return alike[0], "the first step's"
    return math.inf, ""


def _alike(then: Weights, now: Weights) -> bool:
    """Whether no weight is more than twice what it was, nor less than half."""
    return all(max(a, b) <= 2 * min(a, b) for a, b in zip(then, now, strict=True))


def recent_losses(
    records: Iterable[Mapping[str, Any]],
    until: int,
    weights: Callable[[int], Weights] = lambda step: (),
) -> list[tuple[float, Weights]]:
    """The last losses of a run's metrics up to ``until`` steps, for a watch that goes on;
    ``weights`` of a step (0-based).
    """
    trained = (r for r in records if r["kind"] == "train" and "loss" in r)
    kept = [r for r in trained if r["step"] <= until]
    return [(r["loss"], weights(r["step"] - 1)) for r in kept[-(WINDOW + LATEST) :]]
