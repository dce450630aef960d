"""Runs one teacher over one unit (a corpus shard, or one masked replica of it) and returns its
columns.

No files are written here.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from rekindle.data.batch import pad
from rekindle.data.corpus.corpus import Corpus, unit_of
from rekindle.data.errors import InputError
from rekindle.data.storage.columns import split_lists
from rekindle.data.targets.codec import Columns, decode_ids
from rekindle.data.targets.kinds.registry import kind_of
from rekindle.data.targets.reading.positions import target_positions
from rekindle.data.targets.reading.reader import TeacherReader
from rekindle.data.targets.schema import TeacherInfo
from rekindle.data.views.reader import ViewReader
from rekindle.pipeline.caching.batching import joined_columns, padded_inputs, run_batches
from rekindle.pipeline.caching.sampling import row_keys
from rekindle.pipeline.caching.scoring import score_hidden
from rekindle.pipeline.caching.teachers import Teacher

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class UnitResult:
    """A unit's columns in corpus order: an entry per position, or per sequence with a target."""

    rows: Rows  # [P] the row of each
    columns: Columns


class ShardRows:
    """The rows of one corpus shard, as a teacher needs them."""

    def __init__(self, corpus: Corpus, info: TeacherInfo, shard: int):
        self.corpus, self.info, self.shard = corpus, info, shard
        self.batches = [*corpus.shard(shard).batches()]

    def column(self, name: str) -> list:
        """A column of the corpus shard as Python values."""
        return [value for batch in self.batches for value in batch[name].to_pylist()]

    def lists(self, name: str) -> list[NDArray]:
        """A list column of the corpus shard as NumPy arrays."""
        return split_lists(self.batches, name)

    @cached_property
    def wanted(self) -> NDArray[np.bool_]:
        """Rows of the domains the teacher is for."""
        domains = self.column("domain")
        if self.info.domains is None:
            return np.ones(len(domains), bool)
        return np.array([d in self.info.domains for d in domains], bool)


def run_unit(
    teacher: Teacher,
    corpus: Corpus,
    view: ViewReader | None,
    unit: "Unit",
    only: Rows | None = None,
    kept: TeacherReader | None = None,
) -> UnitResult:
    """All targets of ``teacher`` on one unit, or on the rows ``only`` of it.

    ``kept`` reads the ids that tails at further temperatures are taken of.
    """
    rows = ShardRows(corpus, teacher.info, unit.shard)
    if only is not None:
        rows.wanted = rows.wanted & np.isin(np.arange(len(rows.wanted)), only)
    with torch.inference_mode():
        if teacher.config.vocabulary:
            return _vocabulary_unit(teacher, rows, view, unit, kept)
        if kind_of(teacher.info).per_sequence:
            return _sequence_unit(teacher, rows, view, unit)
        return _token_label_unit(teacher, rows)


@dataclass(frozen=True, order=True)
class Unit:
    """One unit of work of a teacher."""

    shard: int
    replica: int | None = None

    @property
    def name(self) -> str:
        """The name of its files."""
        return unit_of(self.shard, self.replica)


def _vocabulary_unit(
    teacher: Teacher,
    shard: ShardRows,
    view: ViewReader | None,
    unit: Unit,
    kept: TeacherReader | None,
) -> UnitResult:
    info, seen = teacher.info, shard.lists("input_ids")
    positions = target_positions(shard.corpus, info, view, unit.shard, unit.replica)
    ahead = info.task == "causal_lm"
    gold = [row[places + ahead] for row, places in zip(seen, positions, strict=True)]
    if view is not None:
        masked = split_lists(view.batches(unit.shard, unit.replica), "input_ids")
        seen = [_replaced(*row) for row in zip(seen, positions, masked, strict=True)]
    counts = np.array([len(p) for p in positions])
    lengths = np.array([len(row) for row in seen]) * (counts > 0) * shard.wanted
    digests = shard.column("digest") if kind_of(info).sampled else []

    def extra(rows: Rows) -> Tensor | None:
        """The stored ids that tails are of, or the keys to draw with."""
        if kept is not None:
            where = [(unit.shard, int(row)) for row in rows]
            _, columns = kept.gather(where, unit.replica, scalars=False)
            return teacher.tensor(decode_ids(columns, info.vocabulary_size or 0))
        if not digests:
            return None
        names = [digests[r] for r in rows for _ in positions[r]]
        places = np.concatenate([positions[r] for r in rows])
        seed = xxhash.xxh3_64_intdigest(f"{info.seed}\0{info.name}".encode())
        return teacher.tensor(row_keys(seed, names, unit.replica, places))

    def forward(rows: Rows) -> Columns:
        inputs, width = padded_inputs(teacher, [seen[r] for r in rows])
        select = np.concatenate([i * width + positions[r] for i, r in enumerate(rows)])
        truth = teacher.tensor(np.concatenate([gold[r] for r in rows]))
        model = teacher.language_model
        hidden, _ = model.hidden(inputs, teacher.tensor(select))
        return joined_columns([*score_hidden(hidden, model.head, truth, info, extra(rows))])

    return _in_corpus_order(run_batches(teacher, lengths, forward), positions)


def _token_label_unit(teacher: Teacher, shard: ShardRows) -> UnitResult:
    """Logits of the teacher's first token of each word, at the corpus position that begins it."""
    texts = shard.column("text")
    prefix, suffix = teacher.tokenizer.prefix, teacher.tokenizer.suffix
    room = teacher.max_length - len(prefix) - len(suffix)
    seen, positions, sources = [], [], []
    for text, encoded, starts, words in zip(
        texts,
        teacher.tokenizer.encode(texts),
        shard.lists("char_starts"),
        shard.lists("word_starts"),
        strict=True,
    ):
        seen.append(np.concatenate([prefix, encoded.ids[:room], suffix]).astype(np.int64))
        places, characters = _word_characters(text, starts, words)
        token = np.searchsorted(encoded.ends[:room], characters, side="right")
        begins = np.append(encoded.starts[:room], len(text) + 1)  # none covers what was cut off
        covered = begins[token] <= characters
        positions.append(places[covered])
        sources.append(token[covered] + len(prefix))
    counts = np.array([len(p) for p in positions])
    lengths = np.array([len(row) for row in seen]) * (counts > 0) * shard.wanted

    def forward(rows: Rows) -> Columns:
        inputs, width = padded_inputs(teacher, [seen[r] for r in rows])
        select = np.concatenate([i * width + sources[r] for i, r in enumerate(rows)])
        logits = teacher.model(**inputs).logits.float().flatten(0, 1)[teacher.tensor(select)]
        return {"logits": _finite(logits, teacher).cpu().numpy()}

    return _in_corpus_order(run_batches(teacher, lengths, forward), positions)


def _word_characters(
    text: str, starts: NDArray[np.int32], words: NDArray[np.bool_]
) -> tuple[Rows, Rows]:
    """Positions that begin a word, and the first character of each that is no white space.

    Byte-level tokens start at the space before their word, where another tokenizer's token ends.
    """
    blank = np.array([*map(str.isspace, text), False])
    solid = np.where(blank, len(text), np.arange(len(text) + 1))
    solid = np.minimum.accumulate(solid[::-1])[::-1]
    places = np.flatnonzero(words & (starts >= 0))
    characters = solid[starts[places]]
    following = np.append(starts[places], len(text))[1:]
    inside = characters < np.maximum(following, starts[places] + 1)  # else it is all white space
    return places[inside], characters[inside]


def _sequence_unit(
    teacher: Teacher, shard: ShardRows, view: ViewReader | None, unit: Unit
) -> UnitResult:
    seen, types = _expert_inputs(teacher, shard, view, unit)
    lengths = np.array([len(row) for row in seen]) * shard.wanted

    def forward(rows: Rows) -> Columns:
        inputs, width = padded_inputs(teacher, [seen[r] for r in rows])
        if types is not None and teacher.token_types:
            kinds = [types[r] for r in rows]
            padded = pad(kinds, np.array([len(k) for k in kinds]), 0, width)
            inputs["token_type_ids"] = teacher.tensor(padded)
        logits = _finite(teacher.model(**inputs).logits.float(), teacher)
        columns = {"logits": logits.cpu().numpy()}
        if teacher.info.monte_carlo_passes:
            columns["mc_probs"] = _monte_carlo(teacher, inputs, unit, rows, logits)
        return columns

    return _in_corpus_order(run_batches(teacher, lengths, forward))


def _expert_inputs(
    teacher: Teacher, shard: ShardRows, view: ViewReader | None, unit: Unit
) -> tuple[list[NDArray], list[NDArray] | None]:
    """The expert's own encoding of each row's text or pair; empty where there is no pair."""
    tokenizer, longest = teacher.tokenizer, teacher.max_length
    if not teacher.config.pair_expert:
        room = longest - len(tokenizer.prefix) - len(tokenizer.suffix)
        texts = tokenizer.encode(shard.column("text"))
        wrapped = [
            np.concatenate([tokenizer.prefix, t.ids[:room], tokenizer.suffix]) for t in texts
        ]
        return [w.astype(np.int64) for w in wrapped], None
    assert view is not None
    batches = view.batches(unit.shard)
    first = [value for b in batches for value in b["text_a"].to_pylist()]
    second = [value for b in batches for value in b["text_b"].to_pylist()]
    encoded = [
        tokenizer.encode_pair(a, b, max_length=longest) if a is not None else ([], [])
        for a, b in zip(first, second, strict=True)
    ]
    return [np.array(i, np.int64) for i, _ in encoded], [np.array(t, np.int64) for _, t in encoded]


def _monte_carlo(
    teacher: Teacher, inputs: dict[str, Tensor], unit: Unit, rows: Rows, logits: Tensor
) -> NDArray:
    """Mean class probabilities over dropout passes; InputError when dropout changes nothing.

    ``logits`` are those of the pass without dropout. Logits are compared, not probabilities: an
    expert may be so sure that the latter are 0 and 1 whatever dropout does.
    """
    name = f"{teacher.info.seed}\0{unit.name}\0{rows.tolist()}".encode()
    torch.manual_seed(xxhash.xxh3_64_intdigest(name) >> 1)
    teacher.model.train()  # dropout on; text models have no batch statistics that this would touch
    try:
        count = teacher.info.monte_carlo_passes
        passes = torch.stack([teacher.model(**inputs).logits.float() for _ in range(count)])
    finally:
        teacher.model.eval()
    # A pass is held against the next, a single one against the pass without dropout.
    other = passes[1:] if len(passes) > 1 else logits
    if not bool((passes[0] != other).any()):
        raise InputError(
            f"teacher {teacher.info.name!r}: {len(passes)} Monte-Carlo passes are identical, so "
            "the model has no dropout to draw uncertainty from. Set hidden_dropout_prob in its "
            "config.json, or monte_carlo.passes to 0"
        )
    return torch.softmax(passes, dim=-1).mean(dim=0).cpu().numpy()


def _in_corpus_order(
    done: Iterator[tuple[Rows, Columns]], positions: list[NDArray[np.int64]] | None = None
) -> UnitResult:
    """Flat columns sorted by corpus row, whose positions ascend already; or one target a row."""
    finished = list(done)
    if not finished:
        return UnitResult(np.zeros(0, np.int64), {})
    rows = np.concatenate([batch for batch, _ in finished])
    columns = joined_columns([found for _, found in finished])
    if positions is not None:
        columns["positions"] = np.concatenate([positions[r] for r in rows]).astype(np.uint16)
        rows = np.repeat(rows, [len(positions[r]) for r in rows])
    order = np.argsort(rows, kind="stable")
    return UnitResult(rows[order], {name: flat[order] for name, flat in columns.items()})


def _finite(logits: Tensor, teacher: Teacher) -> Tensor:
    if not bool(torch.isfinite(logits).all()):
        raise InputError(
            f"teacher {teacher.info.name!r} produced logits that are not finite in "
            f"{teacher.info.precision}; try `precision: fp32` for it, and check the model"
        )
    return logits


def _replaced(ids: NDArray, positions: NDArray[np.int64], values: NDArray) -> NDArray:
    out = ids.copy()
    out[positions] = values
    return out
