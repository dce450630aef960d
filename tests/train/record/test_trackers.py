"""Who is told a run's numbers; what MLflow and Weights & Biases do is in tests/extras."""

import pytest

from rekindle.data.errors import InputError
from rekindle.train.record import trackers
from rekindle.train.record.run_log import RunLog, read_metrics
from rekindle.train.record.trackers import check_trackers


def test_nobody_need_be_told(tmp_path):
    with RunLog(tmp_path, 0, report_to=()) as log:
        log.write("train", 1, {"loss": 0.5})
        log.sync()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow"])
def test_a_missing_package_is_named_with_the_way_out(name, monkeypatch):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda asked: None)
    with pytest.raises(InputError, match=rf"report_to has {name}.*pip install.*leave {name} out"):
        check_trackers([name])


def test_each_is_told_how_the_run_ended(tmp_path, monkeypatch):
    ended = []

    class Listening:
        def __init__(self, run, first, settings):
            assert (run, first, settings) == (tmp_path, 3, {"train": {"steps": 5}})

        def write(self, values, step):
            ended.append((values, step))

        def close(self, finished):
            ended.append(finished)

    monkeypatch.setitem(trackers._TRACKERS, "wandb", Listening)
    for error in (None, KeyboardInterrupt):
        try:
            with RunLog(tmp_path, 3, report_to=["wandb"], settings={"train": {"steps": 5}}) as log:
                log.write("train", 4, {"loss": 0.5})
                if error:
                    raise error
        except KeyboardInterrupt:
            pass
    assert ended == [({"train/loss": 0.5}, 4), True, ({"train/loss": 0.5}, 4), False]
    assert [one["step"] for one in read_metrics(tmp_path)] == [4]
