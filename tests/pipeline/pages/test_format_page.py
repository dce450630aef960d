"""docs/format.md says what the code writes: its tables are made of it, and it names every file."""

import re
from pathlib import Path

import pytest

from testlib.pages.format_page import PAGE, page, pattern_of, words

GOLDEN = Path(__file__).parents[2] / "golden"
CACHES = sorted(path for path in GOLDEN.glob("cache-v*") if path.is_dir())


def test_the_page_is_made_of_the_code():
    """Renew it with ``python tests/lib/testlib/pages/format_page.py``."""
    assert PAGE.read_text("utf-8") == page()


def unnamed(folder: Path, names: dict[str, str]) -> list[str]:
    """The files of a folder that the page does not name."""
    patterns = [re.compile(pattern_of(name)) for name in names]
    files = [str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()]
    assert files
    return [name for name in files if not any(one.fullmatch(name) for one in patterns)]


@pytest.mark.parametrize("cache", CACHES, ids=lambda path: path.name)
def test_it_names_every_file_of_a_cache(cache):
    assert not unnamed(cache, words.FILES)


def test_it_names_every_file_of_a_run():
    assert not unnamed(GOLDEN / "run-v2", words.RUN_FILES)
