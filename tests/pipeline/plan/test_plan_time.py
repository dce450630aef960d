"""How long a plan takes by a probe, when it breaks even, and how it is shown."""

import json
import math
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rekindle.data.counted import counted, shown_bytes
from rekindle.data.settings import parse_settings
from rekindle.pipeline.caching.cache_teachers import cache_teachers
from rekindle.pipeline.config import RunConfig
from rekindle.pipeline.plan import probe as plan_probe
from rekindle.pipeline.plan.break_even import active_steps
from rekindle.pipeline.plan.figures import BreakEven, CorpusPlan, RunPlan, TeacherWork, Totals
from rekindle.pipeline.plan.run import plan_run
from rekindle.pipeline.plan.scale import Scale
from rekindle.pipeline.plan.shared import Pass
from rekindle.pipeline.plan.text import format_plan, format_seconds
from testlib.stage_one.planned import NAMES, WHOLE, of


def test_a_slow_teacher_is_probed_on_one_sequence(tmp_path, configure, teachers, monkeypatch):
    seen: list[int] = []
    run = plan_probe._run

    def slow(teacher: Any, steps: Any, shard: int, beside: Any) -> Any:
        seen.append(shard)
        unit, result, _ = run(teacher, steps, shard, beside)
        return unit, result, 1.0  # a second per token

    monkeypatch.setattr(plan_probe, "_run", slow)
    found = plan_run(configure(tmp_path / "cache", teachers[3:4]))
    assert seen == [0]
    assert found.teachers[0].seconds == pytest.approx(found.corpus.tokens)


def test_a_probe_ends_when_it_is_good_enough(tmp_path, configure, teachers, monkeypatch):
    monkeypatch.setattr(plan_probe, "ENOUGH_SECONDS", 0.0)
    seen: list[int] = []
    run = plan_probe._run
    monkeypatch.setattr(plan_probe, "_run", lambda *a: seen.append(a[2]) or run(*a))
    plan_run(configure(tmp_path / "cache", teachers[3:4], corpus=WHOLE))
    assert seen == [0, 0, 1, 2]  # the warm-up, then 1, 4 and 16 sequences


def test_replicas_count_for_the_time(tmp_path, configure, teachers, monkeypatch):
    monkeypatch.setattr(plan_probe, "_run", _at_a_second_per_token(plan_probe._run))
    found = plan_run(configure(tmp_path, teachers[:2], cache={"replicas": 3}))
    assert of(found, "lm").seconds == pytest.approx(3 * found.corpus.tokens)
    assert of(found, "causal").seconds == pytest.approx(found.corpus.tokens)


def test_teachers_that_share_a_pass_divide_its_time(tmp_path, configure, teachers, monkeypatch):
    """Together they cost what one costs; what one alone has to make is its own."""
    monkeypatch.setattr(plan_probe, "_run", _at_a_second_per_token(plan_probe._run))
    causal = teachers[1]
    drawn = causal | {"name": "drawn", "targets": {"kind": "random", "k": 8}}
    found = plan_run(configure(tmp_path / "cache", [*teachers[:2], drawn]))
    tokens = found.corpus.tokens
    assert [t.shares for t in found.teachers] == [(), ("drawn",), ("causal",)]
    assert of(found, "lm").seconds == pytest.approx(2 * tokens)
    for name in ("causal", "drawn"):
        assert of(found, name).seconds == pytest.approx(tokens / 2)
        assert of(found, name).seconds_per_token == pytest.approx(1 / 2)
    assert found.totals.seconds == pytest.approx(3 * tokens)
    assert "causal, drawn: one forward pass for all of them; its time" in format_plan(found)
    alone = configure(tmp_path / "cache", [causal])
    assert of(plan_run(alone), "causal").bytes == of(found, "causal").bytes
    cache_teachers(alone)
    after = plan_run(configure(tmp_path / "cache", [causal, drawn]))
    assert [t.shares for t in after.teachers] == [(), ()]
    assert [t.seconds for t in after.teachers] == pytest.approx([0, tokens])


def test_a_token_is_divided_among_those_it_is_shown_to():
    names = ("a", "b", "c")
    group = tuple(SimpleNamespace(info=SimpleNamespace(name=name)) for name in names)
    one = Pass(group, {"a": 10.0, "b": 4.0, "c": 10.0})
    found = [one.seconds(name, 2.0) for name in names]
    assert found == pytest.approx([8 + 18, 8, 8 + 18])  # 4 tokens at 6 s of three, 6 of two
    assert sum(found) == pytest.approx(10 * 6.0)


def _at_a_second_per_token(run: Any) -> Any:
    return lambda *arguments: (*run(*arguments)[:2], 1.0)


# --- break-even -----------------------------------------------------------------------------------


def student(config: RunConfig, **train: Any) -> RunConfig:
    values = config.model_dump(mode="json", by_alias=True)
    values |= {"student": {"model": "unused"}, "train": train}
    return parse_settings(RunConfig, values)


def test_break_even_counts_forward_passes(tmp_path, configure, teachers):
    """12 sequences in 2 replicas against 3 steps of 4: two runs; of sequences once, one."""
    terms = [{"teachers": ["lm"]}, {"teachers": ["classes"]}]
    lm = {"distill": terms[:1]}
    config = student(
        configure(tmp_path, [*teachers[:2], teachers[3]]),
        steps=3,
        batch_sequences=4,
        objective={"distill": terms},
    )
    found = plan_run(config, probe=False).break_even
    assert found.teachers == {"lm": 2, "causal": None, "classes": 1}
    assert found.runs == math.ceil((24 + 12) / (12 + 12))
    assert "after 2 student runs" in found.sentence
    assert "36 teacher forward passes, each of one sequence" in found.sentence
    assert "24." in found.sentence
    assert "runs of 3 steps with 4 sequences each" in found.assumes
    assert "1 times the corpus" in found.assumes
    short = student(configure(tmp_path, teachers[:1]), steps=1, batch_sequences=3, objective=lm)
    told = plan_run(short, probe=False).break_even.assumes
    assert "25 % of the corpus" in told
    assert told.endswith("Runs that read the whole corpus once break even after 2.")
    text = plan_run(short, probe=False, scale=Scale(texts=10**9)).break_even.assumes
    assert "train.steps is the same at any size of the corpus" in text
    longer = student(configure(tmp_path, teachers[:1]), epochs=2, batch_sequences=5, objective=lm)
    told = plan_run(longer, probe=False).break_even.assumes
    assert "runs of 2 epochs = 5 steps with 5 sequences each (train.epochs, batch_seq" in told
    assert "with lm, classes run beside the student" in found.assumes
    assert "weighed alike: not all were timed" in found.assumes


def test_break_even_weighs_teachers_by_their_time(tmp_path, configure, teachers, monkeypatch):
    def run(teacher: Any, *more: Any) -> Any:
        return (*original(teacher, *more)[:2], 100.0 if teacher.info.name == "lm" else 1.0)

    original = plan_probe._run
    monkeypatch.setattr(plan_probe, "_run", run)
    terms = [{"teachers": ["lm"]}, {"teachers": ["classes"]}]
    made_of = {"steps": 1, "batch_sequences": 12, "objective": {"distill": terms}}
    wide = {"replicas": 9}
    config = student(configure(tmp_path, [teachers[0], teachers[3]], cache=wide), **made_of)
    assert plan_run(config, probe=False).break_even.runs == 5  # (9 + 1) / 2
    timed = plan_run(config).break_even
    assert timed.runs == 9  # 901 / 101
    assert "weighed by the time measured here" in timed.assumes


@given(
    steps=st.integers(1, 50),
    fraction=st.floats(0.01, 1),
    start=st.sampled_from([0.0, 1.0]),
    end=st.sampled_from([0.0, 0.5]),
    shape=st.sampled_from(["constant", "linear", "step", "cosine"]),
)
def test_steps_without_weight_cost_no_live_teacher(steps, fraction, start, end, shape):
    from rekindle.train.config import TrainConfig
    from rekindle.train.objective.objective import Objective

    weight = {"schedule": shape, "from": start, "to": end, "over": fraction}
    values = {"steps": steps, "objective": {"distill": [{"teachers": ["a"], "weight": weight}]}}
    train = parse_settings(TrainConfig, values)
    objective = Objective.__new__(Objective)
    objective.config, objective.steps, objective.methods = train.objective, steps, ()
    expected = sum("a" in objective.plan(step).teachers for step in range(steps))
    assert active_steps(train, "a") == expected
    assert active_steps(train, "b") == 0


def test_break_even_needs_a_student_that_uses_teachers(tmp_path, configure, teachers):
    config = configure(tmp_path, teachers[:1])
    assert plan_run(config, probe=False).break_even.runs is None
    found = plan_run(student(config), probe=False).break_even
    assert (found.runs, found.teachers) == (None, {"lm": None})
    assert "uses none" in found.sentence
    for named in ({}, {"teacher": "lm"}):
        methods = [{"method": "replaced_tokens", "weight": {"over": 0.5}} | named]
        using = student(config, steps=4, batch_sequences=12, objective={"methods": methods})
        assert plan_run(using, probe=False).break_even.teachers["lm"] is not None
    assert active_steps(using.train, "lm", using.train.objective.methods) == 2
    weightless = {"distill": [{"teachers": ["lm"], "weight": 0.0}]}
    found = plan_run(student(config, objective=weightless), probe=False).break_even
    assert found.runs is None


@pytest.mark.parametrize("when", ["plain", "probed", "after"])
def test_text_and_json(made, when):
    found = made[when]
    values = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert [t["name"] for t in values["teachers"]] == list(NAMES)
    assert values["corpus"]["sequences"] == found.corpus.sequences
    text = format_plan(found)
    assert all(len(line) <= 80 for line in text.splitlines())
    assert all(name in text for name in NAMES)


def test_what_is_too_long_is_wrapped():
    names = [letter * 90 for letter in "wxyz"]
    wide = tuple(TeacherWork(name, "masked_lm", "top 64", positions=12) for name in names)
    plan = RunPlan(
        cache="cache",
        corpus=CorpusPlan(("text",), None, None, False, "nobody has counted " * 9, None),
        views=(),
        teachers=wide,
        break_even=BreakEven(None, {}, "No student is trained."),
        totals=Totals(None, None, (), None, None),
        warnings=("the first line\nthe second",),
        to_make=(),
    )
    lines = format_plan(plan).splitlines()
    assert all(len(line) <= 80 for line in lines)
    for name in names:
        assert sum(line.count(name[0]) for line in lines) >= len(name)
    assert lines[:2] == ["warning: the first line", "the second"]


@given(st.integers(0, 10**16))
def test_bytes_are_shown_to_three_digits(size):
    value, unit = shown_bytes(size).split()
    power = {"byte": 1, "bytes": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}[unit]
    assert float(value.replace(",", "")) * power == pytest.approx(size, rel=0.051)
    assert unit == "TB" or float(value.replace(",", "")) < 1000


@given(st.floats(0, 1e8))
def test_seconds_are_shown_in_the_unit_that_fits(seconds):
    shown = format_seconds(seconds)
    if shown == "under a second":
        assert seconds < 1
        return
    value, unit = shown.split()
    size = {"second": 1, "minute": 60, "hour": 3600, "day": 86_400}[unit.removesuffix("s")]
    assert float(value.replace(",", "")) * size == pytest.approx(seconds, abs=0.51 * size, rel=0.06)
    assert (float(value.replace(",", "")) == 1) == (not unit.endswith("s"))


def test_one_is_singular():
    assert (counted(1, "unit"), counted(0, "unit"), counted(1200, "unit")) == (
        "1 unit",
        "0 units",
        "1,200 units",
    )
    assert shown_bytes(1) == "1 byte"
    assert shown_bytes(1_500_000_000) == "1.5 GB"
    assert format_seconds(1) == "1 second"
    assert format_seconds(5400) == "1.5 hours"
    assert format_seconds(150) == "2.5 minutes"
