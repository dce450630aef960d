"""What a teacher leaves in the cache: ``teacher.json``, its columns, its values in Python.

Format version 1. ``targets/<teacher>/data/<unit>-<attempt>.arrow`` is row-aligned with the corpus
shard of the same number; its first column repeats the example digest. Kinds:

``topk``      vocabulary teachers, per position: the columns of ``codec.py`` and the scalars below
``dense``     vocabulary teachers, per position: ``log_probs`` float32 [P,V] at τ = 1, the scalars
``sequence``  sequence classification and regression (C = 1), per row: ``logits`` float32 [C], null
              where the teacher does not apply; ``mc_probs`` float32 [C] with Monte-Carlo passes
``token``     token classification, per position: ``logits`` float32 [P,C]

Scalars per position: ``gold_log_prob`` (uint16, −log-prob of the true token in 1/1024 nat),
``gold_rank`` (number of tokens with a larger logit), ``entropy`` (uint16, 1/1024 nat).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field

from rekindle.data.codec import high_bytes
from rekindle.data.columns import list_array, list_type, offsets_of, plain_array
from rekindle.data.settings import Settings
from rekindle.data.shards import describe, rows_in_batches

TEACHER_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"  # it becomes a folder
Task = Literal[
    "masked_lm", "causal_lm", "sequence_classification", "regression", "token_classification"
]
VOCABULARY_TASKS = ("masked_lm", "causal_lm")
Columns = dict[str, NDArray]


class TeacherInfo(Settings):
    """``teacher.json``: all that decides a teacher's targets, and what is needed to read them."""

    name: str = Field(pattern=TEACHER_NAME)
    task: Task
    kind: Literal["topk", "dense", "sequence", "token"]
    view: str  # what it saw: "clean", "text", "masked-<fp>" or "pairs-<kind>-<fp>"
    vocabulary_size: int | None = Field(None, gt=0)  # real tokens, without the head's padding
    k: int | None = Field(None, gt=0)
    temperatures: tuple[float, ...] = ()
    num_labels: int | None = Field(None, gt=0)
    label_names: tuple[str, ...] = ()
    problem: str | None = None
    domains: tuple[str, ...] | None = None
    monte_carlo_passes: int = 0
    seed: int = 0  # of the Monte-Carlo passes
    precision: str = "fp32"
    estimator: dict[str, str] = Field(default_factory=dict)  # kind and its bias class
    codec: str = "default"
    fingerprints: dict[str, str | None] = Field(default_factory=dict)  # weights, config, tokenizer
    versions: dict[str, str] = Field(default_factory=dict)  # informative, not enforced
    model: str = ""  # where it was loaded from; informative

    def identity(self) -> dict:
        """What must be equal for two runs to be the same teacher."""
        return self.model_dump(mode="json", exclude={"versions", "model"})


@dataclass(frozen=True)
class TokenTargets:
    """One example's vocabulary targets from one teacher, decoded (one replica of a masked view)."""

    replica: int | None
    input_ids: NDArray[np.int32]  # [S] as the teacher saw them
    positions: NDArray[np.int64]  # [P]
    ids: NDArray[np.int64]  # [P,K] by falling probability
    log_probs: NDArray[np.float32]  # [P,K] at τ = 1
    log_tail: dict[float, NDArray[np.float32]]  # τ -> [P]
    gold_ids: NDArray[np.int64]  # [P]
    gold_log_prob: NDArray[np.float32]  # [P]
    gold_rank: NDArray[np.int64]  # [P]
    entropy: NDArray[np.float32]  # [P] nats


@dataclass(frozen=True)
class SequenceTargets:
    """One example's logits from a sequence expert."""

    logits: NDArray[np.float32]  # [C]
    mc_probs: NDArray[np.float32] | None  # [C]


@dataclass(frozen=True)
class TokenLabelTargets:
    """One example's logits from a token classifier, at the positions that begin a word."""

    positions: NDArray[np.int64]  # [P]
    logits: NDArray[np.float32]  # [P,C]


def rank_dtype(vocabulary_size: int) -> type:
    """The integer that holds every rank of a vocabulary."""
    return np.uint16 if vocabulary_size <= 65_536 else np.uint32


def target_schema(info: TeacherInfo, about: Mapping[str, object]) -> pa.Schema:
    """The Arrow schema of one unit; its metadata repeats ``info`` and adds ``about``."""
    fields = [pa.field("digest", pa.string())]
    if info.kind == "sequence":
        logits = pa.list_(pa.float32(), info.num_labels)
        fields.append(pa.field("logits", logits))
        if info.monte_carlo_passes:
            fields.append(pa.field("mc_probs", logits))
    else:
        fields += [pa.field(n, list_type(t, w)) for n, (t, w) in position_columns(info).items()]
    described = {"kind": "targets", "format_version": 1, "teacher": info.model_dump(mode="json")}
    return describe(fields, described | dict(about))


def position_columns(info: TeacherInfo) -> dict[str, tuple[pa.DataType, int | None]]:
    """Name -> (value type, width per position) of the columns with one entry per position."""
    columns: dict[str, tuple[pa.DataType, int | None]] = {"positions": (pa.uint16(), None)}
    if info.kind == "token":
        return columns | {"logits": (pa.float32(), info.num_labels)}
    assert info.vocabulary_size is not None
    if info.kind == "dense":
        columns["log_probs"] = (pa.float32(), info.vocabulary_size)
    else:
        assert info.k is not None
        columns["ids"] = (pa.uint16(), info.k)
        if width := high_bytes(info.vocabulary_size, info.k):
            columns["ids_high"] = (pa.uint8(), width)
        columns |= {
            "values": (pa.uint8(), info.k),
            "log_prob_max": (pa.uint16(), None),
            "log_prob_min": (pa.uint16(), None),
            "tail_log_odds": (pa.int16(), len(info.temperatures)),
        }
    rank = pa.from_numpy_dtype(rank_dtype(info.vocabulary_size))
    return columns | {
        "gold_log_prob": (pa.uint16(), None),
        "gold_rank": (rank, None),
        "entropy": (pa.uint16(), None),
    }


def no_positions(info: TeacherInfo) -> Columns:
    """The columns of a unit in which the teacher has nothing to say (another domain's shard)."""
    return {
        name: np.zeros((0,) if width is None else (0, width), dtype.to_pandas_dtype())
        for name, (dtype, width) in position_columns(info).items()
    }


def position_batches(
    schema: pa.Schema, digests: list[str], rows: NDArray[np.int64], columns: Columns
) -> Iterator[pa.RecordBatch]:
    """Record batches of a unit from flat columns [P,…], where ``rows`` [P] ascends."""
    counts = np.bincount(rows, minlength=len(digests))
    starts = np.concatenate([[0], np.cumsum(counts)])
    for first, last in rows_in_batches(len(digests)):
        offsets = offsets_of(counts[first:last])
        part = slice(starts[first], starts[last])
        arrays = [pa.array(digests[first:last], pa.string())]
        arrays += [list_array(offsets, columns[name][part]) for name in schema.names[1:]]
        yield pa.record_batch(arrays, schema=schema)


def sequence_batches(
    schema: pa.Schema, digests: list[str], present: NDArray[np.bool_], columns: Columns
) -> Iterator[pa.RecordBatch]:
    """Record batches of a sequence teacher's unit; rows that are not ``present`` become null."""
    for first, last in rows_in_batches(len(digests)):
        missing = pa.array(~present[first:last])
        arrays = [pa.array(digests[first:last], pa.string())]
        for name in schema.names[1:]:
            flat = plain_array(columns[name][first:last])
            width = columns[name].shape[1]
            arrays.append(pa.FixedSizeListArray.from_arrays(flat.values, width, mask=missing))
        yield pa.record_batch(arrays, schema=schema)
