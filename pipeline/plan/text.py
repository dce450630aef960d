"""A plan for people: a table and a few lines, in 100 columns. Reads the plan's JSON values only."""

import io
from typing import Any

from rich.console import Console
from rich.table import Table

WIDTH = 100
_COUNTS = ("units_to_make", "units_present", "positions")
SECONDS = ((86_400, "day"), (3_600, "hour"), (60, "minute"))


def shown_plan(plan: dict[str, Any]) -> str:
    """The text of ``RunPlan.as_dict()``."""
    out = io.StringIO()
    # No markup: names and paths may have brackets.
    console = Console(file=out, width=WIDTH, highlight=False, markup=False)
    corpus = plan["corpus"]
    console.print(f"corpus {', '.join(corpus['source'])}: {_of_corpus(corpus)}")
    for view in plan["views"]:
        made, left = view["units_present"], counted(view["units_to_make"], "unit")
        console.print(
            f"view {view['name']}: {left} to make, {made:,} there"
            + _to_write(view["bytes"], "at most " if view["at_most"] else "")
        )
    if plan["teachers"]:
        console.print(_table(plan["teachers"]))
    for teacher in plan["teachers"]:
        if teacher["reason"]:
            console.print(f"{teacher['name']}: {teacher['reason']}")
    console.print(_total(plan["totals"], plan["cache"]))
    console.print(plan["break_even"]["sentence"])
    runs = plan["break_even"]["teachers"]
    if plan["break_even"]["runs"] is not None and len(runs) > 1:
        shown = (f"{n} {'not used' if r is None else f'{r:,}'}" for n, r in runs.items())
        console.print(f"Runs per teacher: {', '.join(shown)}")
    if plan["to_make"]:
        console.print("not made yet; made once, from Python's documentation, by what needs it:")
    for one in plan["to_make"]:
        unknown = f"; not known without it: {', '.join(one['unknown'])}" if one["unknown"] else ""
        console.print(f"  {one['name']}: {one['what']}{unknown}")
    for warning in plan["warnings"]:
        console.print(f"warning: {warning}")
    return "".join(f"{line.rstrip()}\n" for line in out.getvalue().splitlines())


def _of_corpus(corpus: dict[str, Any]) -> str:
    if corpus["sequences"] is None:
        return f"not known; {corpus['basis']}"
    about = "~" if corpus["estimated"] else ""
    return (
        f"{about}{counted(corpus['sequences'], 'sequence')}, "
        f"{about}{counted(corpus['tokens'], 'token')} ({corpus['basis']})"
        + _to_write(corpus["bytes"])
    )


def _table(teachers: list[dict[str, Any]]) -> Table:
    table = Table()
    for heading in ("teacher", "task", "kept"):
        table.add_column(heading, overflow="fold")
    for heading in ("units to make", "there", "positions", "size", "time"):
        table.add_column(heading, justify="right")
    for t in teachers:
        table.add_row(
            t["name"],
            t["task"].replace("_classification", " classes").replace("_", " "),
            t["kept"],
            *("?" if t[count] is None else f"{t[count]:,}" for count in _COUNTS),
            "?" if t["bytes"] is None else shown_bytes(t["bytes"]),
            "?" if t["seconds"] is None else shown_seconds(t["seconds"]),
        )
    return table


def _to_write(size: int, bound: str = "") -> str:
    return f", {bound}{shown_bytes(size)} to write" if size else ""


def _total(totals: dict[str, Any], cache: str) -> str:
    if totals["bytes"] is None:
        return f"total for {cache}: not known"
    least = "at least " if totals["unknown"] else ""
    line = f"total for {cache}: {least}{shown_bytes(totals['bytes'])} to write"
    if totals["seconds"] is not None:
        line += f", {least}{shown_seconds(totals['seconds'])} of teachers in one process"
    if totals["disk_free"] is not None:
        line += f"; {shown_bytes(totals['disk_free'])} free"
    return line


def counted(number: int, unit: str) -> str:
    """``1 unit``, ``2 units``, with thousands set apart."""
    return f"{number:,} {unit}{'' if number == 1 else 's'}"


def shown_bytes(size: int) -> str:
    """Bytes with a unit of a thousand each, three digits or so."""
    for power, unit in ((12, "TB"), (9, "GB"), (6, "MB"), (3, "kB")):
        value = size / 10**power
        if value >= 0.9995:
            return f"{value:,.0f} {unit}" if value >= 99.95 else f"{value:.1f} {unit}"
    return counted(size, "byte")


def shown_seconds(seconds: float) -> str:
    """Seconds, minutes, hours or days, whichever reads best."""
    for size, unit in SECONDS:
        if seconds >= 1.5 * size:
            value = seconds / size
            return f"{value:,.0f} {unit}s" if value >= 9.95 else f"{value:.1f} {unit}s"
    if 0 < seconds < 0.95:
        return "under a second"
    return counted(round(seconds), "second")
