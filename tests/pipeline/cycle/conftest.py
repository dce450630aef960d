"""A cycle whose stages have left their files, none of which was run."""

import shutil
from pathlib import Path

import pytest

from rekindle.pipeline.cycle.results import read_results
from testlib.cycles import cycle, student


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out = cycle(tmp_path_factory.mktemp("cycles") / "whole")
    student(out, "mlm", 40.0)
    student(out, "kd-cola", 50.0, cola=7.0)
    student(out, "mixture", 60.0, cola=7.0, mrpc=8.0, stsb=None)
    return out


@pytest.fixture(scope="module")
def results(made):
    return read_results(made)


@pytest.fixture
def out(made, tmp_path):
    """A copy to spoil."""
    return Path(shutil.copytree(made, tmp_path / "copy"))
