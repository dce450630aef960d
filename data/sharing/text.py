"""What of a cache tells its text, besides the text itself.

Token ids are the text. So are, for most of it, the targets of a language model: beside the
candidates of a position they hold the rank of the token that stands there. Masked views hold some
of the ids, and vectors of a whole text can be turned back into it. What an expert says of its
classes does not tell it.
"""

from rekindle.data.targets.reading.reader import TeacherReader

SAMPLE_UNITS = 4


def tells_text(teacher: TeacherReader) -> bool:
    """Whether the text, or much of it, can be read from a teacher's targets."""
    return teacher.kind.tells_text


def readable_share(teacher: TeacherReader) -> float | None:
    """The share of a language model's positions at which the token that stands there is named: its
    rank is stored, and it is among the candidates. None where no rank is stored. Of some units.
    """
    if not teacher.info.is_vocabulary or "gold_rank" in teacher.info.lacks:
        return None
    k = teacher.info.k or teacher.info.vocabulary_size or 0
    seen = named = 0
    for commit in [*teacher.commits.records()][:SAMPLE_UNITS]:
        for part in teacher.scalars(int(commit.facts["shard"]), commit.facts.get("replica")):
            seen, named = seen + len(part.gold_rank), named + int((part.gold_rank < k).sum())
    return named / seen if seen else None
