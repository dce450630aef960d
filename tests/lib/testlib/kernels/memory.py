"""Fill uninitialised memory with NaN, so that reading it is always noticed."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def nan_in_new_memory() -> Iterator[None]:
    """Make torch.empty and the like, in C++ too, return NaN; for integers the largest value.

    PyTorch only does so in its deterministic mode, used here in its mildest form: nothing is
    refused, and compiled code need not be deterministic, unlike with
    `use_deterministic_algorithms`. None of our operators changes its path on a CPU.
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
