"""Digests of caches and students: today's code makes what the recorded commit made, bit for bit."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RECORD = Path(__file__).parent / "digests.json"
SUBJECT = ROOT / "tests/benchmarks/digest_runs/subject.py"


@pytest.fixture(scope="module")
def digests():
    spec = importlib.util.spec_from_file_location("digests", ROOT / "tests/benchmarks/digests.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write(path, found):
    path.write_text(json.dumps(found))
    return str(path)


@pytest.mark.slow
def test_a_cache_is_recorded_and_a_change_is_named(digests, tmp_path, capsys):
    one = tmp_path / "one.json"
    assert digests.main(["record", "--only", "cover", "--out", str(one)]) == 0
    first = json.loads(one.read_text())
    unit = "cache cover/targets/topk/commits/00000-r000"
    expected = {f"{unit} file", f"{unit} columns", f"{unit} record", "cache cover decoded topk"}
    assert expected <= first["digests"].keys()
    assert digests.main(["compare", str(one), str(one)]) == 0
    assert capsys.readouterr().out == "equal\n"
    changed = first | {"digests": first["digests"] | {f"{unit} file": "0" * 32}}
    two = write(tmp_path / "two.json", changed)
    assert digests.main(["compare", str(one), two]) == 1
    assert capsys.readouterr().out == f"differs: {unit} file\n"


def test_a_record_can_differ_in_any_digest(digests, tmp_path, capsys):
    recorded = json.loads(RECORD.read_text())
    recorded["about"] |= digests.about_machine()
    one, values = write(tmp_path / "one.json", recorded), recorded["digests"]
    unit = "students/resumed/model.safetensors"
    for digest in (values[unit][::-1], None):
        other = {k: v for k, v in (values | {unit: digest}).items() if v is not None}
        two = write(tmp_path / "two.json", recorded | {"digests": other})
        assert digests.main(["compare", one, two]) == 1
        verb = "missing" if digest is None else "differs"
        assert capsys.readouterr().out == f"{verb}: {unit}\n"


def test_another_machine_is_no_difference(digests, tmp_path, capsys):
    recorded = json.loads(RECORD.read_text())
    for name in ("processor", "torch", "threads"):
        about = recorded["about"] | digests.about_machine() | {name: "another"}
        path = write(tmp_path / "one.json", recorded | {"about": about})
        assert digests.main(["compare", path, path]) == 2
        assert f"nothing to compare: {name}: another" in capsys.readouterr().err


@pytest.mark.parametrize(("path", "message"), [(ROOT / ".ns", "not from"), (None, "gives no")])
def test_code_from_elsewhere_is_refused(tmp_path, path, message):
    """A module that the commit lacks must not come from what is installed here."""
    done = subprocess.run(
        [sys.executable, str(SUBJECT), str(tmp_path), "steps.json", "digests.json"],
        env=os.environ | {"PYTHONPATH": str(path or tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("digests: ")
    assert message in done.stderr


@pytest.mark.slow
def test_nothing_has_changed_since_the_record(digests):
    """A change of numbers that is meant: see ``tests/benchmarks/digests.py``."""
    reason = digests.obstacle(json.loads(RECORD.read_text())["about"], digests.about_machine())
    if reason is not None:
        pytest.skip(reason)
    assert digests.compare(str(RECORD), None) == []
