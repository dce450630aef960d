"""What is sent of an adapter's card to a hub."""

import json
import shutil

import pytest

from rekindle.pipeline.sharing.contents import model_folder
from rekindle.pipeline.sharing.models import model_files
from rekindle.train.export.card import student_card
from rekindle.train.model.parts.head_config import HeadConfig
from rekindle.train.model.student_config import StudentConfig
from rekindle.train.student import build_student


@pytest.fixture(scope="module")
def bert(make_model, wordpiece):
    return make_model("bert", "AutoModelForMaskedLM", wordpiece, num_hidden_layers=1)


@pytest.mark.parametrize("moved", [False, True])
def test_the_card_of_an_adapter_does_not_say_where_it_or_its_base_lies(bert, tmp_path, moved):
    base, folder = tmp_path / "somebody" / "a-base", tmp_path / "somebody" / "a"
    shutil.copytree(bert, base)
    config = StudentConfig(model=str(base), lora={"r": 2})
    heads = {"tone": HeadConfig(kind="sequence", num_labels=2)}
    size = json.loads((bert / "config.json").read_text())["vocab_size"]
    student = build_student(config, heads, size, 0)
    student.save_pretrained(folder)
    (folder / "README.md").write_text(student_card(student, folder))
    assert str(base) in (folder / "README.md").read_text()
    if moved:
        folder = folder.rename(tmp_path / "b")
    _, found, _ = model_files(model_folder(str(folder)), str(folder), "me/x")
    files = {n: of if isinstance(of, bytes) else of.read_bytes() for n, of in found.items()}
    for name, of in files.items():
        assert b"somebody" not in of, name
        assert str(tmp_path).encode() not in of, name
    card = files["README.md"].decode()
    assert 'from_pretrained("a-base")' in card
    assert "of `a-base`" in card
    assert "x-base" not in card
    if not moved:
        assert 'from_pretrained(base, "me/x")' in card
        assert "pipeline merge-adapter me/x --out me/x-merged" in card
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "a-base"
