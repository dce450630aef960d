"""Renews the pictures of the README from a demo: ``python docs/pictures.py runs/demo``.

It needs the system's Chromium, and playwright and pillow (``pip install -e '.[dev]'``).
"""

import io
import shutil
import sys
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, sync_playwright
from rich.console import Console
from rich.terminal_theme import MONOKAI

from rekindle.pipeline.checks.inspect import inspect_example

HERE = Path(__file__).parent
ARGUMENTS = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync")
REPORT = {"width": 1180, "height": 1060}  # pixels: the verdict and the primary comparison
EXAMPLE = 7  # of the demo's cache
COLUMNS = 104  # characters of the terminal
MOST_BYTES = 150_000


def photograph(
    browser: Browser, page: Path, picture: Path, size: dict[str, int], whole: str = ""
) -> None:
    """A picture of the top of ``page``, or of its element ``whole``; few colours keep it small."""
    view = browser.new_page(viewport=size, color_scheme="light")
    view.goto(page.resolve().as_uri())
    taken = view.locator(whole).screenshot() if whole else view.screenshot()
    Image.open(io.BytesIO(taken)).convert("RGB").quantize(192, Image.Quantize.MAXCOVERAGE).save(
        picture, optimize=True
    )
    view.close()
    assert picture.stat().st_size < MOST_BYTES, f"{picture} has {picture.stat().st_size} bytes"


def terminal(text: str, title: str, folder: Path) -> Path:
    """What a terminal shows, as a page."""
    console = Console(record=True, width=COLUMNS, file=io.StringIO())
    console.print(text, highlight=False, markup=False, soft_wrap=False)
    svg = console.export_svg(title=title, theme=MONOKAI)
    path = folder / "terminal.html"
    # The fonts that rich's SVG names are on the network: the page asks for none of them.
    svg = "".join(
        part.split("}", 1)[-1] if n else part for n, part in enumerate(svg.split("@font-face"))
    )
    path.write_text(f'<body style="margin: 0">{svg}', encoding="utf-8")
    return path


def main(demo: Path) -> None:
    """Both pictures."""
    chromium = shutil.which("chromium")
    shown = inspect_example(str(demo / "cache"), EXAMPLE, None)
    with sync_playwright() as driver, tempfile.TemporaryDirectory() as folder:
        browser = driver.chromium.launch(executable_path=chromium, args=list(ARGUMENTS))
        photograph(browser, demo / "report.html", HERE / "report.png", REPORT)
        title = f"pipeline inspect runs/demo/cache --example {EXAMPLE}"
        page = terminal(shown, title, Path(folder))
        size = {"width": 1180, "height": 900}
        photograph(browser, page, HERE / "inspect.png", size, "svg")
        browser.close()


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/demo"))
