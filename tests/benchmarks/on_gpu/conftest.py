"""The benchmarks' modules, which are no package."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.fixture(scope="package", autouse=True)
def benchmarks() -> Iterator[None]:
    """They import each other by their bare names."""
    before = [*sys.path]
    sys.path[:0] = [str(HERE.parent), str(HERE)]
    yield
    sys.path[:] = before
