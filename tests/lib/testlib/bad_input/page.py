"""Generate docs/troubleshooting.md from the table of bad input."""

from collections.abc import Iterable, Iterator

from testlib.bad_input.row import Bad

CODES = {
    2: "Exit code 2: what was given is wrong",
    3: "Exit code 3: a cache, a checkpoint, a run or a teacher is not what it must be",
}
HEAD = """# What went wrong?

<!-- made by tests/pipeline/bad_input/test_bad_input.py, which types every line of it -->

Every message is one line on stderr that begins with `error:`. It names what is wrong, the rule, and
the way out. Nothing is half-written: an output is there whole or not at all, and work that is kept
is said, with the line that goes on. Exit codes: 0 done; 1 a fault of Rekindle's own, with its
traceback; 2 and 3 as below; 130 interrupted.

`pipeline doctor RUN.yaml` looks ahead: room on the disk for what `pipeline plan` says, memory for
each teacher, locks where the cache is, one step of training. A run itself warns once when its disk
will not take the units that are left, or the next checkpoint.

The tables name what can go wrong; a test types a line for each row, in a folder where all else is
sound. A message has these parts, and says more.
"""
BELOW = {
    3: """
Two more things end with 3, which need a model and so have no row here: `pipeline verify --audit`
found a value further off than [its bound](audit.md), and a teacher behind a server answers
otherwise than when its targets were begun ([served.md](served.md#what-is-checked)): it is another
model, or the same in another precision.
"""
}


def page(themes: dict[str, tuple[Bad, ...]]) -> str:
    """Return the page, with a table for each exit code and theme."""
    return HEAD + "".join(_sections(themes))


def _sections(themes: dict[str, tuple[Bad, ...]]) -> Iterator[str]:
    for code, title in CODES.items():
        yield f"\n## {title}\n{BELOW.get(code, '')}"
        for theme, rows in themes.items():
            if found := [row for row in rows if row.code == code]:
                yield f"\n### {theme[0].upper()}{theme[1:]}\n\n" + "".join(_table(found))


def _table(rows: Iterable[Bad]) -> Iterator[str]:
    yield "| what was done | command | what is told | the way out |\n|---|---|---|---|\n"
    for row in rows:
        told = f"{_cell(row.thing)} … {_cell(row.rule)}"
        way = _cell(row.way) if row.way else "what the rule says"
        yield f"| {row.done} | `{row.typed.split()[0]}` | {told} | {way} |\n"


def _cell(text: str) -> str:
    """Escape text for a Markdown cell."""
    fence = "``" if "`" in text else "`"
    inside = f" {text} " if "`" in text else text
    return f"{fence}{inside.replace('|', chr(92) + '|')}{fence}"
