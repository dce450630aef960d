"""What predictions never replace, by --force or not."""

import json
import os
import shutil

import pytest

from rekindle.data.errors import InputError
from rekindle.train.answers.evaluate import evaluate_file
from rekindle.train.answers.predict import predict_file
from rekindle.train.answers.target import check_target
from testlib.answers.judges import lines, write


@pytest.mark.parametrize("ask", [evaluate_file, predict_file])
@pytest.mark.parametrize("name", ["x.csv", "x.TSV", "x.txt", "x.parquet", "x.xlsx", "x.jsonl.gz"])
def test_a_name_of_another_kind_of_file_is_refused(tmp_path, experts, task, ask, name):
    with pytest.raises(InputError, match=r"JSON lines.*: give a name that ends in .jsonl"):
        ask(experts[0], task, out=str(tmp_path / name))
    check_target(str(tmp_path / "x.json"), task, experts[0], force=False)


def test_evaluate_writes_no_file_that_is_called_as_stdout(experts, task):
    with pytest.raises(InputError, match="give a file"):
        evaluate_file(experts[0], task, out="-")


@pytest.mark.parametrize("ask", [evaluate_file, predict_file])
@pytest.mark.parametrize("force", [True, False])
def test_what_they_are_made_of_is_never_replaced(tmp_path, experts, task, ask, force):
    expert, file = experts[0], tmp_path / "rows.jsonl"
    shutil.copy(task, file)
    (tmp_path / "link.jsonl").symlink_to(file)
    (tmp_path / "model").symlink_to(expert)
    for out, told in (
        (file, "is the file being read"),
        (tmp_path / "link.jsonl", "is the file being read"),
        (f"{expert}/model.safetensors", "a folder of the model"),
        (f"{expert}/new.jsonl", "a folder of the model"),
        (tmp_path / "model" / "config.json", "a folder of the model"),
        (tmp_path, "is a folder"),
    ):
        with pytest.raises(InputError, match=told):
            ask(expert, str(file), out=str(out), force=force)
    assert lines(file) == lines(task)
    assert "new.jsonl" not in os.listdir(expert)


def test_force_replaces_predictions_alone(tmp_path, experts):
    file, out = write(tmp_path / "t.jsonl", [{"text": "a"}]), tmp_path / "out"
    for content in (b"some notes", b'{"text": "a", "label": "b"}\n', b"\x80\x00", b"[1]"):
        out.write_bytes(content)
        with pytest.raises(InputError, match="is not a file of predictions, and is left as it is"):
            predict_file(experts[0], file, str(out), force=True)
        assert out.read_bytes() == content
    with pytest.raises(InputError, match="is not a file of predictions"):
        predict_file(experts[0], file, "/dev/null", force=True)
    out.write_bytes(b"")
    for _ in range(2):
        predict_file(experts[0], file, str(out), force=True)
        assert [one["text"] for one in lines(out)] == ["a"]


def test_the_base_of_an_adapter_is_its_models_folder_too(tmp_path, experts):
    base = {"base_model_name_or_path": experts[0]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(base))
    for folder in (tmp_path, experts[0]):
        with pytest.raises(InputError, match="a folder of the model"):
            check_target(f"{folder}/o.jsonl", "t.jsonl", str(tmp_path), force=True)
