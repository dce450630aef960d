"""A plan as text: a table and a few lines, in 80 columns."""

from textwrap import fill

from rekindle.data.counted import counted, shown_bytes
from rekindle.pipeline.plan.figures import CorpusPlan, RunPlan, TeacherWork
from rekindle.pipeline.report.table import Table, table_of
from rekindle.pipeline.report.text import text_lines

WIDTH = 80
MIN_PADDING_SHOWN = 1.1  # tokens computed per token of text; less is not worth a line
SHOWN_AS = {"masked": "masked text", "pairs": "pairs of texts"}  # views by kind
LEGEND = (
    "A unit is a teacher's work on one file of sequences; a target is its output for one "
    "sequence, or for one token in it."
)
SECONDS = ((86_400, "day"), (3_600, "hour"), (60, "minute"))


def format_plan(plan: RunPlan) -> str:
    """Return the text of a plan."""
    lines = [f"warning: {warning}" for warning in plan.warnings]
    lines.append(f"corpus {', '.join(plan.corpus.source)}: {_corpus_text(plan.corpus)}")
    for view in plan.views:
        to_make, bound_text = (
            counted(view.units_to_make, "unit"),
            "at most " if view.at_most else "",
        )
        kind = SHOWN_AS[view.name.partition("-")[0]]
        line = f"{kind} ({view.name}): {to_make} to make, {view.units_present:,} in cache"
        lines.append(line + _to_write(view.bytes, bound_text))
    padding = plan.corpus.padding
    if padding is not None and max(padding.shuffled, padding.similar_lengths) >= MIN_PADDING_SHOWN:
        lines.append(padding.as_text())
    table = text_lines(_table(plan.teachers), WIDTH) if plan.teachers else []
    head = [*wrapped(lines), *table, *(wrapped([LEGEND]) if plan.teachers else [])]
    lines = [f"{teacher.name}: {teacher.reason}" for teacher in plan.teachers if teacher.reason]
    lines += _shared_lines(plan.teachers)
    lines += [_served_line(teacher) for teacher in plan.teachers if teacher.requests]
    lines += [t.cut.as_text(t.name, t.longest) for t in plan.teachers if t.cut]
    lines += [_total(plan), f"{plan.break_even.sentence} {plan.break_even.assumes}".rstrip()]
    runs_by_teacher = plan.break_even.teachers
    if plan.break_even.runs is not None and len(runs_by_teacher) > 1:
        shown = (
            f"{name} {'not used' if runs is None else f'{runs:,}'}"
            for name, runs in runs_by_teacher.items()
        )
        lines.append(
            f"Student runs until each teacher's cache has paid for itself: {', '.join(shown)}"
        )
    if plan.to_make:
        lines.append(
            "not made yet; the command that needs it makes it once, from Python's documentation:"
        )
    for builtin in plan.to_make:
        unknown = f"; not known without it: {', '.join(builtin.unknown)}" if builtin.unknown else ""
        lines.append(f"  {builtin.name}: {builtin.what}{unknown}")
    return "\n".join([*head, *wrapped(lines)]) + "\n"


def _shared_lines(teachers: tuple[TeacherWork, ...]) -> list[str]:
    """List each group of teachers that share forward passes once."""
    groups = {frozenset((t.name, *t.shares)): t for t in teachers if t.shares}
    names = [[t.name for t in teachers if t.name in group] for group in groups]
    return [
        f"{', '.join(group)}: one forward pass for all of them; its time is divided among them"
        for group in names
    ]


def _served_line(teacher: TeacherWork) -> str:
    requests = f"{teacher.name}: {counted(teacher.requests or 0, 'request')} to its server"
    if not teacher.seconds_per_token:
        return requests
    return (
        f"{requests}; its time is that of one request, measured now, as if they came one after "
        f"another ({teacher.at_a_time} are sent at a time)"
    )


def wrapped(sentences: list[str]) -> list[str]:
    """Wrap the sentences to WIDTH; their own line breaks stay."""
    lines = [line for sentence in sentences for line in sentence.split("\n")]
    return [fill(line, WIDTH, break_on_hyphens=False) for line in lines]


def _corpus_text(corpus: CorpusPlan) -> str:
    if corpus.sequences is None or corpus.tokens is None:
        return f"not known; {corpus.basis}"
    approximately = "~" if corpus.estimated else ""
    sequences, tokens = counted(corpus.sequences, "sequence"), counted(corpus.tokens, "token")
    texts = "" if corpus.texts is None else f"{approximately}{counted(corpus.texts, 'text')}, "
    pieces = f" (pieces of up to {corpus.sequence_length:,} tokens)"
    counts = f"{texts}{approximately}{sequences}{pieces}, {approximately}{tokens}"
    if corpus.trained is not None:
        counts += f" ({approximately}{corpus.trained:.1%} of them trained)"
    if corpus.full is not None:
        counts += f", rows of several documents {approximately}{corpus.full:.1%} full"
    return f"{counts}{_to_write(corpus.bytes)}; {corpus.basis}"


def _table(teachers: tuple[TeacherWork, ...]) -> Table:
    head = ("teacher", "task", "kept", "units to make", "in cache", "targets", "size", "time")
    rows = [
        [
            t.name,
            t.task.replace("_classification", " classes").replace("_", " "),
            t.kept,
            *(_count_text(count) for count in (t.units_to_make, t.units_present, t.positions)),
            "?" if t.bytes is None else ("≤ " if t.at_most else "") + shown_bytes(t.bytes),
            "?" if t.seconds is None else format_seconds(t.seconds),
        ]
        for t in teachers
    ]
    return table_of("", head, rows, words=3)


def _count_text(count: int | None) -> str:
    return "?" if count is None else f"{count:,}"


def _to_write(size: int | None, bound: str = "") -> str:
    return f", {bound}{shown_bytes(size)} to write" if size else ""


def _total(plan: RunPlan) -> str:
    totals, cache = plan.totals, plan.cache
    if totals.bytes is None:
        return f"total for {cache}: not known"
    at_least = "at least " if totals.unknown else ""
    is_some_unknown = any(teacher.bytes is None for teacher in plan.teachers)
    is_some_bound = any(teacher.at_most for teacher in plan.teachers)
    bound = "at most " if is_some_bound else ""
    if is_some_unknown:
        bound = "about " if is_some_bound else "at least "
    line = f"total for {cache}: {bound}{shown_bytes(totals.bytes)} to write"
    if totals.seconds is not None:
        line += f", {at_least}{format_seconds(totals.seconds)} of teachers in one process"
    if totals.disk_free is not None:
        line += f"; {shown_bytes(totals.disk_free)} free"
    return line


def format_seconds(seconds: float) -> str:
    """Format as seconds, minutes, hours or days, whichever reads best."""
    for unit_seconds, unit in SECONDS:
        value = seconds / unit_seconds
        if value >= 1.5:
            return f"{value:,.0f} {unit}s" if value >= 9.95 else f"{value:.1f} {unit}s"
    if 0 < seconds < 0.95:
        return "under a second"
    return counted(round(seconds), "second")
