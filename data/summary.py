"""Summarise a cache in a few lines, as ``repr`` does. Reads only what is already open."""

from collections.abc import Iterable

from rekindle.data.corpus.corpus import Corpus
from rekindle.data.counted import counted, shown_bytes
from rekindle.data.targets.reading.reader import TeacherReader


def summarise(corpus: Corpus, teachers: Iterable[TeacherReader]) -> str:
    """Return a line for the corpus, and one per teacher: what is stored, bytes, complete or not."""
    completeness = (
        "complete" if corpus.complete else "incomplete: the source was not read to its end"
    )
    lines = [
        f"Cache({corpus.store.location!r}): {counted(len(corpus), 'sequence')}, "
        f"{counted(corpus.tokens, 'token')}, {completeness}"
    ]
    return "\n".join([*lines, *map(_line, teachers)])


def _line(teacher: TeacherReader) -> str:
    info = teacher.info
    stored = f"{info.kind}, {teacher.kind.description}"
    if info.k is not None:
        stored = f"{info.kind}, k = {teacher.max_k or info.k}"
    coverage = "complete" if teacher.coverage == 1 else f"incomplete: {teacher.coverage:.1%}"
    maskings = f", {counted(teacher.replicas, 'masking')}" if teacher.masked else ""
    return (
        f"  {info.name}: {info.task}, {stored}{maskings}, {shown_bytes(teacher.bytes)}, {coverage}"
    )
