"""Every link of README, of the pages in docs/ and of the others leads somewhere."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/*.md")])


def text_of(page: Path) -> str:
    """The page without its blocks of code."""
    return re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """What the repository's viewer calls the headings of a page."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.*)$", text_of(page), re.MULTILINE):
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)
        name = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        found.add(name if name not in found else f"{name}-{sum(n.startswith(name) for n in found)}")
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    missing = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        if re.match(r"[a-z]+:", target):
            continue
        place, _, anchor = target.partition("#")
        file = (page.parent / place).resolve() if place else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            missing.append(target)
    assert not missing


def test_the_walks_name_what_is_there() -> None:
    """Each line of a figure has a name, and the file that defines it."""
    text = (ROOT / "docs" / "walks.md").read_text("utf-8")
    steps = re.findall(r"^  │  (\w+) +(\S+\.py)", text, re.MULTILINE)
    assert len(steps) > 20
    steps += [(name, place) for name, place in re.findall(r"\[`(\w+)`\]\(\.\./(\S+\.py)\)", text)]
    for name, place in steps:
        defined = rf"^(def|class|async def) {name}\b"
        assert re.search(defined, (ROOT / place).read_text("utf-8"), re.MULTILINE), (name, place)


def test_every_page_is_linked_from_another() -> None:
    linked = {
        (page.parent / target.partition("#")[0]).resolve()
        for page in PAGES
        for target in re.findall(r"\]\(([^)\s]+)\)", text_of(page))
    }
    assert not {page for page in PAGES if page not in linked and page.name != "README.md"}
