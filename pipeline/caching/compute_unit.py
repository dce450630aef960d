"""Runs one teacher over one unit (a corpus shard, or one masked replica of it) and returns its
columns.

No files are written here.
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from rekindle.data.corpus.columns import DOCUMENTS, TOKEN_TYPES, document_numbers, word_characters
from rekindle.data.corpus.encoded import Encoded
from rekindle.data.errors import InputError
from rekindle.data.padding import pad
from rekindle.data.storage.columns import split_lists
from rekindle.data.storage.units import unit_of
from rekindle.data.targets.codec import Columns, decode_ids
from rekindle.data.targets.kinds.embedding import Embedding
from rekindle.data.targets.kinds.registry import kind_of
from rekindle.data.targets.reading.cut import Counts
from rekindle.data.targets.reading.reader import TeacherReader, target_positions
from rekindle.data.targets.schema import MAPPABLE, MAPPED_MASS, TeacherInfo
from rekindle.data.views.pairs import PairView
from rekindle.pipeline.caching.batching import joined_columns, padded_inputs, run_batches
from rekindle.pipeline.caching.in_flight import Arrays, Pending
from rekindle.pipeline.caching.mapped import check_mass
from rekindle.pipeline.caching.sampling import sample_keys
from rekindle.pipeline.caching.scoring import scored_blocks
from rekindle.pipeline.caching.teachers import Teacher
from rekindle.train.embedding.encoder import SentenceEncoder
from rekindle.train.model.causes import explaining_run_errors
from rekindle.train.model.passes import with_known_padding

Rows = NDArray[np.int64]
Inputs = dict[str, Tensor]
Forward = Callable[[Rows, Inputs], Pending]


@dataclass(frozen=True)
class UnitResult:
    """A unit's columns in corpus order: an entry per position, or per sequence with a target."""

    rows: Rows  # [P] the row of each
    columns: Columns
    facts: Mapping[str, object] = field(default_factory=dict)  # to be written into its record
    beside: tuple["UnitResult", ...] = ()  # of teachers that share the passes

    def of(self, number: int) -> "UnitResult":
        """Return one teacher's result: the columns whose names begin with its number."""
        lead, shared = f"{number} ", {k: v for k, v in self.columns.items() if k == "positions"}
        own = {k.removeprefix(lead): v for k, v in self.columns.items() if k.startswith(lead)}
        return replace(self, columns=own | shared)


Steps = Generator[bool, None, UnitResult]


@dataclass(frozen=True, order=True)
class Unit:
    """One unit of work of a teacher."""

    shard: int
    replica: int | None = None

    @property
    def name(self) -> str:
        """The name of its files."""
        return unit_of(self.shard, self.replica)


def run_unit(
    teacher: Teacher,
    unit: Unit,
    only: Rows | None = None,
    kept: TeacherReader | None = None,
    audited: bool = False,
    beside: Sequence[Teacher] = (),
) -> UnitResult:
    """Return all targets of ``teacher`` on one unit, or on its rows ``only``, together with those
    of the teachers ``beside`` it, from the forward passes that they share (``shared_pass.py``).

    ``kept``, if given, reads ids that are cached already: only their tails, at further
    temperatures, are computed. ``audited``: means of Monte-Carlo passes come with their standard
    errors, ``mc_errors``, and vectors are exact.
    """
    steps = begin_unit(teacher, unit, only, kept, audited, beside)
    while True:
        try:
            next(steps)
        except StopIteration as end:
            found: UnitResult = end.value
            return found


def begin_unit(
    teacher: Teacher,
    unit: Unit,
    only: Rows | None = None,
    kept: TeacherReader | None = None,
    audited: bool = False,
    beside: Sequence[Teacher] = (),
) -> Steps:
    """Run ``run_unit`` in steps; yield for each batch on the device whether it is the last."""
    run = UnitRun(teacher, unit, only, audited)
    if teacher.config.vocabulary:
        return run.vocabulary(kept, beside)
    if teacher.encoder is not None:
        return run.vectors(teacher.encoder)
    return run.sequences() if kind_of(teacher.info).per_sequence else run.token_labels()


class UnitRun:
    """A teacher and the rows of one unit."""

    def __init__(self, teacher: Teacher, unit: Unit, only: Rows | None, audited: bool = False):
        self.audited = audited
        self.teacher, self.unit, self.view, self.info = teacher, unit, teacher.view, teacher.info
        self.table = teacher.corpus.shard(unit.shard).table()
        self.batches = self.table.to_batches()
        domains, chosen = self.table["domain"].to_pylist(), self.info.domains
        self.wanted = np.array([chosen is None or domain in chosen for domain in domains], bool)
        if only is not None:
            self.wanted &= np.isin(np.arange(len(domains)), only)
        self.facts: Mapping[str, object] = {}

    def vocabulary(self, kept: TeacherReader | None, beside: Sequence[Teacher] = ()) -> Steps:
        """Compute the kept part of each position's distribution, also for teachers ``beside``."""
        teacher, info, unit = self.teacher, self.info, self.unit
        seen = read = split_lists(self.batches, "input_ids")
        positions = target_positions(teacher.corpus, info, self.view, unit.shard, unit.replica)
        ahead, sources = info.task == "causal_lm", positions
        gold = [row[places + ahead] for row, places in zip(seen, positions, strict=True)]
        if self.view is not None:
            masked = split_lists(self.view.batches(unit.shard, unit.replica), "input_ids")
            seen = [row.copy() for row in seen]
            for row, places, ids in zip(seen, positions, masked, strict=True):
                row[places] = ids
        if teacher.map is not None:
            seen, sources, positions, expected = teacher.map.of_rows(self.table, teacher.max_length)
            self.facts = {MAPPABLE: int(expected[self.wanted].sum())}
            gold = [row[at + 1] for row, at in zip(read, positions, strict=True)]
        digests = self.table["digest"].to_pylist()

        def extra(info: TeacherInfo, rows: Rows) -> Tensor | None:
            """Return the stored ids that the tails belong to, or the keys to draw with."""
            if kept is not None:
                where = [(unit.shard, int(row)) for row in rows]
                _, columns = kept.gather(where, unit.replica, scalars=False)
                return teacher.tensor(decode_ids(columns, info.vocabulary_size or 0))
            if not kind_of(info).is_sample:
                return None
            names = [digests[r] for r in rows for _ in positions[r]]
            places = np.concatenate([positions[r] for r in rows])
            return teacher.tensor(sample_keys(info, names, unit.replica, places))

        def forward(rows: Rows, inputs: Inputs) -> Pending:
            truth = teacher.tensor(np.concatenate([gold[r] for r in rows]))
            model = teacher.language_model
            selected = self._selected(inputs, rows, sources)
            hidden, _ = model.hidden(with_known_padding(inputs), selected)
            pending: list[list[Pending]] = []
            for each in (teacher, *beside):
                more, tokens = extra(each.info, rows), each.token_columns
                scored = scored_blocks(hidden, model.head, truth, each.info, more, tokens)
                pending.append([teacher.way.fetch(found, s.encoded) for s, found in scored])

            def read() -> Columns:
                joined = (joined_columns([block() for block in blocks]) for blocks in pending)
                return {f"{n} {name}": v for n, one in enumerate(joined) for name, v in one.items()}

            return read

        types = split_lists(self.batches, TOKEN_TYPES) if teacher.corpus.has_pairs else None
        joint = yield from self._run(seen, forward, positions, types, self._documents())
        if teacher.map is not None:
            joint = self._with_mass(joint)
        own, *others = (joint.of(number) for number in range(1 + len(beside)))
        return replace(own, beside=tuple(others))

    def _with_mass(self, made: UnitResult) -> UnitResult:
        """Move the mass of the tokens in both vocabularies from the columns to the facts."""
        columns = dict(made.columns)
        mass = [columns.pop(name) for name in made.columns if name.endswith(f" {MAPPED_MASS}")]
        if not mass:
            return made
        check_mass(mass[0], self.info.name, self.teacher.config.map_coverage)
        facts = {**made.facts, MAPPED_MASS: float(mass[0].mean())}
        return replace(made, columns=columns, facts=facts)

    def _documents(self) -> list[NDArray] | None:
        """Return the document number of each token of a row; None if each row is one document."""
        if not self.teacher.corpus.is_packed:
            return None
        lengths = [len(ids) for ids in split_lists(self.batches, "input_ids")]
        numbers = np.concatenate([document_numbers(batch) for batch in self.batches])
        return np.split(numbers, np.cumsum(lengths)[:-1])

    def token_labels(self) -> Steps:
        """Compute the logits of each word's first token, at its corpus position."""
        teacher, texts = self.teacher, self.table["text"].to_pylist()
        encoded = teacher.tokenizer.encode(texts)
        seen, room = self._wrapped(encoded)
        lists = [split_lists(self.batches, name) for name in ("char_starts", "word_starts")]
        positions, sources = [], []
        for text, tokens, starts, begin_words in zip(texts, encoded, *lists, strict=True):
            places, characters = word_characters(text, starts, begin_words)
            token = tokens.tokens_at(characters, room)
            covered = token >= 0
            positions.append(places[covered])
            sources.append(token[covered] + len(teacher.tokenizer.prefix))

        def forward(rows: Rows, inputs: Inputs) -> Pending:
            logits = self._logits(inputs).flatten(0, 1)
            return self._fetch(logits[self._selected(inputs, rows, sources)])

        return (yield from self._run(seen, forward, positions))

    def sequences(self) -> Steps:
        """Compute the logits of each sequence, or of each pair."""
        seen, types = self._expert_inputs()

        def forward(rows: Rows, inputs: Inputs) -> Pending:
            logits = self._logits(inputs)
            passes = self.info.monte_carlo_passes
            return self._fetch(logits, self._monte_carlo(inputs, rows, logits) if passes else {})

        return (yield from self._run(seen, forward, types=types))

    def vectors(self, encoder: SentenceEncoder) -> Steps:
        """Compute a vector of each sequence, as stored; for an audit, the exact one."""
        texts = self.teacher.plan.read_as(self.table["text"].to_pylist())
        seen, _ = self._wrapped(self.teacher.tokenizer.encode([*texts]))

        def forward(rows: Rows, inputs: Inputs) -> Pending:
            with explaining_run_errors(f"teacher {self.info.name!r} ({self.info.model})"):
                found = encoder(with_known_padding(inputs), self.teacher.skipped)
            return self.teacher.way.fetch({"vectors": found}, dict)

        made = yield from self._run(seen, forward)
        kind = kind_of(self.info)
        if self.audited or not len(made.rows) or not isinstance(kind, Embedding):
            return made
        columns, facts = kind.stored(made.columns["vectors"])
        return replace(made, columns=columns, facts={**made.facts, **facts})

    def _logits(self, inputs: Inputs) -> Tensor:
        """Return an expert's logits in fp32; raise InputError if its own code fails."""
        with explaining_run_errors(f"teacher {self.info.name!r} ({self.info.model})"):
            logits: Tensor = self.teacher.model(**with_known_padding(inputs)).logits.float()
        return logits

    def _expert_inputs(self) -> tuple[list[NDArray], list[NDArray] | None]:
        """Encode each row's text or pair with the expert's tokenizer; empty without a pair."""
        tokenizer, longest = self.teacher.tokenizer, self.teacher.max_length
        if not self.teacher.config.pair_expert:
            return self._wrapped(tokenizer.encode(self.table["text"].to_pylist()))[0], None
        assert self.view is not None
        cut = PairView.cut_of(self.view.identity)
        batches = self.view.batches(self.unit.shard)
        texts = ([t for b in batches for t in b[name].to_pylist()] for name in ("text_a", "text_b"))
        pairs = list(zip(*texts, strict=True))
        encoded = [
            tokenizer.encode_pair(a, b, longest, cut) if a is not None else ([], [])
            for a, b in pairs
        ]
        ids, types = ([np.array(pair[part], np.int64) for pair in encoded] for part in (0, 1))
        whole = np.array([len(row) for row in ids], np.int64)
        full = np.flatnonzero(whole == longest)  # those that may have been cut
        if len(full):
            whole[full] = tokenizer.uncut_lengths(*zip(*(pairs[row] for row in full), strict=True))
        self._tell_cut(whole)
        return ids, types

    def _monte_carlo(self, inputs: Inputs, rows: Rows, logits: Tensor) -> dict[str, Tensor]:
        """Return mean class probabilities over dropout passes, and whether dropout has an effect.

        ``logits`` are those of the pass without dropout. Logits are compared, not probabilities:
        those of a very confident expert may be 0 and 1 whatever dropout does.
        """
        model, name = self.teacher.model, f"{self.info.seed}\0{self.unit.name}\0{rows.tolist()}"
        torch.manual_seed(xxhash.xxh3_64_intdigest(name.encode()) >> 1)
        model.train()  # dropout on; text models have no batch statistics that this would change
        try:
            count = self.info.monte_carlo_passes
            passes = torch.stack([self._logits(inputs) for _ in range(count)])
        finally:
            model.eval()
        # Each pass is compared with the next, a single one with the pass without dropout.
        other = passes[1:] if len(passes) > 1 else logits
        probs = torch.softmax(passes, dim=-1)
        found = {"mc_probs": probs.mean(dim=0), "drawn": (passes[0] != other).any()}
        if self.audited:
            found["mc_errors"] = probs.std(dim=0, correction=min(1, count - 1)) / count**0.5
        return found

    def _wrapped(self, texts: list[Encoded]) -> tuple[list[NDArray], int]:
        """Return each text's ids between special tokens, and how many ids of a text fit."""
        prefix, suffix = self.teacher.tokenizer.prefix, self.teacher.tokenizer.suffix
        room = self.teacher.max_length - len(prefix) - len(suffix)
        whole = np.array([len(text.ids) for text in texts], np.int64) + len(prefix) + len(suffix)
        if len(whole) > 1 and not whole.any():
            raise InputError(
                f"teacher {self.info.name!r}: its tokenizer gives no token for any of "
                f"{len(whole)} texts, so it would judge none. Save the tokenizer it was "
                f"trained with into its folder ({self.info.model})"
            )
        self._tell_cut(whole)
        wrapped = (np.concatenate([prefix, text.ids[:room], suffix]) for text in texts)
        return [ids.astype(np.int64) for ids in wrapped], room

    def _tell_cut(self, lengths: NDArray[np.int64]) -> None:
        """Record how many of the texts, given their lengths in tokens, are cut."""
        limit = self.teacher.max_length
        short = limit < self.teacher.corpus.info["config"]["sequence_length"]
        self.facts = Counts.of(lengths * self.wanted, limit).facts(short)

    def _selected(self, inputs: Inputs, rows: Rows, places: list[Rows]) -> Tensor:
        """Return where the ``places`` of some rows lie in a batch of them, flattened."""
        width = inputs["input_ids"].shape[1]
        flat = np.concatenate([i * width + places[r] for i, r in enumerate(rows)])
        return self.teacher.tensor(flat)

    def _fetch(self, logits: Tensor, more: Mapping[str, Tensor] | None = None) -> Pending:
        """Fetch an expert's logits, and ``more`` from ``_monte_carlo``."""
        found = {"logits": logits, **(more or {}), "finite": torch.isfinite(logits).all()}
        return self.teacher.way.fetch(found, self._checked)

    def _checked(self, found: Arrays) -> Columns:
        """Raise InputError for logits that are not finite, and if dropout changes nothing."""
        if not found.pop("finite"):
            raise InputError(
                f"teacher {self.info.name!r} produced logits that are not finite in "
                f"{self.info.precision}; try `precision: fp32` for it, and check the model"
            )
        if not found.pop("drawn", True):
            raise InputError(
                f"teacher {self.info.name!r}: {self.info.monte_carlo_passes} Monte-Carlo passes "
                "are identical, so the model has no dropout to draw uncertainty from. Set "
                "hidden_dropout_prob in its config.json, or monte_carlo.passes to 0"
            )
        return found

    def _run(
        self,
        seen: list[NDArray],
        forward: Forward,
        positions: list[Rows] | None = None,
        types: list[NDArray] | None = None,
        documents: list[NDArray] | None = None,
    ) -> Steps:
        """Return the columns of the rows that have a target, in the order of the corpus; ``seen``
        are the ids shown to the teacher. ``types``: the segment ids of pairs; ``documents``: the
        document numbers of rows of several documents.

        ``forward`` returns the columns of a batch: an entry for each of its ``positions``, which
        ascend, or for each row. Rows without a token or a position are left out.
        """
        lengths = np.array([len(row) for row in seen]) * self.wanted
        if positions is not None:
            lengths *= np.array([len(row) > 0 for row in positions])

        @torch.inference_mode()
        def of_batch(rows: Rows) -> Pending:
            inputs = padded_inputs(self.teacher, [seen[r] for r in rows])
            if types is not None and self.teacher.token_types:
                kinds = [types[r] for r in rows]
                padded = pad(kinds, np.array([len(k) for k in kinds]), 0)
                inputs["token_type_ids"] = self.teacher.tensor(padded)
            if documents is not None:
                told = [documents[r] for r in rows]
                numbers = pad(told, np.array([len(row) for row in told]), -1)
                if (numbers > 0).any():
                    inputs[DOCUMENTS] = self.teacher.tensor(numbers)
            return forward(rows, inputs)

        finished: list[tuple[Rows, Columns]] = []
        for batch in run_batches(self.teacher, lengths, of_batch):
            if isinstance(batch, bool):
                yield batch
            else:
                finished.append(batch)
        if not finished:
            return UnitResult(np.zeros(0, np.int64), {}, self.facts)
        rows = np.concatenate([of for of, _ in finished])
        columns = joined_columns([found for _, found in finished])
        if positions is not None:
            columns["positions"] = np.concatenate([positions[r] for r in rows]).astype(np.uint16)
            rows = np.repeat(rows, [len(positions[r]) for r in rows])
        order = np.argsort(rows, kind="stable")
        ordered = {name: flat[order] for name, flat in columns.items()}
        return UnitResult(rows[order], ordered, self.facts)
