"""What the parts of the GPU's measurements compute, and that each runs on any machine."""

import time
from pathlib import Path

import pytest
import torch


@pytest.mark.parametrize("late", [0, 1])
def test_a_step_costs_the_same_however_late_it_is_reported(monkeypatch, late):
    """A device that takes 2 s a step and a host that gives it the next one at once."""
    import train_variants
    from train_setup import Bench

    given, now = 0, 0.0

    def wait() -> None:
        nonlocal now
        now = max(now, 2.0 * given)

    monkeypatch.setattr(train_variants.time, "perf_counter", lambda: now)
    monkeypatch.setattr(train_variants, "peak_memory", lambda _: 7)
    monkeypatch.setattr(torch.cuda, "synchronize", wait)
    window = train_variants.Window(Bench(Path(), 9, 3, 1, 1, torch.device("cuda")))
    for given in range(1, 10):
        if given > late:
            window(given - late)
    for done in range(given - late + 1, given + 1):  # the loop ends: the rest at once
        window(done)
    assert window.segment() == (2.0, pytest.approx(float("nan"), nan_ok=True), 7)


def test_busy_is_what_spans_cover_together():
    import training

    spans = [(0, 10), (15, 40), (30, 50), (35, 36), (80, 100)]  # the first tenth is left out
    assert training.busy(spans) == (pytest.approx((35 + 20) / 90), 0.03)
    with pytest.raises(RuntimeError, match="nothing run"):
        training.busy([])


def test_what_spans_pauses_is_not_busy():
    import training

    kinds = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=kinds) as profiler, torch.profiler.record_function("a"):
        torch.ones(3)
        time.sleep(0.05)
    spans = [*training.spans_on(torch.autograd.DeviceType.CPU, profiler.events())]
    assert spans
    assert max(end - start for start, end in spans) < 50_000


def test_a_part_without_time_begins_nothing_more(monkeypatch, tmp_path):
    """Each run's rows are there when it ends; only repetitions are left out."""
    import training

    began = []

    def run(name, bench):
        began.append(name)
        return training.Segment(2.0 + len(began), 0.0, 5)

    monkeypatch.setattr(training, "run", run)
    monkeypatch.setattr(training, "prepare", lambda *_: None)
    monkeypatch.setattr(training, "profiled", lambda _: (0.9, 0.1))
    monkeypatch.setattr(training, "no_trainer", lambda: None)
    rows = []
    training.measure(True, rows.append, lambda: 0.0)
    assert began == [*training.OURS, training.TRAINER, training.BARE]
    ratios = {provider: value for _, provider, metric, value, _ in rows if metric[:4] == "time"}
    assert ratios == {n: pytest.approx((3 + i) / 3) for i, n in enumerate(began)}
    training.measure(True, rows.append, lambda: 100.0)
    assert began[5:] == [*began[:5], *training.OURS]


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are not interpreted")
def test_shapes_of_the_row_kernel_are_measured_while_there_is_time():
    pytest.importorskip("triton")
    import losses

    rows, seconds = [], iter([9.0, 0.0])
    shapes = ((2, 2049, 8), (2, 5000, 8))
    losses.measure_shapes(shapes, 4, 1, "cpu", rows.append, lambda: next(seconds))
    assert {case for case, *_ in rows} == {"row kernel N=2 V=2049 k=4 tau=1"}
    measured = {provider for _, provider, *_ in rows}
    assert {"rekindle copy", "rekindle table", "rekindle streamed 4096x8 stages 3"} <= measured
    assert not [name for name in measured if "stages 1" in name]
