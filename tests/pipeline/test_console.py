"""What comes from outside is shown escaped, and on a console of any encoding."""

import io
import json
import logging
import sys
from contextlib import redirect_stderr, redirect_stdout

import pytest
from rich.console import Console

from rekindle.pipeline.caching.cache_teachers import cache_teachers
from rekindle.pipeline.console import escaped, in_line, log_to_stderr, terminal
from rekindle.pipeline.progress import Progress
from rekindle.pipeline.report.table import table_of
from rekindle.pipeline.report.text import text_lines
from testlib.command import pipeline, run_main

EVIL = "A river\x1b]0;owned\x07\x1b[31m runs\r\x9b2J \u202eover\u2066."
SHOWN = r"A river\x1b]0;owned\x07\x1b[31m runs\r\x9b2J \u202eover\u2066."


@pytest.fixture(scope="module")
def cache(tmp_path_factory, configure):
    """One document and one domain, both of them hostile."""
    folder = tmp_path_factory.mktemp("evil")
    source = folder / "docs.jsonl"
    source.write_text(json.dumps({"text": EVIL, "domain": "s\x1b[1mea\n2"}) + "\n")
    corpus = {"source": [str(source)], "sequence_length": 64}
    cache_teachers(configure(folder / "c", [], corpus=corpus))
    return folder / "c"


def test_control_characters_are_escaped_and_other_letters_are_not():
    assert escaped(EVIL) == SHOWN
    assert escaped("naïve 中文 🙂‍🙂\ttab\nline") == "naïve 中文 🙂‍🙂\ttab\nline"
    assert in_line("a\tb\nc\x00") == r"a\tb\nc\x00"


def test_texts_and_domains_are_shown_escaped_and_json_has_them_as_they_are(cache):
    shown = pipeline("inspect", cache, "--example", 0)
    assert SHOWN in shown.stdout
    assert r"domains: s\x1b[1mea\n2 1" in pipeline("inspect", cache).stdout
    as_json = pipeline("inspect", cache, "--example", 0, "--json")
    assert json.loads(as_json.stdout)["text"] == EVIL
    assert "\x1b" not in shown.stdout + as_json.stdout + shown.stderr


def test_names_in_errors_and_in_the_log_are_shown_escaped(tmp_path):
    failed = pipeline("inspect", tmp_path / "no\x1b[31m\u202ecache")
    assert failed.returncode == 3
    assert r"no\x1b[31m\u202ecache" in failed.stderr
    log, handlers = logging.getLogger("rekindle"), logging.getLogger("rekindle").handlers
    try:
        with redirect_stderr(io.StringIO()) as told:
            log_to_stderr(logging.INFO)
            log.warning("a name: %s", "x\x1b[31m")
    finally:
        log.handlers = handlers
    assert told.getvalue() == "a name: x\\x1b[31m\n"


def test_cells_and_bars_take_a_name_as_it_is_within_their_line(monkeypatch):
    lines = text_lines(table_of("t\x1b", ["[red]a\n"], [["x\ny[/]\x1b"]], words=1), 80)
    assert [line.strip() for line in lines] == [r"t\x1b", r"[red]a\n", "─" * 13, r"x\ny[/]\x1b"]
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    with redirect_stderr(io.StringIO()) as drawn:
        monkeypatch.setattr(Console, "is_terminal", True)
        with Progress.to_terminal() as progress, progress.task("a\x07[b]", "steps", 2) as task:
            task.note("at\x07\n[c]")
    assert r"a\x07[b]" in drawn.getvalue()
    assert "\x07" not in drawn.getvalue()


@pytest.mark.parametrize("encoding", ["latin-1", "ascii"])
def test_what_an_encoding_lacks_is_escaped(cache, encoding):
    raw = io.BytesIO()
    console = io.TextIOWrapper(raw, encoding=encoding, write_through=True)
    with redirect_stdout(console), redirect_stderr(console):
        for arguments in (["--example", 0], []):
            with pytest.raises(SystemExit, match="0"):
                run_main("inspect", cache, *arguments)
    assert rb"\u202eover" in raw.getvalue()


def test_help_keeps_its_colours_and_stdout_is_given_back():
    before = sys.stdout
    with redirect_stdout(io.StringIO()) as out:
        with terminal():
            Console(force_terminal=True, color_system="standard").print("[bold]help")
            print("\x1b[1m")
        assert sys.stdout is out
    assert out.getvalue() == "\x1b[1mhelp\x1b[0m\n\\x1b[1m\n"
    assert sys.stdout is before
