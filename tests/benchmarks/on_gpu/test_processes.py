"""Commands end within their time, with all that they have started; what tests did is known."""

import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

# Starts two processes, one in its group and one with a session of its own, writes their ids, and
# then does what is put in.
PARENT = """
import pathlib, subprocess, sys, time
sleep = [sys.executable, "-S", "-c", "import time; time.sleep(60)"]
started = [subprocess.Popen(sleep, start_new_session=new) for new in (False, True)]
pathlib.Path({path!r}).write_text(" ".join(str(each.pid) for each in started))
{then}
"""


def is_alive(pid: int) -> bool:
    """Whether it runs; one that has ended may not have been waited for."""
    with suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    return False


@pytest.fixture
def started(tmp_path):
    """The file of the ids; what is still alive at the end is ended."""
    path = tmp_path / "started"
    yield path
    for pid in map(int, path.read_text().split()):
        if is_alive(pid):
            os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize(
    ("then", "seconds", "why"),
    [
        ("", 60, None),
        ("sys.exit(3)", 60, "ended with exit code 3"),
        ("time.sleep(60)", 2, "not done within 2 s"),
    ],
)
def test_a_command_ends_with_all_that_it_started(started, then, seconds, why):
    """Whether it is done, fails or is late."""
    import processes

    code = PARENT.format(path=str(started), then=then)
    began = time.monotonic()
    assert processes.run_within([sys.executable, "-S", "-c", code], seconds) == why
    assert time.monotonic() - began < seconds + processes.PATIENCE
    pids = [int(pid) for pid in started.read_text().split()]
    assert len(pids) == 2
    assert not [pid for pid in pids if is_alive(pid)]


def test_a_command_started_by_another_ends_with_it(started):
    """As pytest's processes do with the part that runs it."""
    import processes

    code = PARENT.format(path=str(started), then="time.sleep(60)")
    folder = str(Path(processes.__file__).parent)
    outer = f"import sys; sys.path.insert(0, {folder!r}); import processes\n"
    outer += f"processes.run_within([sys.executable, '-S', '-c', {code!r}], 60)"
    assert processes.run_within([sys.executable, "-S", "-c", outer], 2) == "not done within 2 s"
    assert not [pid for pid in map(int, started.read_text().split()) if is_alive(pid)]


TESTS = """
import os
import signal
import time
import pytest

def test_good():
    pass

def test_bad():
    assert 1 == 2, "of course"

@pytest.fixture
def broken():
    yield
    raise RuntimeError("afterwards")

def test_of_a_broken_fixture(broken):
    pass

def test_skipped():
    pytest.skip("not here")

def test_that_is_ended():
    time.sleep(0.5)  # until it is known to have begun
    os.killpg(0, signal.SIGKILL)

def test_never():
    pass
"""


@pytest.mark.parametrize("workers", [[], ["-n", "1"]])
def test_what_tests_did_is_known_though_they_were_ended(tmp_path, workers):
    """With and without processes of their own."""
    import marked_tests

    if workers:
        pytest.importorskip("xdist")
    tests = tmp_path / "test_them.py"
    tests.write_text(TESTS)
    record, said = tmp_path / "record", tmp_path / "said"
    given = ["-p", "no:cacheprovider", "-c", "/dev/null", *workers, str(tests)]
    why = marked_tests.run_tests(given, 60, record, said)
    assert why == "ended with exit code -9", said.read_text()
    found = marked_tests.read_record(record)
    assert found.outcomes == {"passed": 1, "failed": 2, "skipped": 1, "not done": 2}
    bad, broken = found.failures.items()
    assert bad[0].endswith("::test_bad")
    assert "of course" in bad[1]
    assert broken[0].endswith("::test_of_a_broken_fixture")
    assert "afterwards" in broken[1]
    assert [test.rsplit("::")[-1] for test in found.unfinished] == ["test_that_is_ended"]


def test_no_plugin_is_needed_for_the_settings(tmp_path):
    """The project sets pytest-timeout's `timeout`, and refuses settings that nothing knows."""
    import marked_tests

    given = ["-p", "no:timeout", "-p", "no:xdist", "--co", "tests/kernels/test_merge.py"]
    chosen = [option for option in marked_tests.options(0) if option not in ("-n", "0")]
    said = tmp_path / "said"
    chosen = chosen[: chosen.index("--dist")] if "--dist" in chosen else chosen
    why = marked_tests.run_tests([*chosen, *given], 60, tmp_path / "record", said)
    assert why is None, said.read_text()
    assert marked_tests.read_record(tmp_path / "record").outcomes["not done"] > 0


def test_tests_of_a_gpu_are_found(tmp_path):
    import marked_tests

    found = marked_tests.files_marked_gpu()
    assert "tests/train/test_gpu.py" in found
    assert "tests/pipeline/caching/test_sampling.py" in found
    assert not [name for name in found if name.startswith("tests/kernels/")]
    (tmp_path / "tests" / "of").mkdir(parents=True)
    for name, text in {"a": "@pytest.mark.gpu", "b": "mark.gpu_like", "c": "[mark.gpu]"}.items():
        (tmp_path / "tests" / "of" / f"test_{name}.py").write_text(text)
    assert marked_tests.files_marked_gpu(tmp_path) == ["tests/of/test_a.py", "tests/of/test_c.py"]
