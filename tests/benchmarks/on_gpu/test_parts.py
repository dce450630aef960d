"""What the parts of the GPU's measurements compute, and that each runs on any machine."""

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
