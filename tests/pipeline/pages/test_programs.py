"""The blocks of a page are one program: its bash and its Python run in order, in one folder.

Files that a block names in its first line are written; what the page says that a program prints is
what it prints, but for numbers.
"""

import re
from pathlib import Path

import pytest

from testlib.pages.blocks import PAGES, ROOT, Block, blocks_of
from testlib.pages.place import lay_out, make_needed, smaller
from testlib.pages.shell import commands_of, run_command

# Those that take seconds; the others are slow. The recipes run as they are.
QUICK = ("README.md", "docs/keys.md", "examples/README.md")
RECIPES = ROOT / "docs" / "recipes"


def is_run(block: Block) -> bool:
    """Whether it is run here."""
    here = not block.excuse and not block.run_by
    return here and block.language in ("bash", "python")


def programs() -> list[object]:
    """The pages with something to run."""
    found = []
    for page in PAGES:
        if any(is_run(block) for block in blocks_of(page)):
            name = str(page.relative_to(ROOT))
            marks = () if name in QUICK else (pytest.mark.slow,)
            found.append(pytest.param(page, marks=marks, id=name))
    return found


def run_page(page: Path, small: bool) -> None:
    """Run what a page has to run in the current folder."""
    names: dict[str, object] = {}
    said = ""
    for block in blocks_of(page):
        if block.is_output:
            assert not missing_lines(block.text, said), block.place
        elif block.excuse or block.run_by:
            continue
        elif block.file:
            Path(block.file).parent.mkdir(parents=True, exist_ok=True)
            text = smaller(block.text) if small else block.text
            Path(block.file).write_text(text, encoding="utf-8")
        elif block.language == "bash":
            said = ""
            for command in commands_of(block.text):
                said += run_command(command, small, make_needed if small else lambda words: None)
        elif block.language == "python":
            exec(compile(block.text, block.place, "exec"), names)


def missing_lines(printed: str, said: str) -> list[str]:
    """The lines of a page that its program did not print, whatever numbers stand in them."""
    lines = {_plain(line) for line in said.splitlines()}
    return [one for one in printed.splitlines() if one.strip("… ") and _plain(one) not in lines]


def _plain(line: str) -> str:
    """A line without its numbers, their units and the widths of its columns."""
    return " ".join(re.sub(r"[\d,.:−-]*\d[\w,.]*|─+", " ", line).split())


@pytest.mark.parametrize("page", programs())
def test_a_page_is_a_program(page, tmp_path, monkeypatch, request):
    monkeypatch.chdir(tmp_path)
    as_it_is = page.parent == RECIPES
    request.getfixturevalue("built_in_home" if as_it_is else "hasty_home")
    if not as_it_is:
        lay_out(tmp_path)
    run_page(page, small=not as_it_is)
