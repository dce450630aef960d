"""Generate docs/troubleshooting.md from the table of bad input."""

from collections.abc import Iterable, Iterator

from testlib.bad_input.row import Bad

CODES = {
    2: "Exit code 2: what was given is wrong",
    3: "Exit code 3: a cache, a checkpoint, a run or a teacher is not what it must be",
}
HEAD = """# What went wrong?

<!-- made by tests/pipeline/bad_input/test_bad_input.py, which types every line of it -->

Find an error message here, and what to do about it. Every message is one line on stderr that begins
with `error:`. It names what is wrong, the rule, and the way out. No output is left half-written,
and if finished work is kept, the message says so and gives the command that continues. Exit codes:
0 done; 1 a bug in Rekindle, with its traceback; 2 and 3 as below; 130 interrupted.

`pipeline doctor RUN.yaml` checks a machine before a run: disk space for what `pipeline plan`
predicts, memory for each teacher, file locks at the cache's place, one step of training. A run
itself warns once when its disk cannot hold the remaining units or the next checkpoint.

Each row is one mistake, with parts of the message that it gets; a test makes each mistake in a
folder where everything else is right.
"""
BELOW = {
    3: """
Two more cases need a model and so have no row here. `pipeline verify --audit` finds a value further
off than [its bound](audit.md). Or a teacher on a server answers differently from when its targets
were begun ([served.md](served.md#what-is-checked)): it is another model, or the same one in another
precision.
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
    yield "| mistake | command | message | what to do |\n|---|---|---|---|\n"
    for row in rows:
        told = f"{_cell(row.thing)} … {_cell(row.rule)}"
        way = _cell(row.way) if row.way else "as the message says"
        yield f"| {row.done} | `{row.typed.split()[0]}` | {told} | {way} |\n"


def _cell(text: str) -> str:
    """Escape text for a Markdown cell."""
    fence = "``" if "`" in text else "`"
    inside = f" {text} " if "`" in text else text
    return f"{fence}{inside.replace('|', chr(92) + '|')}{fence}"
