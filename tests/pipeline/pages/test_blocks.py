"""Every code block of the pages is run by a test, or says why not."""

import json
from pathlib import Path

import pytest
import typer.main
import yaml

from rekindle.data.settings import parse_settings
from rekindle.pipeline.builtin.names import resolve_values
from rekindle.pipeline.cli import app
from rekindle.pipeline.config import RunConfig
from rekindle.pipeline.cycle.config import CycleConfig
from testlib.pages.blocks import PAGES, ROOT, Block, blocks_of, indented_code
from testlib.pages.keys_page import LEAST
from testlib.pages.shell import commands_of

BLOCKS = [block for page in PAGES for block in blocks_of(page)]
# How a block of each language is run: bash, and Python that names no test of its own, by
# test_programs.py; yaml and json here. Text is a figure, a formula or what a program prints.
LANGUAGES = {"bash", "python", "yaml", "json", "text"}


def of(language: str) -> pytest.MarkDecorator:
    chosen = [one for one in BLOCKS if one.language == language and not one.run_by]
    return pytest.mark.parametrize("block", chosen, ids=lambda block: block.place)


def test_every_block_is_run_or_says_why_not() -> None:
    wrong = [f"{b.place}: language {b.language!r}" for b in BLOCKS if b.language not in LANGUAGES]
    wrong += [f"{b.place}: unknown remark {b.remark!r}" for b in BLOCKS if not b.known]
    wrong += [
        f"{b.place}: {b.run_by} does not name the page"
        for b in BLOCKS
        if b.run_by and not _names(ROOT / b.run_by, b.page)
    ]
    wrong += [f"{p.name}:{n}: code without a fence" for p in PAGES for n in indented_code(p)]
    assert not wrong


def _names(test: Path, page: Path) -> bool:
    return test.is_file() and (page.name in test.read_text("utf-8") or test.parent.name == ".ci")


# --- yaml -----------------------------------------------------------------------------------------


@of("yaml")
def test_yaml_is_a_configuration(block: Block) -> None:
    """Parsed by the classes of the configuration; what a part leaves out is the least there is."""
    values = yaml.safe_load(block.text) or {}
    assert isinstance(values, dict)
    if "distill" in values:
        values = {"train": {"objective": values}}
    whole = CycleConfig if "tasks" in values else RunConfig
    for section in ("corpus", "cache", "student"):
        named = {"corpus": "CorpusConfig", "cache": "CacheConfig", "student": "StudentConfig"}
        if section in whole.model_fields:
            values[section] = LEAST[named[section]] | (values.get(section) or {})
    for name in _taught_by(values):
        teacher = {"name": name, "model": "m", "task": values["student"].get("task", "masked_lm")}
        values["teachers"] = [*values.get("teachers", []), teacher]
    parse_settings(whole, resolve_values(values), block.place)


def _taught_by(values: dict) -> list[str]:
    """Teachers that an objective names and no entry is."""
    objective = (values.get("train") or {}).get("objective") or {}
    named = [name for term in objective.get("distill", ()) for name in term["teachers"]]
    named += [term["teacher"] for term in objective.get("methods", ()) if "teacher" in term]
    there = {teacher["name"] for teacher in values.get("teachers", ())}
    return [name for name in dict.fromkeys(named) if name not in there]


@of("json")
def test_json_is_rows(block: Block) -> None:
    for line in block.text.splitlines():
        assert isinstance(json.loads(line.replace("…", "")), dict)


# --- bash -----------------------------------------------------------------------------------------


@of("bash")
def test_the_command_line_takes_each_line(block: Block) -> None:
    """Those that are not run as well: every command, argument and option is one that there is."""
    for command in commands_of(block.text):
        if "pipeline" not in command.words:
            continue
        words = command.words[command.words.index("pipeline") + 1 :]
        group = typer.main.get_command(app)
        found = group.commands[words[0]]
        found.make_context(words[0], list(words[1:]))
