"""The lines that are printed after a fine-tuning work as they are, wherever the expert lies."""

import shlex
from types import SimpleNamespace

import pytest
import typer

from rekindle.data.settings import parse_settings
from rekindle.pipeline.builtin.names import resolve_values
from rekindle.pipeline.cli import app
from rekindle.pipeline.commands.next_commands import next_commands
from rekindle.pipeline.teacher_config import TeacherConfig
from rekindle.pipeline.yaml_text import parse_yaml

COMMANDS = typer.main.get_command(app).commands


@pytest.mark.parametrize(
    ("out", "expert"),
    [
        *((name, name) for name in ("experts/trec", "my experts/it's", "a: b # c", "[x]", "yes")),
        ("-x", "./-x"),
        ("python-docs/mine", "./python-docs/mine"),
        ("x" * 200, "x" * 200),
    ],
)
@pytest.mark.parametrize(
    ("problem", "pairs", "task"),
    [
        ("single_label_classification", True, "sequence_classification"),
        ("multi_label_classification", False, "sequence_classification"),
        ("regression", False, "regression"),
        ("token_classification", None, "token_classification"),
    ],
)
def test_each_line_says_the_expert_to_its_reader(out, expert, problem, pairs, task):
    *lines, teacher = next_commands(out, SimpleNamespace(problem=problem, pairs=pairs))
    for line, name in zip(lines, ("evaluate", "predict"), strict=True):
        program, command, *typed = shlex.split(line)
        assert (program, command) == ("pipeline", name)
        assert COMMANDS[name].make_context(name, typed).params["model"] == expert
    (values,) = parse_yaml(teacher.partition("run file: ")[2], "line")["teachers"]
    found = parse_settings(TeacherConfig, resolve_values(values), "line")
    assert (found.model, found.task, found.pairs) == (expert, task, "adjacent" if pairs else None)
