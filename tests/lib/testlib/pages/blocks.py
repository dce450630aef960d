"""The code blocks of README and of the pages in docs/, and what the pages tell tests of them.

A remark is an HTML comment in the line above a block, which readers do not see:

    <!-- not run: REASON, one of REASONS[: more words] -->
    <!-- run by: tests/….py [more words] -->      a test that names the page
    <!-- output -->                               what the program before it prints, but for numbers
"""

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[4]
PAGES = sorted(
    [
        *(path for path in ROOT.glob("*.md") if path.name not in ("CHANGELOG.md",)),
        *ROOT.glob("docs/**/*.md"),
        *ROOT.glob("examples/*.md"),
    ]
)
REASONS = (
    "several nodes",
    "a foreign server",
    "a GPU",
    "a package that is not installed",
    "minutes of training",
)
_EXCUSE = rf"not run: ({'|'.join(REASONS)})(: .*)?"
_RUN_BY = r"run by: ((?:tests|\.ci)/[\w./]+)( .*)?"


class Block(NamedTuple):
    """A fenced block: the line of its fence, its language, its text, and the remark above it."""

    page: Path
    line: int
    language: str
    text: str
    remark: str

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def file(self) -> str:
        """The name that the block gives itself in its first line: ``# run.yaml``."""
        found = re.match(r"# ([\w./-]+\.\w+)\n", self.text)
        return found[1] if found else ""

    @property
    def excuse(self) -> str:
        """Why it is not run; nothing where it is."""
        found = re.fullmatch(_EXCUSE, self.remark)
        return found[1] if found else ""

    @property
    def run_by(self) -> str:
        """The file, from the root, that runs it."""
        found = re.fullmatch(_RUN_BY, self.remark)
        return found[1] if found else ""

    @property
    def is_output(self) -> bool:
        return self.remark == "output"

    @property
    def known(self) -> bool:
        """Whether its remark, if it has one, is one that this file knows."""
        return not self.remark or self.is_output or bool(self.excuse or self.run_by)


def blocks_of(page: Path) -> list[Block]:
    """The fenced blocks of a page, from its top to its end."""
    found: list[Block] = []
    lines = page.read_text("utf-8").splitlines()
    number = 0
    while number < len(lines):
        fence = re.match(r"( *)```(\w*)", lines[number])
        if not fence:
            number += 1
            continue
        end = next(n for n in range(number + 1, len(lines)) if lines[n].strip() == "```")
        text = "".join(line[len(fence[1]) :] + "\n" for line in lines[number + 1 : end])
        above = re.fullmatch(r" *<!-- (.*) -->", lines[number - 1] if number else "")
        found.append(Block(page, number + 1, fence[2], text, above[1] if above else ""))
        number = end + 1
    return found


def indented_code(page: Path) -> list[int]:
    """Lines that a viewer shows as code though no fence says so: four spaces, after an empty line
    of a paragraph's level (within a list they continue it).
    """
    found, before, within_list = list[int](), "", False
    text = re.sub(r"^ *```.*?^ *```$", _blank, page.read_text("utf-8"), flags=re.S | re.M)
    for number, line in enumerate(text.splitlines(), 1):
        if re.match(r"\s*([-*]|\d+\.) ", line):
            within_list = True
        elif line and not line.startswith(" "):
            within_list = False
        if line.startswith("    ") and not before.strip() and not within_list:
            found.append(number)
        before = line
    return found


def _blank(found: re.Match[str]) -> str:
    return "x" + "\n" * found[0].count("\n")
