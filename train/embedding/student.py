"""The head of a student that learns from sentence encoders."""

import math
from collections.abc import Mapping
from typing import Any

from rekindle.data.errors import InputError, did_you_mean
from rekindle.train.model.parts.head_config import HeadConfig, width_of
from rekindle.train.model.student_config import OWN, StudentConfig, StudentEmbedding


def check_embedding(student: StudentConfig, heads: Mapping[str, HeadConfig]) -> None:
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


def choose_output(student: StudentConfig, heads: Mapping[str, HeadConfig]) -> str | None:
    """Return whose vectors the saved student gives: those of a head, its own, or none."""
    names = [name for name, head in heads.items() if head.kind == "embedding"]
    if not names:
        return None
    settings = student.embedding or StudentEmbedding()
    return settings.output or (names[0] if len(names) == 1 else OWN)


def fit_head(head: HeadConfig, name: str, student: StudentConfig, model_config: Any) -> HeadConfig:
    """Return the ``head`` for a sentence encoder as this student has it: how it pools, and whether
    it projects to the teacher's size.

    Raises InputError, before anything is trained, if the sizes differ and a loss needs them equal,
    and for a causal LM without a pooling setting.
    """
    settings = student.embedding or StudentEmbedding()
    own_width, teacher_width = width_of(model_config), head.num_labels
    final_width = grown_width(student, model_config)
    sizes_differ = own_width != teacher_width or final_width != teacher_width
    if settings.pooling is None and student.language_task == "causal_lm":
        raise InputError(
            f"student {student.model!r} learns the vectors of {name!r}, but as a causal_lm its "
            "early tokens have not read the text: their mean is not chosen silently. Set "
            "student.embedding.pooling: lasttoken (or mean)"
        )
    if head.projection is False and head.as_long and sizes_differ:
        raise InputError(
            f"the vectors of {name!r} have {teacher_width} numbers and those of student "
            f"{student.model!r} {final_width}, but a loss that compares them number by number "
            "(cosine, mse) needs equal sizes. Leave projection: false out, or learn only by "
            "similarity"
        )
    has_projection = (head.as_long and sizes_differ) if head.projection is None else head.projection
    changes = {
        "pooling": settings.pooling or "mean",
        "normalise": head.normalise if settings.normalise is None else settings.normalise,
        "projection": has_projection,
        "num_labels": teacher_width if has_projection else own_width,
        "as_long": False,
    }
    return head.model_copy(update=changes)


def grown_width(student: StudentConfig, model_config: Any) -> int:
    """Return the width of the states after the student has grown as configured."""
    width, grow = width_of(model_config), student.grow
    if grow is None or (grow.hidden_size is None and grow.heads is None):
        return width
    heads = model_config.get_text_config().num_attention_heads
    return grow.hidden_size or math.ceil((grow.heads or heads) * width / heads)
