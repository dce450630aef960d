"""The page: it needs only itself, escapes everything, and is the same for the same parts."""

import re
from html.parser import HTMLParser

from hypothesis import given, settings
from hypothesis import strategies as st

from rekindle.pipeline.compare.page import settings_section
from rekindle.pipeline.report.cost import Cost, StudentCost, cost_section
from rekindle.pipeline.report.losses import RunCurves, losses_section
from rekindle.pipeline.report.page import (
    Commands,
    Facts,
    Figure,
    Figures,
    Legend,
    Note,
    Page,
    Section,
    as_html,
    breakable,
)
from rekindle.pipeline.report.scores import TaskScores, scores_section
from rekindle.pipeline.report.significance import Difference
from rekindle.pipeline.report.svg import shorten_name
from rekindle.pipeline.report.table import Column, Table

HOSTILE = '<script>alert("$x$ & \'y\' --></svg>")</script> http://evil #010203 id="a" xmlns="b"'


class Elements(HTMLParser):
    """All elements, attributes and texts of a page; fails on tags that do not match."""

    VOID = frozenset({"meta", "link", "img", "br", "hr", "wbr"})

    def __init__(self, page: str):
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data.strip())


def page_of(name: str) -> Page:
    """A page with a section of each kind, with ``name`` wherever a text is given from outside."""
    curve = [(1, 3.0), (2, 2.0)]
    runs = [RunCurves(name, curve, [], {"loss": curve, f"kl/{name}": curve})]
    task = TaskScores(name, name, "test", {name: [0.5, 0.6]}, 0.25, name)
    difference = Difference(name, "expert", name, 0.1, -0.1, 0.3, 0.5, 0.5, 5)
    cost = Cost({name: 2.0}, [name], live=1.0, run=3.0)
    return Page(
        name,
        name,
        [
            losses_section(runs, warnings=[name]),
            scores_section([name], [task], [difference], [name]),
            cost_section({name: 2.0}, [StudentCost(name, 3.0, (name,), 1.0)], cost, [name]),
            settings_section([name, "b"], {name: [name, "c"]}),
            Section(name, [Facts([(name, name)]), Note(name), Commands([(name, name)])]),
        ],
    )


def test_the_page_refers_to_nothing_outside_itself() -> None:
    page = as_html(page_of("a run"))
    assert not re.search(r"https?:|//[a-z]|@import|<script|<link|<img|<iframe", page, re.I)
    for _, attributes in Elements(page).found:
        for name in ("src", "href", "xlink:href", "data", "action"):
            assert (attributes.get(name) or "#").startswith("#")
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)", page))


def test_every_reference_of_a_picture_is_in_the_page() -> None:
    page = as_html(page_of("a run"))
    elements = Elements(page).found
    ids = {attributes["id"] for _, attributes in elements if "id" in attributes}
    used = {(a.get("xlink:href") or "#")[1:] for _, a in elements} - {""}
    used |= set(re.findall(r"url\(#([^)]*)\)", page))
    assert used
    assert used == ids  # what nothing refers to has no id


def test_pictures_are_for_dark_and_light_and_for_narrow_screens() -> None:
    page = as_html(page_of("a run"))
    assert "prefers-color-scheme: dark" in page
    assert 'name="viewport"' in page
    svgs = re.findall(r"<svg.*?</svg>", page, re.S)
    assert len(svgs) > 6
    for svg in svgs:
        opening = svg[: svg.index(">")]
        assert "viewBox" in opening
        assert " width=" not in opening
        # Every colour is one of the page's: any other would vanish in the dark or in the light.
        drawn = re.sub(r">[^<]*<", "><", svg)
        assert not re.search(r"#[0-9a-f]{6}|: *(black|white)", drawn)


def test_equal_pages_are_equal_bytes() -> None:
    assert as_html(page_of("a")) == as_html(page_of("a"))


def test_names_cannot_write_into_the_page() -> None:
    page = as_html(page_of(HOSTILE))
    plain = as_html(page_of("x"))
    tags, usual = ([tag for tag, _ in Elements(p).found if tag != "wbr"] for p in (page, plain))
    assert tags == usual
    texts = Elements(page).texts
    assert HOSTILE in texts
    # Within a picture a long name is shortened, its ends are as they were.
    assert "<script>ale…" in "".join(texts)


# XML and HTML forbid some; matplotlib takes $ for mathematics; fonts lack most of them.
names = st.one_of(
    st.text(max_size=30),
    st.text("<>&\"'$\\{}_^%#-/ \n\t\x00\x1b\u2028\udc80é中😀", min_size=1, max_size=40),
)


@settings(max_examples=6, deadline=None)
@given(names)
def test_any_name_is_shown_and_breaks_nothing(name: str) -> None:
    def draw(axes: object) -> None:
        axes.set_xticks([0], [shorten_name(name)])  # type: ignore[attr-defined]

    column = Column(name, [name], below=[name])
    blocks = [Table(name, [column]), Legend([name], [0]), Figures([Figure(name, draw)])]
    page = as_html(Page(name, name, [Section(name, blocks)]))
    page.encode("utf-8")
    found = [tag for tag, _ in Elements(page).found]
    assert found.count("figure") == found.count("table") == 1
    assert "script" not in found
    kept = "".join(letter for letter in name if letter.isalnum())
    assert kept in re.sub(r"[\W_]", "", "".join(Elements(page).texts))


def test_sections_without_parts_are_left_out() -> None:
    page = as_html(Page("t", "l", [Section("empty", []), Section("full", [Note("n")])]))
    assert "empty" not in page
    assert "full" in page


def test_what_is_best_and_what_is_unlike_is_told_without_colours() -> None:
    column = Column("c", ["1", "2", "3"], best=frozenset({1}), unlike=frozenset({2}))
    page = as_html(Page("t", "l", [Section("s", [Table("", [column])])]))
    assert '<span class="best">2</span>' in page
    assert '<span class="unlike">≠ 3</span>' in page
    style = page[: page.index("</style>")]
    assert re.search(r"\.best \{[^}]*font-weight: 700", style)


def test_long_names_may_be_broken_at_their_joints() -> None:
    assert breakable("learning_rate=0.002,seed=1") == ("learning_rate=<wbr>0.002,<wbr>seed=<wbr>1")
    assert breakable("train.objective") == "train.<wbr>objective"
    assert breakable("9,018 of 4,000") == "9,018 of 4,000"  # a number stays whole
    assert breakable("a,<b>") == "a,<wbr>&lt;b&gt;"
    assert breakable("[12.5, 13.5] 0.5") == "[12.5,<wbr> 13.5] 0.5"
