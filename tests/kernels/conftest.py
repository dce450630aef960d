"""Small tensors, one thread; Triton on a GPU or under its interpreter."""

from collections.abc import Iterator

import pytest
import torch

from testlib.kernels.interpreter import quick_interpreter


@pytest.fixture(autouse=True, scope="session")
def _one_thread(one_thread: None) -> None:
    """Tensors here have hundreds of elements."""


@pytest.fixture(scope="session")
def triton_runs() -> Iterator[None]:
    """For tests of Triton's kernels: skipped where it is not installed, and nowhere else."""
    triton = pytest.importorskip("triton")
    interpreted = torch.cuda.is_available() or triton.knobs.runtime.interpret
    assert interpreted, "no GPU, and triton was imported before tests/conftest.py chose"
    with quick_interpreter():
        yield


@pytest.fixture(params=["torch", "triton"])
def impl(request: pytest.FixtureRequest) -> str:
    """Each way to compute a loss."""
    if request.param == "triton":
        request.getfixturevalue("triton_runs")
    return request.param
