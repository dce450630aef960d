"""The scripts that make the result pages, and made-up results for them."""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest

from testlib.compared.recorded import run_in, table_in

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def pages() -> ModuleType:
    sys.path.insert(0, str(HERE / "pages"))
    import make

    return make


@pytest.fixture(scope="session")
def record(pages: ModuleType) -> ModuleType:
    return sys.modules["record"]


@pytest.fixture
def make_table(tmp_path: Path) -> Callable[..., Path]:
    return partial(table_in, tmp_path)


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    return partial(run_in, tmp_path / "run")
