"""Small tensors, one thread."""

import pytest


@pytest.fixture(autouse=True, scope="session")
def _one_thread(one_thread: None) -> None:
    """Tensors here have hundreds of elements."""
