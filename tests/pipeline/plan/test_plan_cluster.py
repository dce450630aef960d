"""What a cache costs on many machines follows from the plan and from what is assumed."""

import json
import math
from pathlib import Path

import pytest

from rekindle.data.errors import InputError
from rekindle.pipeline.config import dump_config
from rekindle.pipeline.plan.cluster import Assumptions, cluster_lines, on_nodes, parse_assumptions
from rekindle.pipeline.plan.figures import (
    BreakEven,
    CorpusPlan,
    RunPlan,
    TeacherWork,
    Totals,
    ViewPlan,
)

TOKENS, SEQUENCES, SIZE = 10**12, 7_812_500_000, 4096
SHARDS = math.ceil(SEQUENCES / SIZE)


def planned(*teachers, **corpus):
    known = {"sequences": SEQUENCES, "tokens": TOKENS, "sequences_per_shard": SIZE} | corpus
    about = CorpusPlan(("text",), estimated=True, basis="said", bytes=10, **known)
    view = ViewPlan("masked-0", 4 * SHARDS, 0, 10)
    totals = Totals(5 * 10**13, None, (), None, None)
    none = BreakEven(None, {}, "")
    return RunPlan("s3://x", about, (view,), teachers, none, totals, (), ())


def work(name="lm", **changes):
    return TeacherWork(name, "masked_lm", units_to_make=4 * SHARDS, units_present=0, **changes)


def test_the_figures_are_those_of_hand_arithmetic():
    assume = Assumptions(tokens_per_second=100_000, gpu_hour=2.0)
    found = on_nodes(planned(work(replicas=4), work("b", replicas=4, share=0.5)), 64, assume)
    assert found.units == 13 * SHARDS  # corpus, four masked replicas of it, two teachers on these
    assert found.objects == found.writes == 26 * SHARDS
    hours = (4 * TOKENS + 2 * TOKENS) / 100_000 / 3600
    assert found.gpu_hours == pytest.approx(hours)
    assert found.gpu_dollars == pytest.approx(2 * hours)
    assert found.seconds == pytest.approx(3600 * hours / 512, rel=1e-3)
    assert found.seconds >= 3600 * hours / 512  # the last units leave some GPUs idle
    assert found.bytes_per_second * 64 * found.seconds == pytest.approx(5e13)
    assert found.writes_per_second * found.seconds == pytest.approx(26 * SHARDS)
    assert found.listings == math.ceil(SHARDS / 1000) + 3 * math.ceil(4 * SHARDS / 1000)
    assert found.month_dollars == pytest.approx(5e13 / 1e9 * 0.023)
    assert found.write_dollars == pytest.approx(26 * SHARDS * 5e-6)
    assert found.open_seconds > found.listings * 0.1


def test_few_units_leave_most_machines_idle():
    one = TeacherWork("lm", "causal_lm", units_to_make=10, units_present=0)
    few = planned(one, sequences=10 * SIZE, tokens=10**6)
    found = on_nodes(few, 64, Assumptions(tokens_per_second=1000))
    assert found.seconds == pytest.approx(10**6 / 10 / 1000)  # one unit each, of ten


def test_teachers_that_share_their_passes_share_their_time():
    together = (work(shares=("b",)), work("b", shares=("lm",)))
    assume = Assumptions(tokens_per_second=1000)
    apart = on_nodes(planned(work()), 1, assume)
    assert on_nodes(planned(*together), 1, assume).gpu_hours == pytest.approx(apart.gpu_hours)


def test_too_many_files_are_told_with_what_would_do():
    found = on_nodes(planned(work()), 64, Assumptions())
    size = int(found.advice.split("sequences_per_shard: ")[1].split()[0])
    assert size % SIZE == 0
    assert 100_000 < found.units * SIZE / size <= 250_000
    assert "GPU hours are not known: --assume tokens_per_second" in cluster_lines(found)[0]
    assert found.gpu_hours is None is found.seconds


def test_what_is_measured_here_counts_where_nothing_is_assumed():
    found = on_nodes(planned(work(seconds=7200.0)), 2, Assumptions(gpus_per_node=1))
    assert found.gpu_hours == 2.0
    assert "as fast as this process" in cluster_lines(found)[0]
    assert on_nodes(planned(work(seconds=7200.0), work("b")), 2, Assumptions()).gpu_hours is None


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("gpu_hours=2", "gpu_hour"),
        ("gpu_hour=-1", "greater than or equal to 0"),
        ("gpu_hour", "takes KEY=VALUE"),
        ("gpus_per_node=0", "greater than 0"),
    ],
)
def test_a_wrong_assumption_is_told(given, told):
    with pytest.raises(InputError, match=told):
        parse_assumptions([given])
    assert parse_assumptions(["gpu_hour=4", "tokens_per_second=2e5"]).tokens_per_second == 2e5


def test_an_unknown_corpus_is_told():
    with pytest.raises(InputError, match="the corpus is not known; said"):
        on_nodes(planned(sequences=None), 2, Assumptions())


def test_a_cache_that_has_all_takes_no_time_and_no_requests():
    done = work(seconds=0.0)
    said = cluster_lines(on_nodes(planned(done), 2, Assumptions()))[0]
    assert "0 GPU hours" in said
    assert "requests/s" not in said


def test_the_command(tmp_path, configure, teachers, command):
    run = tmp_path / "run.yaml"
    run.write_text(dump_config(configure(Path("runs/cache"), teachers[3:4])))
    asked = ("plan", run, "--no-probe", "--tokens", "1e12", "--nodes", "64")
    code, said, errors = command(*asked, "--assume", "tokens_per_second=1e5")
    assert code == 0, errors
    assert "on 64 nodes of 8 GPUs: " in said
    assert "GPU hours" in said
    assert max(map(len, said.splitlines())) <= 80
    code, said, _ = command(*asked, "--json")
    assert json.loads(said)["cluster"]["gpu_hours"] is None
    assert command("plan", run, "--assume", "gpu_hour=1")[0] == 2
