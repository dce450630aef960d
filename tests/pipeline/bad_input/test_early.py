"""What is wrong is said before dear work: before torch is imported, before a disk is full."""

import logging
import os
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from testlib.command import pipeline, python

# What a cache says is read by what imports torch, as are the settings of predict.
LATER = [
    *("a term with an unknown teacher", "a temperature that is not stored"),
    *("a masked LM as teacher of a causal student", "an unknown setting of predict"),
]
WITHOUT_TORCH = """
import importlib.abc, os, shlex, shutil, sys
from pathlib import Path

class Refused(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            raise RuntimeError("torch is imported")

sys.meta_path.insert(0, Refused())
import pytest
from testlib.bad_input import configuration
from testlib.bad_input.row import Place
from testlib.command import pipeline

for row in configuration.ROWS:
    if row.done in {later!r}:
        continue
    here = Path({root!r}) / "here"
    shutil.copytree({sound!r}, here)
    os.chdir(here)
    row.spoil(Place(here, pytest.MonkeyPatch()))
    try:
        done = pipeline(*shlex.split(row.typed))
        assert done.returncode == row.code, done
    except RuntimeError as error:
        print(row.done, error)
    shutil.rmtree(here)
print("done")
"""


def test_what_needs_no_model_is_refused_before_torch_is_imported(sound, tmp_path):
    code = WITHOUT_TORCH.format(root=str(tmp_path), sound=str(sound), later=LATER)
    lib = str(Path(__file__).parents[2] / "lib")
    assert (
        python(code, PYTHONPATH=os.pathsep.join([lib, os.environ.get("PYTHONPATH", "")])) == "done"
    )


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("cache-teachers run.yaml --set cache.path=new --teacher lm", "unit"),
        ("train-student run.yaml --out new", "checkpoint"),
    ],
)
def test_a_disk_that_will_not_last_is_told_once_before_it_is_full(
    place, monkeypatch, caplog, line, what
):
    caplog.set_level(logging.WARNING, "rekindle")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100, total=10**9))
    done = pipeline(*shlex.split(line), *(("--set", "train.steps=4") if what != "unit" else ()))
    assert done.returncode == 0, done.stderr
    told = [one for one in caplog.messages if "100 bytes are free" in one]
    assert len(told) == 1
    assert f"the last {what} took" in told[0]
    assert "Make room now" in told[0]
