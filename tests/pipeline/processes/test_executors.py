"""What stage 1 says of units that others have made, and what it asks of other machines."""

import sys
from typing import ClassVar

import pytest

from rekindle.data.errors import InputError
from rekindle.data.storage.shards import ShardSet
from rekindle.data.storage.store import open_store
from rekindle.pipeline.caching import cache_teachers as stage_one
from rekindle.pipeline.caching.cache_teachers import StageOne, cache_teachers
from rekindle.pipeline.processes.units import OnThisMachine
from testlib.command import pipeline


class Doing:
    """An executor that first does something else."""

    on_other_machines: ClassVar[bool] = False

    def __init__(self, act):
        self.act = act

    def run(self, work, report):
        self.act(report)
        self.work = work
        OnThisMachine().run(work, report)

    def in_order(self, name, load, units):
        return OnThisMachine().in_order(name, load, units)


@pytest.fixture
def one(make_teacher):
    return [make_teacher("lm", "causal_lm", targets={"kind": "topk", "k": 4})]


def test_units_that_another_process_made_meanwhile_are_not_ones_own(tmp_path, configure, one):
    config = configure(tmp_path, one)
    found = cache_teachers(config, executor=Doing(lambda report: cache_teachers(config)))
    assert found == StageOne(12, 0, 0, units_of_others=3)
    assert "0 units made, 0 were there" in found.as_text()
    assert found.as_text().endswith(", 3 were made by other processes meanwhile")


def test_a_machine_that_writes_elsewhere_is_found_out(tmp_path, configure, one, monkeypatch):
    monkeypatch.setattr(stage_one, "ARRIVES_WITHIN", 0.0)
    cache_teachers(configure(tmp_path / "there", one))
    there = ShardSet(open_store(tmp_path / "there"), "targets/lm").committed()
    executor = Doing(lambda report: report({"lm": next(iter(there.values()))}))
    executor.on_other_machines = True  # type: ignore[misc]
    with pytest.raises(InputError, match="is not shared with the node"):
        cache_teachers(configure(tmp_path / "here", one), executor=executor)


def test_a_machine_that_finds_its_units_made_elsewhere_is_found_out(
    tmp_path, configure, one, monkeypatch
):
    """In a copy of the cache of its own: it has nothing to report, and nothing arrives here."""
    monkeypatch.setattr(stage_one, "ARRIVES_WITHIN", 0.0)
    executor = Doing(lambda report: None)
    monkeypatch.setattr(executor, "on_other_machines", True)
    monkeypatch.setattr(executor, "run", lambda work, report: None)
    with pytest.raises(InputError, match="a node has made unit 00000 of targets/lm, or found it"):
        cache_teachers(configure(tmp_path, one), executor=executor)


def test_what_teachers_need_of_a_cluster_is_the_most_of_those_that_share_a_pass(
    tmp_path, configure, one
):
    needs = {"num_cpus": 2, "memory_gb": 3, "custom": {"big": 1}}
    hidden = one[0] | {"name": "hidden", "targets": {"kind": "hidden"}, "resources": needs}
    gpu = one[0] | {"resources": {"num_gpus": 0.5, "unit_minutes": 2}}
    executor = Doing(lambda report: None)
    cache_teachers(configure(tmp_path, [gpu, hidden]), executor=executor)
    asked = {"num_cpus": 2.0, "num_gpus": 0.5, "memory": 3e9, "big": 1.0}
    assert executor.work.needs == asked
    assert executor.work.time_limits == {"unit": 120.0}


def test_the_command_says_what_it_lacks(tmp_path, configure, one, monkeypatch):
    run = tmp_path / "run.json"
    run.write_text(configure(tmp_path / "cache", one).model_dump_json(exclude_unset=True))
    done = pipeline("cache-teachers", run, "--address", "10.0.0.1:6379")
    assert (done.returncode, "give --executor ray, too" in done.stderr) == (2, True)
    monkeypatch.setitem(sys.modules, "ray", None)
    done = pipeline("cache-teachers", run, "--executor", "ray")
    assert (done.returncode, "pip install -e '.[ray]'" in done.stderr) == (2, True)
    assert not (tmp_path / "cache").exists()
