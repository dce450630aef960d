"""Batches of made-up sequences and targets; a teacher's first letter gives its kind."""

import numpy as np

from rekindle.data.batch import (
    Batch,
    MaskedInputs,
    SequenceTargetBatch,
    TokenLabelBatch,
    TokenTargetBatch,
)
from rekindle.data.targets.schema import TeacherInfo
from rekindle.train.config import DistillTerm

WIDTH = 7


def info_of(name):
    about = {
        "v": {"task": "masked_lm", "kind": "topk", "view": "masked-0", "k": 2},
        "t": {"task": "token_classification", "kind": "token", "view": "text", "num_labels": 2},
        "s": {"task": "sequence_classification", "kind": "sequence", "view": "text"},
    }[name[0]]
    return TeacherInfo(name=name, **about)


def make_batch(lengths, masked, targets):
    """``masked``: (row, position) of the view; ``targets``: teacher -> rows or (row, position)."""
    rows, positions = places(masked)
    ids = np.arange(len(lengths) * WIDTH, dtype=np.int32).reshape(-1, WIDTH)
    return Batch(
        index=np.arange(len(lengths)),
        digests=["d"] * len(lengths),
        domains=[None] * len(lengths),
        input_ids=ids,
        lengths=np.asarray(lengths, np.int64),
        masked=MaskedInputs(0, ids, rows, positions, rows * 10 + positions),
        pairs={},
        targets={name: make_target(name, found, len(lengths)) for name, found in targets.items()},
    )


def make_target(name, found, sequences):
    """Make a target whose values encode their sequence and position."""
    info = info_of(name)
    if name[0] == "s":
        present = np.isin(np.arange(sequences), sorted(found))
        return SequenceTargetBatch(info, present, np.zeros((sequences, 2), np.float32), None)
    rows, positions = places(found)
    content = (rows * WIDTH + positions)[:, None].astype(np.float32)
    if name[0] == "t":
        return TokenLabelBatch(info, rows, positions, content)
    return TokenTargetBatch(info, rows, positions, {"values": content, "other": content[:, 0]})


def places(found):
    pairs = np.array(sorted(found), np.int64).reshape(-1, 2)
    return pairs[:, 0], pairs[:, 1]


def sequences_in(found):
    return {item if isinstance(item, int) else item[0] for item in found}


def term(*teachers, **values):
    return DistillTerm(teachers=teachers, **values)
