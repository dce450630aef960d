"""Pictures in the page's inks: no two runs look alike, and none too pale in dark or in light."""

import itertools
import re

import pytest

from rekindle.pipeline.report.page import TEMPLATE
from rekindle.pipeline.report.svg import (
    PALETTE,
    inline,
    line_style,
    plottable,
    sample,
    shorten_name,
)


def luminance(colour: str) -> float:
    """The relative luminance of WCAG 2."""
    parts = [int(colour[n : n + 2], 16) / 255 for n in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return sum(w * part for w, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def inks(mode: str) -> dict[str, str]:
    """The page's own colours in a mode, by name."""
    light, dark = re.findall(r":root \{(.*?)\}", TEMPLATE.read_text(), re.S)[:2]
    return dict(re.findall(r"--(\w+): (#\w{6})", light if mode == "light" else dark))


@pytest.mark.parametrize("mode", PALETTE)
def test_words_and_lines_have_contrast(mode: str) -> None:
    colours = inks(mode)
    for ground in (colours["ground"], colours["panel"]):
        for name in ("ink", "quiet", "accent"):
            assert contrast(colours[name], ground) >= 4.5, name
        for colour in PALETTE[mode]:
            assert contrast(colour, ground) >= 3, colour


def test_the_first_thirty_runs_differ_also_without_colours() -> None:
    looks = [(s["marker"], str(s["linestyle"])) for s in map(line_style, range(30))]
    assert len(set(looks)) == 30
    whole = {tuple(map(str, line_style(run).values())) for run in range(150)}
    assert len(whole) == 150


def test_neighbouring_runs_differ_in_colour() -> None:
    for one, other in itertools.pairwise(range(60)):
        assert line_style(one)["color"] != line_style(other)["color"]


def test_a_sample_is_in_the_run_s_colour() -> None:
    assert "var(--run-3)" in sample(3)
    assert "var(--run-3)" in sample(9)
    assert sample(3) != sample(9)


def test_inlining_removes_what_only_a_file_needs() -> None:
    svg = (
        '<?xml version="1.0"?><!DOCTYPE svg PUBLIC "x" "http://y"><svg xmlns="http://z" '
        'xmlns:xlink="http://w" width="10pt" height="5pt" viewBox="0 0 10 5"><metadata>http://m'
        '</metadata><!-- c --><defs><path id="m1"/></defs><g id="line_1"><use xlink:href="#m1"/>'
        '<path style="stroke: #010203" stroke-width="2"/><path style="fill: #0a0b04"/></g></svg>'
    )
    expected = (
        '<svg viewBox="0 0 10 5"><defs><path id="m1"/></defs><g><use xlink:href="#m1"/>'
        '<path style="stroke: currentColor" stroke-width="2"/><path style="fill: var(--run-4)"/>'
        "</g></svg>"
    )
    assert inline(svg) == expected


def test_inlining_leaves_words_alone() -> None:
    words = '#010203 id="a" xmlns="b" width="1pt" #0a0b01'
    assert inline(f"<svg><text>{words}</text></svg>") == f"<svg><text>{words}</text></svg>"


def test_long_names_keep_their_ends() -> None:
    assert shorten_name("short") == "short"
    long = shorten_name("learning_rate=0.001,temperature=2,seed=1")
    assert len(long) <= 24
    assert long.startswith("learning_ra")
    assert long.endswith("e=2,seed=1")
    assert shorten_name("a\nb\x00") == "a\ufffdb\ufffd"


def test_what_no_axis_can_show_is_a_gap() -> None:
    found = plottable([1.0, float("inf"), float("nan"), -1e300])
    assert found[0] == 1.0
    assert all(value != value for value in found[1:])
