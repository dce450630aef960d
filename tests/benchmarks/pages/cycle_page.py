"""The tables of a cycle's result page, in Markdown: everything between the page's marks."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

from of_rows import complete_draws, measured_draws, results_of
from record import OWN_SEARCH, Cell

from rekindle.data.counted import counted
from rekindle.pipeline.cycle.config import CycleConfig
from rekindle.pipeline.cycle.scores import MEAN, CycleResults
from rekindle.pipeline.cycle.tables import own_tables, primary_tables
from rekindle.pipeline.cycle.verdict import verdict_of
from rekindle.pipeline.report.scores import (
    TaskScores,
    difference_cells,
    difference_head,
    difference_tables,
    score_table,
)
from rekindle.pipeline.report.significance import Difference
from rekindle.pipeline.report.table import NOTHING, Table, table_of
from testlib.cycles import escaped, markdown_of

_ARM_WORDS = {
    "expert": "the start model, fine-tuned",
    "start": "the start model, fine-tuned",
    "longer": "the start model, fine-tuned for twice the epochs",
    "mlm": "masked LM alone on the same text",
    "pseudo": "the expert's classes as labels on the same text",
}


def table(one: Table) -> str:
    """Return a table without its title, which the page words itself."""
    return markdown_of(one).partition("\n\n")[2]


def folded(summary: str, *blocks: str) -> str:
    """Return blocks that are shown on a click."""
    return "\n\n".join([f"<details><summary>{summary}</summary>", *blocks, "</details>"])


def picture(name: str, description: str) -> str:
    """Return the Markdown of a picture beside the page."""
    return f"![{description}]({name}.svg)"


def differences(results: CycleResults) -> Iterator[str]:
    """Yield a folded table for each arm that others are compared with."""
    for one in difference_tables(results.differences, results.unit):
        against = next(a for a in _ARM_WORDS if f"differences to {a} on test" in one.title)
        words = _ARM_WORDS[against]
        if against == "expert" and "start" in results.arms:
            words = "the experts, which are of another model"
        tests = len(one.columns[0].cells)
        yield folded(f"against {against}: {words} ({counted(tests, 'comparison')})", table(one))


def scores(results: CycleResults) -> str:
    """Return the cycle's own table of scores."""
    return table(own_tables(results)[0])


def caption(unit: str) -> str:
    """Return the caption of a picture of differences."""
    return (
        f"Differences in points (right is better), paired by {unit}, with 95 % intervals (none for "
        f"a single {unit}). A mark is filled if p, adjusted by Holm's method, is below 0.05."
    )


# --- a page of recorded cells ---------------------------------------------------------------------


def measured(name: str, config: CycleConfig, rows: Sequence[Cell]) -> str:
    """Return everything made of the ``rows`` of a table whose picture is called ``name``."""
    cells = config.label_draws * len(config.tasks)
    state = f"**{len(rows)} of {cells} cells are measured** (a cell: one task in one draw)"
    if not rows:
        return f"{state}: nothing is known yet."
    results = results_of(config, rows)
    return "\n\n".join(
        [
            f"{state}.",
            _measured_cells(config, rows),
            *_primary(config, rows, results),
            picture(name, f"differences of the arms on each task: {name}"),
            caption("draw"),
            "### Scores",
            "Test scores in %: mean ± sample deviation over the draws, counted in the head.",
            table(_scores(results)),
            "### All differences",
            *differences(results),
            *_own_heads(results),
            "### What it cost",
            *_costs(config, rows),
            "### What went in",
            *_inputs(config, rows),
        ]
    )


def _measured_cells(config: CycleConfig, rows: Sequence[Cell]) -> str:
    draws, measured = range(config.label_draws), measured_draws(rows)
    head = ["task", *(f"draw {draw}" for draw in draws)]
    lines = [
        [task.name, *("yes" if d in measured.get(task.name, ()) else NOTHING for d in draws)]
        for task in config.tasks
    ]
    return table(table_of("", head, lines, words=len(head)))


def _primary(config: CycleConfig, rows: Sequence[Cell], results: CycleResults) -> Iterator[str]:
    if (primary := results.primary) is None:
        return
    yield "### The primary comparison"
    complete = complete_draws(config, rows)
    verdict = verdict_of(results)
    yield f"{verdict[0].upper()}{verdict[1:]}."
    explanation = " `expert` is the start model fine-tuned, which the file calls `start`."
    if "start" in results.arms or "expert" not in primary.against:
        explanation = ""
    if len(results.tasks) > 1:
        if len(complete) < config.label_draws:
            draws = ", ".join(map(str, complete)) or "none so far"
            yield (
                "**It is not complete**: the mean over tasks is over the draws that have all "
                f"{len(results.tasks)} tasks ({draws}; {config.label_draws} are planned)."
                f"{explanation}"
            )
        elif explanation:
            yield explanation.strip()
    (one,) = primary_tables(results)
    yield table(one)
    if len(results.tasks) > 1:
        by_names = {(o.arm, o.against, o.task): o for o in results.differences}
        yield (
            "The same comparison on each task, over the draws measured for it. It is secondary: it "
            "says what to look at next, and proves nothing. Holm's adjustment is over all tests "
            "against the same arm."
        )
        yield table(_by_task(primary.arm, primary.against, results, by_names))


def _by_task(
    arm: str,
    against: Sequence[str],
    results: CycleResults,
    differences: Mapping[tuple[str, str, str], Difference],
) -> Table:
    head = ["task", f"{arm} against", *difference_head(results.unit)]
    lines = [
        [task, base, *difference_cells(differences.get((arm, base, task)))]
        for task in results.metrics
        for base in against
    ]
    return table_of("", head, lines, words=2)


def _own_heads(results: CycleResults) -> Iterator[str]:
    """Yield how students with their own heads compare: on the mean, and folded on each task."""
    if not (ones := results.own_head_differences):
        return
    yield "### Students with their own heads"
    yield (
        "A student's own head is the one that its teachers taught; it has seen no label. Against "
        "the start model fine-tuned, the same for twice the epochs, and the same student after its "
        "second fine-tuning, with a fresh head. Holm's adjustment is over all tests of each of the "
        "three."
    )

    def listed(of_mean: bool) -> Table:
        chosen = [one for one in ones if (one.task == results.judged_on) is of_mean]
        lines = [[one.arm, one.against, one.task, *difference_cells(one)] for one in chosen]
        head = ["student", "against", "task", *difference_head(results.unit)]
        return table_of("", head, lines, words=3)

    if any(one.task == results.judged_on for one in ones):
        yield table(listed(of_mean=True))
    yield folded("on each task", table(listed(of_mean=False)))


def _scores(results: CycleResults) -> Table:
    """Return the table of scores, with the number of draws of each task."""
    by_column: dict[tuple[str, str], dict[str, Sequence[float]]] = {}
    for one in results.scores:
        by_column.setdefault((one.task, one.metric), {})[one.arm] = one.scores
    order = [*results.metrics, MEAN]
    columns = []
    for task, metric in sorted(by_column, key=lambda column: order.index(column[0])):
        column = TaskScores(task, "" if task == MEAN else metric, "", by_column[task, metric])
        columns.append(column)
    arms = list(dict.fromkeys(one.arm for one in results.scores))
    scores = score_table("arm", arms, columns)
    counts = ["", *(max(len(one.of(arm)) for arm in arms) for one in columns)]
    with_counts = [
        replace(column, title=f"{column.title} ({counted(int(count), 'draw')})")
        if count
        else column
        for column, count in zip(scores.columns, counts, strict=True)
    ]
    return replace(scores, columns=with_counts)


def _costs(config: CycleConfig, rows: Sequence[Cell]) -> Iterator[str]:
    """Yield the mean seconds over the draws of what an arm needs, by task."""
    columns: dict[str, dict[str, list[dict[str, float]]]] = {}
    seen: set[tuple[str, int]] = set()
    for one in rows:
        label = one["seconds_of"]
        if (label, one["draw"]) in seen:  # of all tasks: the same in each
            continue
        seen.add((label, one["draw"]))
        for arm, kinds in one["seconds"].items():
            columns.setdefault(label, {}).setdefault(arm, []).append(kinds)
    yield (
        "Seconds of all that an arm needs, from labels and text to its scores; mean over draws. "
        "Experts and their passes over the text count for every arm that they teach. Draw 0 makes "
        "the search for all draws, and it counts in each of them."
    )
    head = ["arm", *columns]
    lines = []
    for arm in config.arms:
        sums = [[sum(k.values()) for k in columns[c].get(arm, [])] for c in columns]
        lines.append([arm, *(f"{fmean(s):,.0f}" if s else NOTHING for s in sums)])
    yield table(table_of("", head, lines, words=1))
    kinds = list(
        dict.fromkeys(k for c in columns.values() for a in c.values() for s in a for k in s)
    )
    parts = []
    for label, arms in columns.items():
        lines = [
            [arm, *(_mean_of(kind, arms[arm]) for kind in kinds)]
            for arm in config.arms
            if arm in arms
        ]
        parts += [f"**{escaped(label)}**", table(table_of("", ["arm", *kinds], lines, words=1))]
    yield folded("by kind of stage", *parts)
    if any(one["unrecorded"] for one in rows):
        unknown = sorted({s for one in rows for u in one["unrecorded"].values() for s in u})
        yield f"Not recorded, and in no sum: {', '.join(unknown)}."


def _mean_of(kind: str, draws: Sequence[Mapping[str, float]]) -> str:
    seconds = [one[kind] for one in draws if kind in one]
    return f"{fmean(seconds):,.0f}" if seconds else NOTHING


def _inputs(config: CycleConfig, rows: Sequence[Cell]) -> Iterator[str]:
    lines = []
    for task in config.tasks:
        if cells := [one for one in rows if one["task"] == task.name]:
            facts, text = [one["facts"] for one in cells], cells[0]["text"]
            numbers = [_range([f[key] for f in facts]) for key in ("train", "dev", "test")]
            held = [sum(f["held"].values()) for f in facts]
            fate = "removed" if text["removed"] else "kept"
            records = (
                NOTHING
                if text["exact"] is None
                else f"{text['exact']:,} + {text['near']:,}, {fate}"
            )
            lines.append([task.name, facts[0]["metric"], *numbers, records, _range(held)])
    head = ["task", "metric", "train", "dev", "test"]
    head += ["records of the text that hold a test text (as it stands + nearly)"]
    head += ["rows of train and dev that are also rows of test, left out"]
    yield table(table_of("", head, lines, words=2))
    if config.search:
        yield "Settings chosen on dev in draw 0 for each arm, and used in all draws:"
        yield table(_chosen(config, rows))
        elsewhere = [
            f"{r['task']} {r['draw']}" for r in rows if r.get("search_of", OWN_SEARCH) != OWN_SEARCH
        ]
        if elsewhere:
            yield (
                "Run in another folder than draw 0, whose search was taken over from search.json "
                f"(`--searched`): {', '.join(elsewhere)}."
            )
    yield _origins(rows)


def _range(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _chosen(config: CycleConfig, rows: Sequence[Cell]) -> Table:
    by_task = {one["task"]: one["chosen"] for one in reversed(rows)}
    names = [task.name for task in config.tasks if task.name in by_task]
    lines = [[arm, *(_point(by_task[name][arm]) for name in names)] for arm in config.arms]
    return table_of("", [", ".join(config.search), *names], lines, words=1)


def _point(chosen: Mapping[str, Any]) -> str:
    return ", ".join(f"{v:g}" if isinstance(v, float) else str(v) for v in chosen.values())


def _origins(rows: Sequence[Cell]) -> str:
    """Return devices, days, versions and commits; if they differ, the cells of each."""

    def describe(one: Cell) -> str:
        versions = ", ".join(f"{name} {version}" for name, version in one["versions"].items())
        return f"{one['device']}; {one['precision']}; {versions}; commit {one['commit']}"

    by_origin: dict[str, list[Cell]] = {}
    for one in rows:
        by_origin.setdefault(describe(one), []).append(one)
    lines = []
    for origin, ones in by_origin.items():
        days = sorted({one["date"] for one in ones})
        period = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
        cells = ", ".join(f"{one['task']} {one['draw']}" for one in ones)
        lines.append(f"- {period}: {origin}" + (f" ({cells})" if len(by_origin) > 1 else ""))
    return "\n".join(["Measured, by the day of recording:", *lines])
