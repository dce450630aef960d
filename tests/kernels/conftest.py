"""Without a GPU, Triton kernels run under its interpreter, which is chosen before the import."""

import os
import sys

import pytest
import torch

if not torch.cuda.is_available() and "triton" not in sys.modules:
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True, scope="session")
def _one_thread(one_thread: None) -> None:
    """Tensors here have hundreds of elements."""
