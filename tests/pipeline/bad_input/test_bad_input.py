"""Bad input of every kind, to every command: one message with a way out, and nothing written."""

import os
import shlex
from pathlib import Path

import pytest

from rekindle.pipeline.cli import app
from testlib.bad_input import models
from testlib.bad_input.page import page
from testlib.bad_input.table import THEMES
from testlib.command import pipeline

ROWS = {f"{theme}: {row.done}": row for theme, rows in THEMES.items() for row in rows}
PAGE = Path(__file__).parents[3] / "docs/troubleshooting.md"


@pytest.fixture
def loaded(monkeypatch):
    """The models whose weights transformers was asked for, one by one."""
    from transformers import PreTrainedModel

    found, plain = [], PreTrainedModel._load_pretrained_model

    def load(model, *given, **named):
        found.append(type(model).__name__)
        return plain(model, *given, **named)

    monkeypatch.setattr(PreTrainedModel, "_load_pretrained_model", staticmethod(load))
    return found


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_bad_input_is_told_and_nothing_is_written(row, place, contents, loaded):
    row.spoil(place)
    before = contents()
    done = pipeline(*shlex.split(row.typed))
    assert (done.returncode, "Traceback" in done.stderr) == (row.code, False), done.stderr
    (message,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.stderr.endswith(f"{message}\n")
    for part in (row.thing, row.rule, row.way):
        assert part in message
    after = {name: content for name, content in contents().items() if not row.keeps(name)}
    assert after == before
    if row in models.ROWS:  # what headers tell is told before
        assert bool(loaded) == row.loads, loaded


def test_the_table_has_every_command_and_each_row_once():
    import typer

    rows = [row for rows in THEMES.values() for row in rows]
    commands = set(typer.main.get_command(app).commands)
    assert commands == {row.typed.split()[0] for row in rows} & commands
    assert len({row.done for row in rows}) == len(rows) == len({id(row) for row in rows})


def test_the_page_of_what_went_wrong_is_that_of_the_table():
    """REKINDLE_WRITE_PAGES=1 writes it."""
    made = page(THEMES)
    if os.environ.get("REKINDLE_WRITE_PAGES"):
        PAGE.write_text(made)
    assert PAGE.read_text() == made
