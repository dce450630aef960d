"""What a teacher leaves in the cache: ``teacher.json``, its columns, its values in Python.

Format version 1. ``targets/<teacher>/data/<unit>-<attempt>.arrow`` is row-aligned with the corpus
shard of the same number; its first column repeats the example digest. Kinds:

``topk``      vocabulary teachers, per position: the columns of the codec and the scalars below
``threshold`` the same, of a sample of exactly K ids at one temperature (``caching/sampling.py``)
``random``    a sample of K draws: ``distinct`` uint8 [P], how many ids were drawn; all positions'
              ``ids`` uint16 (and ``ids_high`` uint8) and ``counts`` uint8, one after another
``dense``     vocabulary teachers, per position: ``log_probs`` float32 [P,V] at τ = 1, the scalars
``hidden``    per position what the output matrix multiplies: ``hidden`` int16 [P,H] times
              ``hidden_scale`` float32 [P], the scalars; the matrix lies in ``head.safetensors``
``tails``     an extension of a topk teacher: ``tail_log_odds`` int16 [P,T] of its kept ids at
              further temperatures
``sequence``  sequence classification and regression (C = 1), per row: ``logits`` float32 [C], null
              where the teacher does not apply; ``mc_probs`` float32 [C] with Monte-Carlo passes
``token``     token classification, per position: ``logits`` float32 [P,C]

Codecs of topk and threshold: ``codec.py`` (default), ``codec_precise.py``, ``codec_compact.py``.

A larger k or further temperatures are kept beside what is there, in
``targets/<teacher>/extensions/<part>/``, each with a ``teacher.json``, data and commits of its own.

Scalars per position: ``gold_log_prob`` (uint16, −log-prob of the true token in 1/1024 nat),
``gold_rank`` (number of tokens with a larger logit), ``entropy`` (uint16, 1/1024 nat).
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from rekindle.data.settings import Settings
from rekindle.data.storage.columns import list_array, list_type, offsets_of, plain_array
from rekindle.data.storage.seal import FORMAT_VERSION
from rekindle.data.storage.shards import ROWS_PER_BATCH, describe, rows_in_batches
from rekindle.data.targets.codec import high_bytes, high_planes
from rekindle.data.targets.codec_compact import LARGEST_VOCABULARY, compact_columns, to_compact
from rekindle.data.targets.lineage import Ancestor

TEACHER_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"  # it becomes a folder
LONGEST_PART = 60
PART_NAME = rf"^[a-z0-9.-]{{0,{LONGEST_PART}}}$"  # so does this
Task = Literal[
    "masked_lm", "causal_lm", "sequence_classification", "regression", "token_classification"
]
Kind = Literal["topk", "threshold", "random", "dense", "hidden", "tails", "sequence", "token"]
Codec = Literal["default", "precise", "compact"]
VOCABULARY_TASKS = ("masked_lm", "causal_lm")
SAMPLED = ("threshold", "random")  # unbiased, at the one temperature they were drawn at
SPARSE = ("topk", "threshold")  # K candidates a position, in one of the codecs
MOST_DRAWS = 255  # of a sample: a count is stored in a byte
SCALARS = ("positions", "gold_log_prob", "gold_rank", "entropy")
Columns = dict[str, NDArray]


class TeacherInfo(Settings):
    """``teacher.json``: all that decides a teacher's targets, and what is needed to read them."""

    name: str = Field(pattern=TEACHER_NAME)
    task: Task
    kind: Kind
    view: str  # what it saw: "clean", "text", "masked-<fp>" or "pairs-<kind>-<fp>"
    vocabulary_size: int | None = Field(None, gt=0)  # real tokens, without the head's padding
    k: int | None = Field(None, gt=0)
    temperatures: tuple[float, ...] = ()
    num_labels: int | None = Field(None, gt=0)
    label_names: tuple[str, ...] = ()
    problem: str | None = None
    domains: tuple[str, ...] | None = None
    monte_carlo_passes: int = Field(0, ge=0)
    seed: int = 0  # of Monte-Carlo passes and of samples
    precision: str = "fp32"
    estimator: dict[str, str] = Field(default_factory=dict)  # kind and its bias class
    codec: Codec = "default"
    rows_per_batch: int = Field(ROWS_PER_BATCH, gt=0, le=ROWS_PER_BATCH)
    hidden_size: int | None = Field(None, gt=0)
    part: str = Field("", pattern=PART_NAME)  # "" or the extension this is
    extends: str | None = None  # of tails: the part whose ids they belong to
    fingerprints: dict[str, str | None] = Field(default_factory=dict)  # weights, config, tokenizer
    versions: dict[str, str] = Field(default_factory=dict)  # informative, not enforced
    model: str = ""  # where it was loaded from; informative
    lineage: tuple[Ancestor, ...] = ()  # of a student: the runs that made it; informative

    @model_serializer(mode="wrap")
    def _without_an_empty_lineage(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """As before there were lineages: earlier versions refuse a key that they do not know."""
        values: dict[str, Any] = handler(self)
        return {key: value for key, value in values.items() if key != "lineage" or value}

    def identity(self) -> dict:
        """What must be equal for two runs to be the same teacher."""
        return self.model_dump(mode="json", exclude={"versions", "model", "lineage"})

    def identity_of_model(self) -> dict:
        """What a teacher's extensions share with it: all but what is kept of its output."""
        kept = {"kind", "k", "temperatures", "estimator", "part", "extends", "rows_per_batch"}
        kept |= {"codec"}  # tails have none
        return {key: value for key, value in self.identity().items() if key not in kept}

    @property
    def folder(self) -> str:
        """Where its shards are."""
        base = f"targets/{self.name}"
        return f"{base}/extensions/{self.part}" if self.part else base

    @property
    def is_vocabulary(self) -> bool:
        """Whether its targets are distributions over the vocabulary."""
        return self.task in VOCABULARY_TASKS

    @property
    def sees_clean_text(self) -> bool:
        """Whether it is a masked LM that was shown nothing masked: it has a target for every
        content token, at the token itself (a causal LM's is at the token before).
        """
        return self.task == "masked_lm" and self.view == "clean"


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


def contradiction(info: TeacherInfo) -> str | None:
    """Why there can be no such targets, if so: what readers rely on, once teacher.json is read."""
    kinds = {"token_classification": ("token",)} | dict.fromkeys(
        VOCABULARY_TASKS, (*SPARSE, "random", "dense", "hidden", "tails")
    )
    shown: dict[str, str | tuple[str, ...]]
    shown = {"masked_lm": ("masked-", "clean"), "causal_lm": "clean"}
    shown |= {"token_classification": "text"}
    needs = {"sequence": "num_labels", "token": "num_labels", "hidden": "hidden_size"}
    needs |= dict.fromkeys((*SPARSE, "random"), "k")
    size, k = info.vocabulary_size, info.k
    rules = {
        "its kind is not of its task": info.kind in kinds.get(info.task, ("sequence",)),
        "its view is not of its task": info.view.startswith(
            shown.get(info.task, ("text", "pairs-"))
        ),
        "its size is missing": getattr(info, needs.get(info.kind, "kind")) is not None
        and (size is not None or not info.is_vocabulary or info.kind == "tails"),
        "its sizes are too large": max(size or 0, info.num_labels or 0, info.hidden_size or 0)
        < 2**31,
        "its k is too large": k is None
        or info.kind not in (*SPARSE, "random")
        or k <= (MOST_DRAWS if info.kind == "random" else size or 0),
        "its temperatures are none": all(0 < t < math.inf for t in info.temperatures)
        and (len(info.temperatures) > 0 or info.kind not in (*SPARSE, "random", "tails")),
        "its codec is not of its kind": info.codec == "default"
        or (
            info.kind in (*SPARSE, "tails")
            and (info.codec != "compact" or (size or 0) <= LARGEST_VOCABULARY)
        ),
        "tails extend a part": (info.kind == "tails") == (info.extends is not None)
        and (info.kind != "tails" or info.part != ""),
    }
    return next((told for told, kept in rules.items() if not kept), None)


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
        fields += [pa.field(n, list_type(t)) for n, t in entry_columns(info).items()]
    described = {
        "kind": "targets",
        "format_version": FORMAT_VERSION,
        "teacher": info.model_dump(mode="json"),
    }
    return describe(fields, described | dict(about))


def position_columns(info: TeacherInfo) -> dict[str, tuple[pa.DataType, int | None]]:
    """Name -> (value type, width per position) of the columns with one entry per position."""
    columns: dict[str, tuple[pa.DataType, int | None]] = {"positions": (pa.uint16(), None)}
    if info.kind == "token":
        return columns | {"logits": (pa.float32(), info.num_labels)}
    if info.kind == "tails":
        return columns | {"tail_log_odds": (pa.int16(), len(info.temperatures))}
    assert info.vocabulary_size is not None
    columns |= _target_columns(info)
    rank = pa.from_numpy_dtype(rank_dtype(info.vocabulary_size))
    columns |= {
        "gold_log_prob": (pa.uint16(), None),
        "gold_rank": (rank, None),
        "entropy": (pa.uint16(), None),
    }
    return compact_columns(columns, info.vocabulary_size) if info.codec == "compact" else columns


def _target_columns(info: TeacherInfo) -> dict[str, tuple[pa.DataType, int | None]]:
    assert info.vocabulary_size is not None
    if info.kind == "dense":
        return {"log_probs": (pa.float32(), info.vocabulary_size)}
    if info.kind == "hidden":
        return {"hidden": (pa.int16(), info.hidden_size), "hidden_scale": (pa.float32(), None)}
    if info.kind == "random":
        return {"distinct": (pa.uint8(), None)}
    assert info.k is not None
    columns: dict[str, tuple[pa.DataType, int | None]] = {"ids": (pa.uint16(), info.k)}
    if width := high_bytes(info.vocabulary_size, info.k):
        columns["ids_high"] = (pa.uint8(), width)
    tails = {"tail_log_odds": (pa.int16(), len(info.temperatures))}
    if info.codec == "precise":
        columns |= {"values": (pa.uint16(), info.k), "log_prob_max": (pa.uint16(), None)}
        return columns | tails
    columns |= {
        "values": (pa.uint8(), info.k),
        "log_prob_max": (pa.uint16(), None),
        "log_prob_min": (pa.uint16(), None),
    }
    return columns | tails


def entry_columns(info: TeacherInfo) -> dict[str, pa.DataType]:
    """Name -> value type of the columns with one entry per drawn id (``random`` only)."""
    if info.kind != "random":
        return {}
    assert info.vocabulary_size is not None
    high = {"ids_high": pa.uint8()} if high_planes(info.vocabulary_size) else {}
    return {"ids": pa.uint16(), **high, "counts": pa.uint8()}


def no_positions(info: TeacherInfo) -> Columns:
    """The columns, as they are used, of a unit in which the teacher has nothing to say."""
    plain = info.model_copy(update={"codec": "default"}) if info.codec == "compact" else info
    columns = {
        name: np.zeros((0,) if width is None else (0, width), dtype.to_pandas_dtype())
        for name, (dtype, width) in position_columns(plain).items()
    }
    if info.kind == "random":
        columns.pop("distinct")
        columns |= {
            "ids": np.zeros((0, info.k or 0), np.int32),
            "counts": np.zeros((0, info.k or 0), np.uint8),
        }
    return columns


def position_batches(
    schema: pa.Schema,
    info: TeacherInfo,
    digests: list[str],
    rows: NDArray[np.int64],
    columns: Columns,
) -> Iterator[pa.RecordBatch]:
    """Record batches of a unit from flat columns [P,…], where ``rows`` [P] ascends."""
    counts = np.bincount(rows, minlength=len(digests))
    starts = np.concatenate([[0], np.cumsum(counts)])
    for first, last in rows_in_batches(len(digests), info.rows_per_batch):
        part = slice(starts[first], starts[last])
        stored = stored_columns(info, {name: flat[part] for name, flat in columns.items()})
        offsets = {False: offsets_of(counts[first:last])}
        if info.kind == "random":
            row = rows[part] - first
            drawn = np.bincount(row, stored["distinct"], minlength=last - first)
            offsets[True] = offsets_of(drawn.astype(np.int64))
        entries = entry_columns(info)
        arrays = [pa.array(digests[first:last], pa.string())]
        arrays += [list_array(offsets[name in entries], stored[name]) for name in schema.names[1:]]
        yield pa.record_batch(arrays, schema=schema)


def stored_columns(info: TeacherInfo, columns: Columns) -> Columns:
    """The columns of some positions as a shard keeps them, from those that are used."""
    assert info.kind != "sequence"
    if info.codec == "compact":
        return to_compact(columns, info.vocabulary_size or 0)
    if info.kind != "random":
        return columns
    ids, counts = columns["ids"], columns["counts"]
    drawn = counts > 0
    plain = {name: columns[name] for name in position_columns(info) if name != "distinct"}
    high = {"ids_high": (ids[drawn] >> 16).astype(np.uint8)}
    return plain | {
        "distinct": drawn.sum(axis=1).astype(np.uint8),
        "ids": (ids[drawn] & 0xFFFF).astype(np.uint16),
        **(high if high_planes(info.vocabulary_size or 0) else {}),
        "counts": counts[drawn],
    }


def drawn_columns(columns: Columns, draws: int) -> Columns:
    """The inverse for ``random``: ids int32 [P,K], −1 where fewer were drawn, and counts [P,K]."""
    distinct = columns["distinct"]
    here = np.arange(draws) < distinct[:, None]
    ids = columns["ids"].astype(np.int32)
    if "ids_high" in columns:
        ids |= columns["ids_high"].astype(np.int32) << 16
    padded = np.full(here.shape, -1, np.int32)
    counts = np.zeros(here.shape, np.uint8)
    padded[here], counts[here] = ids, columns["counts"]
    rest = {n: v for n, v in columns.items() if n not in ("distinct", "ids", "ids_high", "counts")}
    return rest | {"ids": padded, "counts": counts}


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
