"""Memory that nobody wrote holds NaN here: whether reading it is seen is no matter of luck."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def nan_in_new_memory() -> Iterator[None]:
    """Let torch.empty and its like, in C++ too, return NaN; of integers the largest.

    PyTorch does so in its deterministic mode only, which is taken here in its mildest form:
    nothing is refused, and what is compiled is not asked to be deterministic too, as it would be by
    `use_deterministic_algorithms`. On a CPU no operator of ours takes another way by it.
    """
    before = torch.get_deterministic_debug_mode()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.set_deterministic_debug_mode("warn")
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = filled
        torch.set_deterministic_debug_mode(before)
