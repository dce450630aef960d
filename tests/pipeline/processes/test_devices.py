"""Where processes work: devices shared in turn, threads divided."""

import pytest
import torch

from rekindle.pipeline.processes import worker as places
from rekindle.pipeline.processes.worker import Place, places_for


def test_devices_are_those_that_are_visible(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert places.visible_devices() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,3")
    assert places.visible_devices() == ["5", "3"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert places.visible_devices() == []


@pytest.mark.parametrize(
    ("devices", "workers", "expected"),
    [
        ([], 2, [Place(None, 4), Place(None, 4)]),
        ([], 3, [Place(None, 2)] * 3),
        ([], 20, [Place(None, 1)] * 20),
        (["5", "3"], 3, [Place("5", 2), Place("3", 2), Place("5", 2)]),
    ],
)
def test_devices_are_shared_in_turn_and_threads_divided(monkeypatch, devices, workers, expected):
    monkeypatch.setattr(places, "visible_devices", lambda: devices)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    assert places_for(workers) == expected
