"""The page in a real browser: at desktop and phone width, in light and dark, without a network.

It drives the system's own Chromium; where there is none, the tests are skipped.
"""

import io
import re
import shutil
from pathlib import Path

import pytest

from rekindle.pipeline.compare.page import settings_section
from rekindle.pipeline.report.cache import CacheFacts, KnownCache, TeacherFacts, cache_section
from rekindle.pipeline.report.cost import Cost, StudentCost, cost_section
from rekindle.pipeline.report.losses import RunCurves, losses_section
from rekindle.pipeline.report.page import Facts, Page, Section, as_html
from rekindle.pipeline.report.scores import TaskScores, scores_section
from rekindle.pipeline.report.significance import Difference
from rekindle.pipeline.report.table import Column, Table

CHROMIUM = shutil.which("chromium")
ARGUMENTS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
SMALLEST_LETTERS = 9  # pixels

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on this machine")


def page_of_runs(count: int) -> Page:
    """All sections, of so many runs with long names, some that cannot be broken at a space."""
    names = [f"learning_rate=0.0005,temperature=2,seed={n}" for n in range(count)]
    names[0] = "a-name-without-any-place-where-a-line-could-end" * 2
    curves = [
        RunCurves(
            name,
            objective=[(s, 9.0 / s + n / 10) for s in range(1, 60)],
            cross_entropy=[(s, 8.0 / s + n / 10) for s in range(1, 60)],
            held_out={key: [(20, 3.0 + n), (40, 2.0 + n)] for key in ("loss", "kl/lm", "loss/law")},
        )
        for n, name in enumerate(names)
    ]
    scores = {name: [0.4 + n / 100, 0.5, 0.6] for n, name in enumerate(names)}
    tasks = [TaskScores(t, "matthews", "test", scores, 0.25, "A task.") for t in ("cola", "mrpc")]
    gains = [Difference(name, "expert", "cola", 0.01, -0.1, 0.12, 0.3, 0.9, 5) for name in names]
    students = [StudentCost(name, 100.0, ("lm",), 50.0) for name in names]
    lm = TeacherFacts("lm", "16 of 4,000 log-probabilities and the tail", 10**6, 10**8, 10**6, 0.1)
    cache = KnownCache("/a/long/path/" * 9, CacheFacts(9018, 343_210, 4000, [lm]))
    wide = [Column(f"value {n}", ["1.2345"] * count) for n in range(20)]
    return Page(
        "Students of one corpus",
        "So many runs.",
        [
            Section("Runs", [Table("", [Column("run", names), *wide], samples=range(count))]),
            settings_section(names, {"train.objective.distill": ["[{teachers: [lm]}]"] * count}),
            losses_section(curves, warnings=["Something differs."]),
            scores_section(names, tasks, gains),
            cost_section(
                {"lm": 99.0}, students, Cost({"lm": 99.0}, ["lm"], 50.0, 100.0), ["Note."]
            ),
            cache_section([cache]),
            Section("More", [Facts([("what", "value" * 60)])]),
        ],
    )


@pytest.fixture(scope="module")
def browser():
    """One Chromium for all tests: it takes longer to start than all of them."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=CHROMIUM, args=list(ARGUMENTS))
        yield found
        found.close()


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[int, Path]:
    """The page of one run and that of many."""
    folder = tmp_path_factory.mktemp("pages")
    for count in (1, 14):
        (folder / f"{count}.html").write_text(as_html(page_of_runs(count)), encoding="utf-8")
    return {count: folder / f"{count}.html" for count in (1, 14)}


MEASURE = """() => {
  const rgb = text => text.match(/[\\d.]+/g).map(Number);
  const ground = element => {  // the first colour behind it that can be seen
    for (let e = element; e; e = e.parentElement) {
      const c = rgb(getComputedStyle(e).backgroundColor);
      if (c.length < 4 || c[3] > 0) return c.slice(0, 3);
    }
    return [255, 255, 255];
  };
  const own = e => [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
  const words = [...document.querySelectorAll("main *")]
    .filter(e => own(e) && !e.closest("svg"))
    .map(e => ({ink: rgb(getComputedStyle(e).color), ground: ground(e), text: e.textContent,
                pixels: parseFloat(getComputedStyle(e).fontSize)}));
  const lines = [...document.querySelectorAll("svg path")].flatMap(e => {
    const s = getComputedStyle(e);
    const visible = s.stroke !== "none" && parseFloat(s.strokeOpacity) === 1;
    return visible && !e.closest("defs") ? [{ink: rgb(s.stroke), ground: ground(e)}] : [];
  });
  const pictures = [...document.querySelectorAll("figure svg")].map(svg => {
    const box = svg.getBoundingClientRect(), scale = box.width / svg.viewBox.baseVal.width;
    const texts = [...svg.querySelectorAll("text")].map(t => {
      const b = t.getBoundingClientRect();
      return {text: t.textContent, pixels: parseFloat(getComputedStyle(t).fontSize) * scale,
              ink: rgb(getComputedStyle(t).fill), ground: ground(svg),
              box: [b.left, b.top, b.right, b.bottom]};
    });
    return {box: [box.left, box.top, box.right, box.bottom], texts};
  });
  const root = document.documentElement;
  return {words, lines, pictures, width: root.scrollWidth, window: window.innerWidth};
}"""


def contrast(one: list[float], other: list[float]) -> float:
    """WCAG 2's, of two colours in 0..255."""

    def luminance(colour):
        parts = [part / 255 for part in colour[:3]]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return sum(w * part for w, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def overlap(one: list[float], other: list[float]) -> bool:
    """Whether two boxes share more than a pixel in both directions."""
    wide = min(one[2], other[2]) - max(one[0], other[0])
    high = min(one[3], other[3]) - max(one[1], other[1])
    return wide > 1 and high > 3  # boxes of letters are higher than the letters


@pytest.mark.parametrize("mode", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("count", [1, 14])
def test_the_page_can_be_read(browser, files, count, width, mode):
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=mode)
    view = context.new_page()
    requests: list[str] = []
    errors: list[str] = []
    view.on("request", lambda request: requests.append(request.url))
    view.on("console", lambda message: errors.append(message.text))
    view.on("pageerror", lambda error: errors.append(str(error)))
    view.goto(files[count].as_uri())
    found = view.evaluate(MEASURE)
    context.close()

    assert requests == [files[count].as_uri()]
    assert not errors
    assert found["width"] <= found["window"] == width  # what is wide scrolls in its own box
    for word in found["words"]:
        assert contrast(word["ink"], word["ground"]) >= 4.5, word
        assert word["pixels"] >= SMALLEST_LETTERS, word
    assert found["lines"]
    for line in found["lines"]:
        assert contrast(line["ink"], line["ground"]) >= 3, line
    assert len(found["pictures"]) >= 6
    for picture in found["pictures"]:
        left, top, right, bottom = picture["box"]
        for text in picture["texts"]:
            box = text["box"]
            assert left - 1 <= box[0] <= box[2] <= right + 1, text
            assert top - 2 <= box[1] <= box[3] <= bottom + 2, text
            assert text["pixels"] >= SMALLEST_LETTERS, text
            assert contrast(text["ink"], text["ground"]) >= 4.5, text
        for n, one in enumerate(picture["texts"]):
            for other in picture["texts"][n + 1 :]:
                assert not overlap(one["box"], other["box"]), (one, other)


def test_the_dark_is_dark_and_the_light_is_light(browser, files):
    grounds = {}
    for mode in ("light", "dark"):
        context = browser.new_context(color_scheme=mode)
        view = context.new_page()
        view.goto(files[1].as_uri())
        colour = view.evaluate("getComputedStyle(document.body).backgroundColor")
        grounds[mode] = sum(map(int, re.findall(r"\d+", colour)[:3]))
        context.close()
    assert grounds["dark"] < 150 < 600 < grounds["light"]


WIDER = "[...document.querySelectorAll('.scroll')].map(e => e.scrollWidth > e.clientWidth)"
LAST = 4  # pixels at an edge


def edges(view, number: int) -> tuple[float, float]:
    """How far the left and the right edge of a table's box are from the ground, in 0..255."""
    image = pytest.importorskip("PIL.Image", reason="pillow is not installed")
    shot = image.open(io.BytesIO(view.locator(".scroll").nth(number).screenshot())).convert("L")
    ground = shot.getpixel((shot.width // 2, 1))
    left, right = (
        shot.crop((at, 0, at + LAST, shot.height)).histogram() for at in (0, shot.width - LAST)
    )
    usual = [max(range(256), key=side.__getitem__) for side in (left, right)]
    return abs(usual[0] - ground), abs(usual[1] - ground)


@pytest.mark.parametrize(("width", "mode"), [(1280, "dark"), (390, "light")])
def test_a_table_that_is_wider_than_the_window_shows_that_it_scrolls(browser, files, width, mode):
    """A shadow where there is more and none at the end, and a bar below."""
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=mode)
    view = context.new_page()
    view.goto(files[14].as_uri())
    wider = view.evaluate(WIDER)
    assert True in wider
    first = wider.index(True)
    assert edges(view, first)[1] > 25
    box = view.locator(".scroll").nth(first)
    bar = "e => getComputedStyle(e, '::-webkit-scrollbar').height"
    assert float(box.evaluate(bar).removesuffix("px")) >= 8
    box.evaluate("e => e.scrollLeft = e.scrollWidth")
    assert edges(view, first)[1] < 5
    if False in wider:  # of what fits, nothing is hidden
        assert max(edges(view, wider.index(False))) < 5
    context.close()
