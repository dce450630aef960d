"""Make what runs leave behind, as far as ``pipeline compare`` reads it, and parse its tables."""

import re

from rekindle.data.settings import parse_settings
from rekindle.train.config import StudentConfig, TrainConfig

LM = {"teachers": ["lm"], "temperature": 2.0}


def about(corpus="c1", view="masked-1", lm="f1", student=None, **train):
    """Return the content of ``run.json``."""
    values = {"steps": 4, "objective": {"distill": [LM]}} | train
    model = parse_settings(StudentConfig, {"model": "m"} | (student or {}))
    return {
        "student": model.model_dump(mode="json"),
        "train": parse_settings(TrainConfig, values).model_dump(mode="json", by_alias=True),
        "cache": {"path": "p", "corpus": corpus, "masked_view": view, "teachers": {"lm": lm}},
        "evaluation": {"measure": 3},
    }


def rows_of(text):
    """Parse a table from text: title -> cells, keeping stars."""
    lines = text.splitlines()
    rule = next(i for i, line in enumerate(lines) if set(line.strip()) == {"─"})
    table = [re.split(r"\s{2,}", line.strip()) for line in (lines[rule - 1], *lines[rule + 1 :])]
    head, *rows = [cells for cells in table if len(cells) == len(table[0])]
    return {title: [row[number] for row in rows] for number, title in enumerate(head)}
