"""``train.report_to: mlflow`` by the real client on an SQLite file: the numbers of the record."""

import pytest

from rekindle.data.errors import InputError
from rekindle.train.record.run_log import RunLog, read_metrics
from testlib.loop import stop_at, train_config

TERM = [{"teachers": ["big"], "weight": 0.5}]


@pytest.fixture
def client(tmp_path, monkeypatch):
    from mlflow import MlflowClient

    place = f"sqlite:///{tmp_path}/runs.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", place)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "of the tests")
    return MlflowClient(place)


def runs_of(client):
    experiment = client.get_experiment_by_name("of the tests")
    return client.search_runs([experiment.experiment_id])


def history(client, one):
    """Every value by name and step; each step of a name once."""
    found = {}
    for name in one.data.metrics:
        for metric in client.get_metric_history(one.info.run_id, name):
            assert (name, metric.step) not in found
            found[name, metric.step] = metric.value
    return found


def recorded(out):
    return {
        (f"{record['kind']}/{name}".replace("+", "_"), record["step"]): value
        for record in read_metrics(out)
        for name, value in record.items()
        if name not in ("kind", "step")
    }


def test_a_run_that_was_interrupted_is_one_run_with_each_number_once(short_run, tmp_path, client):
    out = tmp_path / "a run"
    config = train_config(TERM, report_to="mlflow")
    with pytest.raises(KeyboardInterrupt):  # in step 7; the last checkpoint is that of 5, the best
        short_run(out, config, report=stop_at(6))
    [one] = runs_of(client)
    assert one.info.status == "KILLED"
    assert one.info.run_name == "a run"
    short_run(out, config, resume=True)
    [one] = runs_of(client)
    assert one.info.status == "FINISHED"
    assert one.data.params["train.learning_rate"] == "0.001"
    there, here = history(client, one), recorded(out)
    assert there.keys() == here.keys()
    timed = ("seconds", "data_wait", "per_second")  # of what was done twice, by another clock
    same = {key: value for key, value in here.items() if not key[0].endswith(timed)}
    assert {key: there[key] for key in same} == pytest.approx(same, rel=1e-8)
    assert not (out / "tensorboard").exists()


def test_a_server_that_goes_away_stops_no_run(tmp_path, client, caplog):
    with RunLog(tmp_path, 0, report_to=["mlflow"]) as log:
        log.write("train", 1, {"loss": 1.0})
        log._trackers._trackers["mlflow"]._client = None
        log.sync()
        log.write("train", 2, {"loss": 0.5})
    assert [one["loss"] for one in read_metrics(tmp_path)] == [1.0, 0.5]
    assert caplog.text.count("mlflow accepts no more") == 1


def test_a_run_that_the_server_has_lost_is_a_new_one(tmp_path, client, caplog):
    for first in (0, 1):
        with RunLog(tmp_path, first, report_to=["mlflow"]) as log:
            log.write("train", first + 1, {"loss": 1.0})
        [one] = runs_of(client)
        client.delete_run(one.info.run_id) if first == 0 else None
    assert len(caplog.records) == 1
    assert "a new one is made" in caplog.text


def test_a_server_that_is_not_there_is_said_before_anything_is_trained(
    short_run, tmp_path, monkeypatch
):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(InputError, match=r"report_to.*mlflow.*127\.0\.0\.1:9"):
        short_run(tmp_path / "out", train_config(TERM, report_to=["mlflow"]))
    assert not (tmp_path / "out" / "checkpoints").exists()
