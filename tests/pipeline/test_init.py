"""`pipeline init`: writes a recipe as it is, never over a file, and says what to do next."""

from pathlib import Path

import pytest

from rekindle.data.errors import InputError
from rekindle.pipeline import init as module
from rekindle.pipeline.init import FOLDER, commands, read_recipe, recipes, write_recipe

NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_is_written_byte_by_byte(name, tmp_path, command):
    out = tmp_path / "new" / "own.yaml"
    code, said, told = command("init", name, "--out", out)
    assert code == 0
    assert out.read_bytes() == (FOLDER / f"{name}.yaml").read_bytes()
    assert said == f"{out}\n"
    stages = (
        ("rekindle",) if name in ("rekindle", "rerank") else ("cache-teachers", "train-student")
    )
    for stage in stages:
        assert f"  pipeline {stage} {out}" in told


def test_the_file_is_called_run_yaml_unless_told(tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    code, said, told = command("init", NAMES[0])
    assert (code, said) == (0, "run.yaml\n")
    assert Path("run.yaml").read_text() == read_recipe(NAMES[0])
    assert "  pipeline cache-teachers run.yaml\n" in told


def test_a_file_is_never_overwritten(tmp_path, command):
    (tmp_path / "run.yaml").write_text("mine")
    code, said, told = command("init", NAMES[0], "--out", tmp_path / "run.yaml")
    assert (code, said) == (2, "")
    assert "run.yaml exists" in told
    assert (tmp_path / "run.yaml").read_text() == "mine"


def test_an_unknown_recipe_is_refused_with_the_nearest(tmp_path, command):
    out = tmp_path / "run.yaml"
    code, _, told = command("init", NAMES[0] + "x", "--out", out)
    assert code == 2
    assert f"did you mean {NAMES[0]!r}?" in told
    assert not out.exists()


def test_without_a_name_the_recipes_are_named(tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    code, said, told = command("init")
    assert (code, said) == (2, "")
    assert ", ".join(NAMES) in told
    assert not any(tmp_path.iterdir())


def test_the_list_names_each_recipe_with_its_purpose(command):
    code, said, _ = command("init", "--list")
    assert code == 0
    listed = [line.split(maxsplit=1) for line in said.splitlines()]
    assert [name for name, _ in listed] == NAMES
    for name, purpose in listed:
        assert (FOLDER / f"{name}.yaml").read_text().startswith(f"# {purpose}\n")


def test_a_file_in_the_folder_is_a_recipe(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "FOLDER", tmp_path)
    assert recipes() == {}
    with pytest.raises(InputError, match="no recipe 'new'"):
        read_recipe("new")
    text = "# What it does.\n#\n#   pipeline plan run.yaml\n\ncorpus: {}  # pipeline not this\n"
    (tmp_path / "new.yaml").write_text(text)
    assert recipes() == {"new": "What it does."}
    assert write_recipe("new", tmp_path / "a b.yaml") == [
        f"pipeline plan '{tmp_path / 'a b.yaml'}'"
    ]
    assert commands(text, Path("run.yaml")) == ["pipeline plan run.yaml"]
