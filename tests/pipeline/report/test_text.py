"""Tables in a terminal: nothing is wider than it, and nothing is lost or broken to make it so."""

import io
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from rekindle.pipeline.console import terminal
from rekindle.pipeline.report.table import Column, Table
from rekindle.pipeline.report.text import WIDEST, text_lines

NAMES = st.text("abc,=/_. -xyz0123中", min_size=1, max_size=60).map(str.strip).filter(bool)
NUMBERS = st.floats(-1e6, 1e6).map("{:,.4f}".format)


@st.composite
def tables(draw) -> Table:
    rows, count = draw(st.integers(1, 5)), draw(st.integers(1, 9))
    names = draw(st.lists(NAMES, min_size=rows, max_size=rows))
    columns = [Column("run", names, words=True)]
    for _ in range(count):
        cells = draw(st.lists(NUMBERS, min_size=rows, max_size=rows))
        best = draw(st.frozensets(st.integers(0, rows - 1)))
        columns.append(Column(draw(NAMES), cells, best))
    return Table("a title of several words, more than fit", columns, "and a note " * 9)


@given(tables(), st.sampled_from([60, 80, 120]))
def test_every_line_fits_and_every_number_is_whole(table, width):
    lines = text_lines(table, width)
    assert max(map(cell_len, lines)) <= width
    words = " ".join(lines).replace("*", "").split()
    for column in table.columns[1:]:
        assert {*column.cells} <= {*words}
    stars = sum(len(column.best) for column in table.columns)
    assert " ".join(lines).count("*") == stars


def lines_of(width: int) -> list[str]:
    names = [f"learning_rate=0.0005,temperature=2,seed={n}" for n in range(3)]
    columns = [Column(f"value {n}", ["1.25"] * 3) for n in range(12)]
    return text_lines(Table("", [Column("run", names, words=True), *columns]), width)


def test_what_does_not_fit_lies_down_or_is_told_in_parts_with_their_names():
    wide = lines_of(WIDEST)
    assert len(wide) == 2 + 3
    lying = [line.split() for line in lines_of(100)]
    assert ["value", "11", "1.25", "1.25", "1.25"] in lying
    assert "" not in lines_of(100)  # in one part
    parts = "\n".join(lines_of(60)).split("\n\n")
    assert len(parts) > 1
    first = [part.split()[0] for part in parts]
    assert first == [first[0]] * len(parts)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_console_without_our_letters_has_others_in_their_place(monkeypatch, encoding):
    """The rule below the heading, dashes, and what is below each other stays below each other."""
    raw = io.BytesIO()
    console = io.TextIOWrapper(raw, encoding=encoding, write_through=True)
    monkeypatch.setattr(sys, "stdout", console)
    columns = [Column("arm", ["a", "b"], words=True), Column("p", ["1 … 2", "–"])]
    with terminal():
        print("\n".join(text_lines(Table("× 100", columns), 80)))
    title, head, rule, first, second = raw.getvalue().decode(encoding).splitlines()
    assert "\\u" not in title + head + rule + first + second
    assert len(head) == len(rule) - 1 == len(first) == len(second)
    assert rule.strip() in ("─" * len(rule.strip()), "-" * len(rule.strip()))
