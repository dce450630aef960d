"""Arrays that are made of a batch, or sent to the device, ahead of the step that takes them
(``ready.py`` does it; on a CPU nothing is).
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_NOTED = "_made_ahead"  # no field, so that dataclasses.replace() leaves it out


class SentArray(np.ndarray):
    """An array whose copy is on a device or on its way there. Slices and results of computations
    with it are plain arrays.
    """

    sent: Tensor | None
    copied: torch.cuda.Event | None

    @classmethod
    def of(cls, values: NDArray, sent: Tensor, copied: torch.cuda.Event | None) -> "SentArray":
        """Return the array with its copy, and the event of the copy's arrival; None: it has
        arrived.
        """
        array = values.view(cls)
        array.sent, array.copied = sent, copied
        return array

    def __array_finalize__(self, source: object) -> None:
        """Start without a copy."""
        self.sent = self.copied = None

    def copy_on_device(self) -> Tensor | None:
        """Return the copy; the asking stream waits for it, the host does not."""
        if self.sent is not None and self.copied is not None:
            stream = torch.cuda.current_stream(self.sent.device)
            stream.wait_event(self.copied)
            self.sent.record_stream(stream)
        return self.sent


def copy_on(values: NDArray, device: torch.device) -> Tensor | None:
    """Return the copy of an array that was sent ahead to ``device``; None if there is none."""
    sent = values.copy_on_device() if isinstance(values, SentArray) else None
    return None if sent is None or sent.device != device else sent


def made(owner: object, name: str, make: Callable[[], NDArray]) -> NDArray:
    """Return an array that a step makes on the host of ``owner`` (a batch, or targets in it): as
    it was noted ahead of the step, or made now.
    """
    noted: dict[str, NDArray] = vars(owner).get(_NOTED, {})
    return noted[name] if name in noted else make()


def note_made(owner: Any, arrays: Mapping[str, NDArray]) -> None:
    """Note arrays by name for ``made``. Whatever is cut or changed of ``owner`` later is without
    them, so that none can be out of date.
    """
    object.__setattr__(owner, _NOTED, dict(arrays))  # also where fields are frozen
