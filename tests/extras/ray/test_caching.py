"""Stage 1 on a real cluster: the bytes of a run on this machine, whatever is killed."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from rekindle.data.source import parts
from rekindle.pipeline.caching.cache_teachers import cache_teachers
from rekindle.pipeline.config import RunConfig
from rekindle.pipeline.processes.on_ray import on_ray
from testlib.caches import committed
from testlib.processes import until

pytestmark = [pytest.mark.usefixtures("quick"), pytest.mark.timeout(600)]


@pytest.fixture
def stable(make_teacher):
    """Masks; dropout, which is drawn by unit; a matrix beside the targets, and a shared pass."""
    lm = make_teacher("lm", "causal_lm", targets={"kind": "topk", "k": 8})
    return [
        lm | {"resources": {"num_cpus": 0.5}},
        lm | {"name": "hidden", "targets": {"kind": "hidden"}},
        make_teacher("masked", "masked_lm", targets={"kind": "threshold", "k": 8}),
        make_teacher("mc", "sequence_classification", monte_carlo={"passes": 2}),
    ]


def test_its_bytes_are_those_of_a_local_run(tmp_path, cluster, nodes, configure, stable):
    nodes()
    nodes()
    here = cache_teachers(configure(tmp_path / "here", stable))
    with on_ray(cluster.address, None) as executor:
        there = cache_teachers(configure(tmp_path / "there", stable), executor=executor)
        again = cache_teachers(configure(tmp_path / "there", stable), executor=executor)
    assert there == here
    assert committed(tmp_path / "there") == committed(tmp_path / "here")
    assert (again.units_done, again.units_present) == (0, here.units_done)


def test_the_bytes_of_a_corpus_are_those_of_this_machine(
    tmp_path, cluster, nodes, configure, monkeypatch
):
    """Parts of some documents, none of which is read or tokenised here."""
    monkeypatch.setattr(parts, "PART_BYTES", 200)
    monkeypatch.delattr("rekindle.pipeline.processes.on_ray.in_threads")
    nodes()
    nodes()
    chosen = {"packing": "contiguous", "limit_sequences": None}
    cache_teachers(configure(tmp_path / "here", [], chosen))
    with on_ray(cluster.address, None) as executor:
        cache_teachers(configure(tmp_path / "there", [], chosen), executor=executor)
    assert committed(tmp_path / "there") == committed(tmp_path / "here")


@pytest.fixture
def many(configure, stable) -> Callable[[Path], RunConfig]:
    """many(cache) -> a run of a teacher with many small units."""
    small = {"limit_sequences": 12}, {"sequences_per_shard": 1}
    return lambda cache: configure(cache, [stable[2]], *small)


@pytest.fixture
def started(tmp_path, cluster, many) -> Callable[[Path], subprocess.Popen[str]]:
    """started(cache) -> the command at work on the cluster."""

    def start(cache: Path) -> subprocess.Popen[str]:
        config = many(cache)
        run = tmp_path / f"{cache.name}.json"
        run.write_text(config.model_dump_json(exclude_unset=True))
        command = [sys.executable, "-m", "rekindle.pipeline.cli", "cache-teachers", str(run)]
        command += ["--executor", "ray", "--address", cluster.address]
        return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    return start


def units(cache: Path) -> set[str]:
    return {str(path.relative_to(cache)) for path in cache.glob("targets/**/commits/[0-9]*.json")}


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL])
def test_a_driver_that_ends_goes_on_by_the_same_command(tmp_path, nodes, many, started, end):
    """Its actors end with it, in seconds; what they had committed stays."""
    nodes()
    cache = tmp_path / "there"
    first = started(cache)
    assert until(lambda: len(units(cache)) >= 2 or first.poll() is not None, 120)
    first.send_signal(end)
    began = time.monotonic()
    _, said = first.communicate(timeout=60)
    assert first.returncode == (130 if end == signal.SIGINT else -signal.SIGKILL), said
    assert time.monotonic() - began < 15
    kept = units(cache)
    if end == signal.SIGINT:
        assert "To go on: pipeline cache-teachers" in said
        assert "--executor ray --address" in said
    second = started(cache)
    out, said = second.communicate(timeout=200)
    assert second.returncode == 0, said
    assert f"{len(units(cache)) - len(kept)} units made" in out
    cache_teachers(many(tmp_path / "here"))
    assert committed(cache) == committed(tmp_path / "here")
