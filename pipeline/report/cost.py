"""The cost of students with cached and with live teachers: arithmetic, and the page's section.

With a cache, the teachers run once and each student costs only its own run; live teachers run
beside every student. Nothing is guessed: a cost that was not recorded is unknown, and so is every
sum with it.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import mean
from typing import Any

from rekindle.data.counted import counted
from rekindle.pipeline.report.page import Block, Facts, Figure, Figures, Note, Section
from rekindle.pipeline.report.svg import INK, few_ticks, line_style, plottable
from rekindle.pipeline.report.table import formatted, table_of

ESTIMATED = (
    "Live teachers, run beside the student without a cache, were not run: their cost is an "
    "estimate, the recorded seconds of caching per sequence times the sequences of the steps at "
    "which the run learnt from the teacher. The estimate ignores that a student's batches are "
    "shuffled, not sorted by length as in caching, that teachers and student then share one "
    "memory, and the loading of teachers; it includes encoding the targets, which live teachers "
    "would not need."
)
UNKNOWN = "unknown"  # shown in a cell: it was not recorded
_UNITS = (("hours", 3600.0, 3.0), ("minutes", 60.0, 10.0), ("seconds", 1.0, 0.0))


@dataclass(frozen=True)
class Cost:
    """Seconds of each teacher's one pass over the corpus, of the teachers beside one run if they
    were live, and of the run itself.

    ``used`` names the teachers the run learns from; only they are compared.
    """

    teachers: dict[str, float]
    used: list[str]
    live: float
    run: float

    @property
    def once(self) -> float:
        """Seconds to cache the teachers in use."""
        return sum(self.teachers[name] for name in self.used)

    @property
    def pays_after(self) -> int | None:
        """Number of runs from which on the cache costs no more than live teachers; None if
        never.
        """
        return max(1, math.ceil(self.once / self.live)) if self.live > 0 else None

    def cached(self, runs: int) -> float:
        """Return the seconds for ``runs`` students from one cache."""
        return self.once + runs * self.run

    def with_live_teachers(self, runs: int) -> float:
        """Return the seconds for ``runs`` students with every teacher run beside each."""
        return runs * (self.run + self.live)


@dataclass(frozen=True)
class StudentCost:
    """A run: its own seconds, the teachers it learns from, and the seconds these would take live
    beside it. None: unknown; 0: no teachers.
    """

    name: str
    seconds: float | None
    teachers: tuple[str, ...]
    live: float | None


def typical_cost(
    teachers: Mapping[str, float | None], students: Sequence[StudentCost]
) -> tuple[Cost | None, str]:
    """Return the average cost of the students that have a teacher and recorded timings, and a
    sentence naming those included and left out. The cost is None if there are no such students.
    """
    with_teachers = [one for one in students if one.teachers]
    if not with_teachers:
        return None, "No run learns from a teacher: there is nothing that a cache could save."
    used = list(dict.fromkeys(name for one in with_teachers for name in one.teachers))
    if missing := [name for name in used if teachers.get(name) is None]:
        return None, f"Unknown: what caching {', '.join(missing)} took is not recorded."
    known = [one for one in with_teachers if one.seconds is not None and one.live is not None]
    unknown = ", ".join(one.name for one in with_teachers if one not in known)
    if not known:
        return None, f"Unknown: the time of {unknown} (not finished), or of its teachers live."
    used = list(dict.fromkeys(name for one in known for name in one.teachers))
    cost = Cost(
        teachers={name: teachers[name] or 0.0 for name in used},
        used=used,
        live=mean(one.live or 0.0 for one in known),
        run=mean(one.seconds or 0.0 for one in known),
    )
    sentence = f"A student run is like {', '.join(one.name for one in known)}"
    sentence += ", on average." if len(known) > 1 else "."
    sentence += f" Left out, of unknown cost: {unknown}." if unknown else ""
    return cost, sentence


# --- the section ----------------------------------------------------------------------------------


def cost_section(
    teachers: Mapping[str, float | None],
    students: Sequence[StudentCost],
    cost: Cost | None,
    notes: Sequence[str],
    more: Iterable[Block] = (),
    samples: Sequence[int] | None = None,
) -> Section:
    """Return the section: each teacher once, each student, and their sums by number of students.

    ``notes`` say what the figures refer to, where the cost of live teachers comes from, or why it
    is unknown; ``samples`` are the students' line numbers in other pictures, if not 0, 1, 2….
    """
    blocks: list[Block] = []
    if teachers:
        cells = [[name, formatted(value, "{:,.1f}", UNKNOWN)] for name, value in teachers.items()]
        note = "Seconds of one process, without loading. Unknown: older versions did not record it."
        head = ["teacher", "seconds, once"]
        note = note if None in teachers.values() else ""
        blocks.append(table_of("Each teacher, run over the corpus", head, cells, 1, note))
    rows = [
        [
            *(one.name, ", ".join(one.teachers) or "no teacher"),
            *(formatted(one.seconds, "{:,.1f}"), formatted(one.live, "{:,.1f}", UNKNOWN)),
        ]
        for one in students
    ]
    head = ["student", "learns from", "seconds", "its teachers live"]
    samples = range(len(students)) if samples is None else samples
    blocks.append(replace(table_of("Each student", head, rows, words=2), samples=samples))
    if cost is not None:
        blocks += [Figures([_picture(cost)]), Facts(cost_lines(cost))]
    return Section("Cost", [*blocks, *map(Note, notes), *more])


def cost_lines(cost: Cost) -> list[tuple[str, str]]:
    """Return the cost in words, for both text and page."""
    runs = cost.pays_after
    break_even = "never" if runs is None else f"after {counted(runs, 'student run')}"
    return [
        (f"{', '.join(cost.used)} once, into the cache", f"{cost.once:.1f} s"),
        ("the same live, beside each student", f"{cost.live:.1f} s a run"),
        ("a student run itself", f"{cost.run:.1f} s"),
        ("the cache has paid for itself", break_even),
    ]


def _picture(cost: Cost) -> Figure:
    most = max(6, min(2 * (cost.pays_after or 0), 1000))  # student runs
    dearest = max(cost.cached(most), cost.with_live_teachers(most))
    unit, size = next((unit, size) for unit, size, least in _UNITS if dearest >= least * size)
    caption = (
        f"Total cost by number of students, in {unit} of computing: their teachers once, into a "
        "cache, or live beside each."
    )
    if cost.pays_after is not None:
        caption += f" The vertical line: from {cost.pays_after:,} on, the cache costs no more."
    runs = sorted({*range(0, most + 1, max(1, most // 12)), most})
    lines = {
        "live teachers": [cost.with_live_teachers(n) / size for n in runs],
        "cached teachers": [cost.cached(n) / size for n in runs],
    }

    def draw(axes: Any) -> None:
        for style, (label, values) in enumerate(lines.items()):
            axes.plot(runs, plottable(values), label=label, **line_style(style))
        if cost.pays_after is not None and cost.pays_after <= most:
            axes.axvline(cost.pays_after, color=INK, lw=0.9, ls=(0, (1, 2)))
        axes.set(xlabel="student runs", ylabel=unit, xlim=(0, most))
        axes.set_ylim(bottom=0)
        few_ticks(axes.xaxis, 6, whole=True)
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0.2)

    return Figure(caption, draw)
