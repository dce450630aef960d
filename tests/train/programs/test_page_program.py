"""docs/from_python.md is one program, run as it stands but for the names."""

import re
from pathlib import Path

import pytest

from testlib.objective.setting import Setting

PAGE = Path(__file__).parents[3] / "docs" / "from_python.md"


@pytest.fixture
def names(masked_world, tmp_path):
    """What its names stand for here, with a student that has a head for the classifier."""
    Setting(masked_world, {"distill": [{"teachers": ["sense"]}]}).student.save_pretrained(
        tmp_path / "student"
    )
    return {
        '"runs/cache"': repr(str(masked_world.path)),
        '"big-lm"': '"big"',
        '"topics"': '"sense"',
        '"path/to/student"': repr(str(masked_world.student)),
        '"runs/a"': repr(str(tmp_path / "student")),
    }


def test_it_runs(names, capsys):
    section = PAGE.read_text("utf-8").partition("## From your own trainer")[0]
    blocks = re.findall(r"```python\n(.*?)```", section.partition("\n## ")[0], re.S)
    assert len(blocks) == 3
    program = "".join(blocks)
    for name, here in names.items():
        assert name in program
        program = program.replace(name, here)
    found = {}
    exec(compile(program, PAGE.name, "exec"), found)
    assert found["loss"].requires_grad
    assert found["logits"].shape[1] == found["cache"].corpus.info["tokenizer"]["size"]
    assert float(found["loss"]) > 0
    assert "complete" in capsys.readouterr().out
