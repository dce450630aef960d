"""The head of a student that learns from sentence encoders."""

import math
from collections.abc import Mapping
from typing import Any

from rekindle.data.errors import InputError, did_you_mean
from rekindle.train.model.parts.head_config import HeadConfig, width_of
from rekindle.train.model.student_config import OWN, StudentConfig, StudentEmbedding


def check_asked(student: StudentConfig, heads: Mapping[str, HeadConfig]) -> None:
    """Raise InputError for a ``student.embedding`` without a sentence encoder to learn from."""
    if student.embedding is None:
        return
    names = [name for name, head in heads.items() if head.kind == "embedding"]
    if not names:
        raise InputError(
            "student.embedding sets the student's vectors, but no term of train.objective "
            "names a sentence encoder (task: embedding). Leave it out, or name one"
        )
    output = student.embedding.output
    if output is not None and output not in (*names, OWN):
        raise InputError(
            f"student.embedding.output is {output!r}{did_you_mean(output, [*names, OWN])}; the "
            f"student learns the vectors of {', '.join(names)}. Name one of these, or {OWN} for "
            "vectors of the student's own size"
        )


def output_of(student: StudentConfig, heads: Mapping[str, HeadConfig]) -> str | None:
    """Return whose vectors the saved student gives: those of a head, its own, or none."""
    names = [name for name, head in heads.items() if head.kind == "embedding"]
    if not names:
        return None
    asked = student.embedding or StudentEmbedding()
    return asked.output or (names[0] if len(names) == 1 else OWN)


def for_student(
    head: HeadConfig, name: str, student: StudentConfig, model_config: Any
) -> HeadConfig:
    """Return the ``head`` for a sentence encoder as this student has it: how it pools, and whether
    it projects to the teacher's size.

    Raises InputError, before anything is trained, if the sizes differ and a loss needs them equal,
    and for a causal LM without a pooling setting.
    """
    asked = student.embedding or StudentEmbedding()
    own, size = width_of(model_config), head.num_labels
    grown = grown_width(student, model_config)
    differ = own != size or grown != size
    if asked.pooling is None and student.language_task == "causal_lm":
        raise InputError(
            f"student {student.model!r} learns the vectors of {name!r}, but as a causal_lm its "
            "early tokens have not read the text: their mean is not chosen silently. Set "
            "student.embedding.pooling: lasttoken (or mean)"
        )
    if head.projection is False and head.as_long and differ:
        raise InputError(
            f"the vectors of {name!r} have {size} numbers and those of student {student.model!r} "
            f"{grown}, but a loss that compares them number by number (cosine, mse) needs equal "
            "sizes. Leave projection: false out, or learn only by similarity"
        )
    projected = (head.as_long and differ) if head.projection is None else head.projection
    given = {
        "pooling": asked.pooling or "mean",
        "normalise": head.normalise if asked.normalise is None else asked.normalise,
        "projection": projected,
        "num_labels": size if projected else own,
        "as_long": False,
    }
    return head.model_copy(update=given)


def grown_width(student: StudentConfig, model_config: Any) -> int:
    """Return the width of the states after the student has grown as configured."""
    own, grow = width_of(model_config), student.grow
    if grow is None or (grow.hidden_size is None and grow.heads is None):
        return own
    heads = model_config.get_text_config().num_attention_heads
    return grow.hidden_size or math.ceil((grow.heads or heads) * own / heads)
