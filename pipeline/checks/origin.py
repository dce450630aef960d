"""The origin of a cached teacher, as lines of text."""

from collections.abc import Iterator

from rekindle.data.counted import counted
from rekindle.data.targets.lineage import Ancestor
from rekindle.data.targets.reading.reader import TeacherReader
from rekindle.pipeline.console import in_line


def origin_lines(teacher: TeacherReader) -> Iterator[str]:
    """Yield the runs that trained it, and how it came into the cache if no local model was run."""
    info = teacher.info
    for number, run in enumerate(info.lineage):
        yield _lineage_line(info.name, number, run)
    if info.imported:
        yield _imported_line(teacher)
    if teacher.mapped_coverage:
        yield _mapped_line(info.name, info.mapped, *teacher.mapped_coverage)
    if info.served:
        yield _served_line(teacher)


def _mapped_line(name: str, tokens: int | None, share: float, mass: float) -> str:
    return (
        f"{name} has a tokenizer of its own (vocabulary: map): {tokens:,} tokens of the corpus "
        f"are in its vocabulary; targets at {share:.1%} of the positions, where these hold "
        f"{mass:.1%} of its probability"
    )


def _imported_line(teacher: TeacherReader) -> str:
    assert teacher.info.imported is not None
    imported, tail = teacher.info.imported, teacher.info.estimator.get("tail")
    tail_note = (
        "" if tail is None else f"; tails {tail}" + ("" if tail == "given" else " in float64")
    )
    missing_note = f"; without {', '.join(imported.lacks)}" if imported.lacks else ""
    return in_line(
        f"{teacher.info.name} was imported: {imported.summary()}{tail_note}{missing_note}"
    )


def _served_line(teacher: TeacherReader) -> str:
    info = teacher.info
    versions = ", ".join(f"{name} {value}" for name, value in info.versions.items())
    return in_line(
        f"{info.name} was served as {info.model}{f' ({versions})' if versions else ''}; tails "
        f"derived in float64; without {', '.join(info.lacks)}; recognized by its answers to probes"
    )


def _lineage_line(name: str, number: int, run: Ancestor) -> str:
    teachers = ", ".join(f"{teacher} {weights[:12]}" for teacher, weights in run.teachers.items())
    return (
        f"{name} lineage {number + 1}: {run.student}, {counted(run.steps, 'step')} on corpus "
        f"{run.corpus[:12]}, taught by {teachers or 'none'} -> weights {(run.weights or '')[:12]}"
    )
