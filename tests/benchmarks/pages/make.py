"""Write the tables and pictures of the result pages from the recorded rows.

    python tests/benchmarks/pages/make.py                # all
    python tests/benchmarks/pages/make.py few_labels     # one

Between ``<!-- begin NAME … -->`` and ``<!-- end NAME -->`` a page is overwritten; the rest of it is
written by hand. ``tests/benchmarks/pages/test_pages.py`` makes the pages again, and compares.
"""

import csv
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from scipy import stats

HERE = Path(__file__).resolve().parent
BENCHMARKS = HERE.parent
sys.path[:0] = [str(HERE), str(BENCHMARKS.parent / "lib")]

import cycle_page  # noqa: E402
import of_real_model  # noqa: E402
import pictures  # noqa: E402
import why_page  # noqa: E402
from of_rows import results_of  # noqa: E402
from record import plan_of, read_rows  # noqa: E402

from rekindle.pipeline.cycle.scores import CycleResults  # noqa: E402

ROOT = BENCHMARKS.parents[1]
PAGES = ROOT / "docs" / "results"


@dataclass(frozen=True)
class Generated:
    """The generated parts of a page: its regions by name, and its pictures by file name."""

    regions: Mapping[str, str]
    pictures: Mapping[str, str] = field(default_factory=dict)


def glue() -> Generated:
    """Knowledge rekindle on GLUE, at the size of two cores."""
    file = BENCHMARKS / "glue" / "glue_two_cores_results.json"
    results = CycleResults.from_dict(json.loads(file.read_text(encoding="utf-8")))
    picture = cycle_page.picture(
        "glue", "differences of the arms on GLUE's four tasks and their mean"
    )
    regions = {
        "picture": f"{picture}\n\n{cycle_page.caption('seed')}",
        "scores": cycle_page.scores(results),
        "differences": "\n\n".join(cycle_page.differences(results)),
    }
    on_gpu = of_cells("glue", "glue_gpu")
    regions["gpu"] = on_gpu.regions["measured"]
    return Generated(regions, {"glue.svg": _differences(results), **on_gpu.pictures})


def muki_clinc150() -> Generated:
    """MUKI on CLINC150: its tables are written by hand, and a test compares them with the rows."""
    rows = []
    for name, kind, values in muki_rows():
        low, high, accuracy = None, None, values["accuracy"]
        if "sd" in values:
            n = int(values["seeds"])
            low, high = stats.t.interval(0.95, n - 1, accuracy, values["sd"] / n**0.5)
            low, high = float(low), float(high)
        rows.append((f"{kind}: {name.removeprefix('oracle, ')}", accuracy, low, high))
    groups = {"experts": "", "student": "", "oracle": ""}
    title = "right answers among 150 intents, in %; the lines are 95 % intervals over three seeds"
    return Generated({}, {"muki_clinc150.svg": pictures.means(rows, title, groups)})


def muki_rows() -> list[tuple[str, str, dict[str, float]]]:
    """Return the name, kind and values recorded for every row of the table."""
    kinds = {"cpu, experts": "experts", "cpu, student": "student", "cpu, oracle": "oracle"}
    by_row: dict[tuple[str, str], dict[str, float]] = {}
    with open(BENCHMARKS / "results.csv", newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["benchmark"] == "muki-clinc" and row["case"] in kinds:
                values = by_row.setdefault((row["provider"], kinds[row["case"]]), {})
                values[row["metric"]] = float(row["value"])
    return [(name, kind, values) for (name, kind), values in by_row.items()]


def real_model() -> Generated:
    """A real chat model through every command."""
    return Generated(of_real_model.regions())


# The steps whose time README shows: train.py's name of each, and its label.
STEPS = {
    "ours, plain": "no teacher",
    "ours, cached KD τ=1": "cached targets, τ = 1",
    "ours, cached KD τ=2": "cached targets, τ = 2",
    "by hand, live teacher, top 64": "live teacher",
}


def readme() -> Generated:
    """Return the cost of a step with cached targets and with a live teacher."""
    with open(BENCHMARKS / "results.csv", newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["benchmark"] == "train"]
    rows = [row for row in rows if row["metric"] == "time of a step"]
    newest = [row for row in rows if row["date"] == rows[-1]["date"]]
    times = {row["provider"]: float(row["value"]) for row in newest}
    bars = [(label, times[name]) for name, label in STEPS.items()]
    _, tau_1, tau_2, live = (f"{time:.2f}" for _, time in bars)
    title = "time of a training step, relative to a step without a teacher"
    cached = f"{tau_1} times (τ = 1) to {tau_2} times (τ = 2)"
    if tau_1 == tau_2:
        cached = f"{tau_1} times (at τ = 1 and at τ = 2)"
    text = (
        f"**Why**: a step with cached targets takes {cached} as long as a step without a teacher; "
        f"a step that runs the teacher takes {live} times as long\n"
        f"({newest[-1]['device']}; BERT-mini, taught by MiniLM-L12; `tests/benchmarks/train.py`)."
        f"\n\n![{title}](docs/results/step_time.svg)"
    )
    return Generated({"why": text}, {"step_time.svg": pictures.bars(bars, title)})


def of_cells(table: str, picture: str = "") -> Generated:
    """Return a page of a table with cells recorded one by one; ``picture`` is the picture's name,
    else the table's.
    """
    picture = picture or table
    folder = BENCHMARKS / table
    config, rows = plan_of(folder), read_rows(folder)
    svgs = {f"{picture}.svg": _differences(results_of(config, rows))} if rows else {}
    return Generated({"measured": cycle_page.measured(picture, config, rows)}, svgs)


def with_reasons(table: str) -> Generated:
    """Return the page of a table whose cells were looked into by few_labels/why.py."""
    made = of_cells(table)
    reasons = {"why": why_page.why(table, why_page.read_rows())}
    return Generated({**made.regions, **reasons}, made.pictures)


def _differences(results: CycleResults) -> str:
    return pictures.differences(
        results.differences, list(results.metrics), [results.base, "mlm", "longer"]
    )


def state() -> Generated:
    """Return the table of RESULTS.md, with what each result measures."""
    lines = ["| result | what is measured |", "|---|---|"]
    for name, (title, about) in TITLES.items():
        lines.append(f"| [{title}](docs/results/{name}.md) | {about or _cells(name)} |")
    return Generated({"state": "\n".join(lines)})


def _cells(table: str) -> str:
    config, rows = plan_of(BENCHMARKS / table), read_rows(BENCHMARKS / table)
    tasks = ", ".join(task.name for task in config.tasks)
    cells = f"{len(rows)} of {config.label_draws * len(config.tasks)} cells"
    return f"{cells} ({tasks}; {config.label_draws} draws of the labels each)"


# By page: its name in RESULTS.md, and what is measured; if empty, the cells are counted.
TITLES = {
    "glue": (
        "knowledge rekindle on GLUE",
        "four tasks, six arms, five seeds; the size of two cores",
    ),
    "muki_clinc150": ("MUKI on CLINC150", "three experts, 150 intents, one to three seeds"),
    "real_model": ("a real chat model", "SmolLM2-135M-Instruct: seven kinds of targets, a map"),
    "few_labels": ("few labels, the task's own text", ""),
    "small_expert": ("small experts", ""),
}
MAKERS: dict[str, Callable[[], Generated]] = {
    "glue": glue,
    "muki_clinc150": muki_clinc150,
    "real_model": real_model,
    "few_labels": lambda: with_reasons("few_labels"),
    "small_expert": lambda: with_reasons("small_expert"),
    "RESULTS": state,
    "README": readme,
}


def replace_regions(page: str, regions: Mapping[str, str]) -> str:
    """Return a page with these regions replaced. Raise ValueError for a region that it lacks."""
    for name, text in regions.items():
        pattern = re.compile(rf"(<!-- begin {name}\b[^>]*-->\n).*?(<!-- end {name} -->)", re.DOTALL)
        if len(pattern.findall(page)) != 1:
            raise ValueError(f"the page has not exactly one region {name!r}")
        page = pattern.sub(lambda found, text=text: f"{found[1]}\n{text}\n\n{found[2]}", page)
    return page


def page_of(name: str) -> Path:
    """Return the path of the page."""
    return ROOT / f"{name}.md" if name in ("README", "RESULTS") else PAGES / f"{name}.md"


def make_pages(names: Sequence[str]) -> None:
    """Write these pages and their pictures, and the table in RESULTS.md."""
    for name in dict.fromkeys([*names, "RESULTS"]):
        generated, path = MAKERS[name](), page_of(name)
        page = replace_regions(path.read_text(encoding="utf-8"), generated.regions)
        path.write_text(page, encoding="utf-8")
        for file, picture in generated.pictures.items():
            assert len(picture) < pictures.MOST_BYTES, f"{file} has {len(picture)} bytes"
            (PAGES / file).write_text(picture, encoding="utf-8")


if __name__ == "__main__":
    make_pages(sys.argv[1:] or list(MAKERS))
