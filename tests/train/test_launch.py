"""What the environment says of several processes: torchrun's word, or one clear message."""

import pytest
import torch
import torch.distributed as dist

from rekindle.data.errors import InputError
from rekindle.train.distributed import join_world
from rekindle.train.launch import Launch, current_launch, is_one_of_many
from testlib.command import pipeline

WHOLE = {"RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


@pytest.fixture
def environment(monkeypatch):
    def put(**values):
        for name in ("WORLD_SIZE", *WHOLE):
            monkeypatch.delenv(name, raising=False)
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return put


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, Launch()),
        ({"WORLD_SIZE": "1"}, Launch()),
        ({"RANK": "3"}, Launch()),  # a scheduler's, of its own jobs
        ({"WORLD_SIZE": "2", **WHOLE}, Launch(1, 2, 1)),
    ],
)
def test_what_torchrun_says_is_believed(environment, values, expected):
    environment(**values)
    assert current_launch() == expected
    assert is_one_of_many() == (expected.world_size > 1)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"WORLD_SIZE": ""}, "WORLD_SIZE='', which is not a whole number of 1 or more"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE='two'"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE='0'"),
        ({"WORLD_SIZE": "-1"}, "WORLD_SIZE='-1'"),
        (
            {"WORLD_SIZE": "4"},
            "WORLD_SIZE=4, but no RANK, MASTER_ADDR, MASTER_PORT: this process was not",
        ),
        ({"WORLD_SIZE": "2", **WHOLE, "RANK": ""}, "WORLD_SIZE=2, but no RANK"),
        ({"WORLD_SIZE": "2", **WHOLE, "RANK": "x"}, "RANK='x'"),
        ({"WORLD_SIZE": "2", **WHOLE, "RANK": "2"}, "RANK=2 and WORLD_SIZE=2"),
        ({"WORLD_SIZE": "2", **WHOLE, "LOCAL_RANK": "-1"}, "LOCAL_RANK='-1'"),
    ],
)
def test_anything_else_is_refused_before_work(environment, tmp_path, values, words):
    environment(**values)
    with pytest.raises(InputError) as caught:
        current_launch()
    assert words in str(caught.value)
    assert not is_one_of_many()
    done = pipeline("train-student", tmp_path / "no.yaml", "--out", tmp_path / "run")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: the environment has ")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()
    assert pipeline("init", "--list").returncode == 0  # who trains nothing needs no torchrun


@pytest.mark.parametrize(
    ("values", "device"), [({"WORLD_SIZE": "2", "LOCAL_RANK": "1"}, 1), ({"LOCAL_RANK": "1"}, 1)]
)
def test_a_group_of_the_callers_own_is_used_with_its_local_rank(
    environment, tmp_path, monkeypatch, values, device
):
    environment(**values)
    chosen = []
    dist.init_process_group("gloo", f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    try:
        with monkeypatch.context() as patch:
            for name, answer in {"is_available": True, "device_count": 2}.items():
                patch.setattr(torch.cuda, name, lambda answer=answer: answer)
            patch.setattr(torch.cuda, "set_device", chosen.append)
            with join_world() as world:
                assert (world.rank, world.size, world.sum_device.type) == (0, 1, "cpu")
        assert chosen == [world.device] == [torch.device("cuda", device)]
        assert dist.is_initialized()
    finally:
        dist.destroy_process_group()
