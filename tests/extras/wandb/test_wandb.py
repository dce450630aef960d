"""``train.report_to: wandb``, offline: what its own files hold is what the run's record says."""

import json
import struct

import pytest

from rekindle.data.errors import InputError
from rekindle.train.record.run_log import read_metrics
from testlib.loop import stop_at, train_config

TERM = [{"teachers": ["big"], "weight": 0.5}]
BLOCK, FILE_HEADER, HEADER = 32768, 7, 7  # bytes, of LevelDB's log format
FIRST, LAST, FULL = 2, 4, 1


def records_in(file):
    """The records of an offline run's file: LevelDB's log format over protobuf."""
    from wandb.proto import wandb_internal_pb2

    content, at, parts, found = file.read_bytes(), FILE_HEADER, b"", []
    while at + HEADER <= len(content):
        if BLOCK - at % BLOCK < HEADER:
            at += BLOCK - at % BLOCK
            continue
        _, size, kind = struct.unpack_from("<IHB", content, at)
        data = content[at + HEADER : at + HEADER + size]
        at += HEADER + size
        parts = data if kind in (FULL, FIRST) else parts + data
        if kind in (FULL, LAST):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            found.append(record)
    return found


def sent(out):
    """Each offline part of the run: its id, its settings, its numbers by name and step."""
    parts = []
    for file in sorted(out.glob("wandb/offline-run-*/*.wandb")):
        about, settings, numbers = None, {}, {}
        for record in records_in(file):
            if record.HasField("run"):
                about = record.run.run_id, record.run.display_name, record.run.project
                settings = {one.key: json.loads(one.value_json) for one in record.run.config.update}
            if record.HasField("history"):
                row = {
                    "/".join(one.nested_key) or one.key: json.loads(one.value_json)
                    for one in record.history.item
                }
                step = row["_step"]
                for name, value in row.items():
                    if name[0] != "_":
                        assert (name, step) not in numbers
                        numbers[name, step] = value
        parts.append((about, settings, numbers))
    return parts


def test_a_run_that_was_interrupted_is_one_run(short_run, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    out = tmp_path / "a run"
    config = train_config(TERM, report_to=["wandb"])
    with pytest.raises(KeyboardInterrupt):
        short_run(out, config, report=stop_at(6))
    short_run(out, config, resume=True)
    (about, settings, before), (again, _, after) = sent(out)
    assert about == again
    assert about[1:] == ("a run", "rekindle")
    assert settings["train"]["learning_rate"] == 0.001
    here = {
        (f"{record['kind']}/{name}", record["step"]): value
        for record in read_metrics(out)
        for name, value in record.items()
        if name not in ("kind", "step")
    }
    assert {step for _, step in before} == set(range(1, 7))
    assert {step for _, step in after} == set(range(6, 11))
    there = before | after
    assert there.keys() == here.keys()
    for key, value in here.items():
        assert there[key] == pytest.approx(value, rel=1e-8), key


def test_nothing_of_the_machine_but_numbers_and_settings_is_kept(short_run, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    out = tmp_path / "out"
    short_run(out, train_config(steps=2, report_to=["wandb"]))
    names = {file.name for file in out.glob("wandb/offline-run-*/files/**/*") if file.is_file()}
    assert not names & {"output.log", "diff.patch"}
    assert not any(name.endswith(".py") for name in names)


def test_nobody_logged_in_is_said_before_anything_is_made(short_run, tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    with pytest.raises(InputError, match=r"wandb login.*WANDB_MODE=offline"):
        short_run(tmp_path / "out", train_config(report_to=["wandb"]))
    assert not (tmp_path / "out").exists()
