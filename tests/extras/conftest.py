"""Tests against packages that are no dependencies: those of a folder need the package of its name.

`pytest` alone leaves them out (pyproject's norecursedirs); `pytest tests/extras` runs them. Where
the package is not installed they are skipped, in CI never. Import it within a test or a fixture.
"""

import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from testlib.models import AUTO, NARROW

EXTRAS = Path(__file__).parent


@pytest.fixture(scope="session", autouse=True)
def _one_thread(one_thread: None) -> None:
    """In every test of this folder."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep each folder in one process; begin with Ray's, which mostly waits."""
    own = [item for item in items if item.path.is_relative_to(EXTRAS)]
    for item in own:
        item.add_marker(pytest.mark.xdist_group(item.path.relative_to(EXTRAS).parts[0]))
    items.sort(key=lambda item: not item.path.is_relative_to(EXTRAS / "ray"))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip the tests of a folder whose package is not installed; in CI they fail."""
    if not item.path.is_relative_to(EXTRAS):
        return
    package = item.path.relative_to(EXTRAS).parts[0]
    if find_spec(package) is None:
        told = f"{package} is not installed: pip install -e '.[test-extras]'"
        pytest.fail(told) if "CI" in os.environ else pytest.skip(told)


@pytest.fixture(scope="session")
def short_run(
    tmp_path_factory: pytest.TempPathFactory,
    make_model: Callable[..., Path],
    make_teacher: Callable[..., Any],
    make_cache: Callable[..., Any],
    wordpiece: Path,
) -> Callable[..., Any]:
    """short_run(out, config, **of train_student): a run of a masked LM that ``big`` teaches."""
    from rekindle.data.cache import Cache
    from rekindle.train.config import StudentConfig
    from rekindle.train.loop import train_student

    teacher = make_teacher("big", "masked_lm", 1, NARROW, targets={"kind": "topk", "k": 8})
    path = tmp_path_factory.mktemp("short run") / "cache"
    make_cache(path, [teacher])
    student = make_model("bert", AUTO["masked_lm"], wordpiece, 2, **NARROW)

    def run(out: Path, config: Any, **options: Any) -> Any:
        about = StudentConfig(model=str(student))
        return train_student(Cache.open(path), about, config, out, **options)

    return run
