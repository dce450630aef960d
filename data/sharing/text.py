"""Which parts of a cache reveal its text, besides the text itself.

Token ids are the text. So are most targets of a language model: beside a position's candidates they
hold the rank of the true token. Masked views hold some of the ids, and vectors of a whole text can
be turned back into it. An expert's answers about its classes do not reveal it.
"""

from rekindle.data.targets.reading.reader import TeacherReader

SAMPLE_UNITS = 4


def reveals_text(teacher: TeacherReader) -> bool:
    """Return whether the text, or much of it, can be read from a teacher's targets."""
    return teacher.kind.reveals_text


def readable_share(teacher: TeacherReader) -> float | None:
    """Return the share of a language model's positions at which the true token can be read: its
    rank is stored, and it is among the candidates. None if no rank is stored. From some units.
    """
    if not teacher.info.is_vocabulary or "gold_rank" in teacher.info.lacks:
        return None
    k = teacher.info.k or teacher.info.vocabulary_size or 0
    seen = readable = 0
    for commit in [*teacher.commits.records()][:SAMPLE_UNITS]:
        for part in teacher.scalars(int(commit.facts["shard"]), commit.facts.get("replica")):
            seen, readable = seen + len(part.gold_rank), readable + int((part.gold_rank < k).sum())
    return readable / seen if seen else None
