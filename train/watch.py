"""When to stop a run whose loss is not finite, or explodes, and what to leave for the search."""

import json
import math
import statistics
from collections import deque
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

WINDOW = 100  # steps whose median is the usual loss
EARLIEST = 20  # steps before there is a usual loss
AT_LEAST = 1.0  # nats above it: twenty times next to nothing is no explosion


class LossWatch:
    """Knows the last losses; says what is wrong with the next one. The same after a resume."""

    def __init__(self, factor: float | None, recent: Iterable[float] = ()):
        self.factor = factor
        self._recent: deque[float] = deque(recent, maxlen=WINDOW)

    def complaint(self, loss: float, grad_norm: float) -> str | None:
        """Why the run must stop, or None; remembers the loss."""
        for name, value in (("loss", loss), ("grad_norm", grad_norm)):
            if not math.isfinite(value):
                return f"the {name} is {value}"
        if self.factor is not None and len(self._recent) >= EARLIEST:
            usual = statistics.median(self._recent)
            if loss > self.factor * usual and loss > usual + AT_LEAST:
                return (
                    f"the loss is {loss:.4g}, more than {self.factor:g} times the median of the "
                    f"last {len(self._recent)} steps, {usual:.4g}"
                )
        self._recent.append(loss)
        return None


def recent_losses(records: Iterable[Mapping[str, Any]], until: int) -> list[float]:
    """The last losses of a run's metrics up to ``until`` steps, for a watch that goes on."""
    losses = [r["loss"] for r in records if r["kind"] == "train" and r["step"] <= until]
    return losses[-WINDOW:]


def save_suspect(
    run: Path, step: int, reason: str, sequences: list[int], digests: list[str]
) -> Path:
    """Write which examples the step was made of: numbers in the cache, and digests."""
    path = run / f"stopped-at-step-{step:08d}.json"
    content = {"step": step, "reason": reason, "sequences": sequences, "digests": digests}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return path
