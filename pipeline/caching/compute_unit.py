"""Runs one teacher over one unit (a corpus shard, or one masked replica of it) and returns its
columns. Writes no files.
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
from rekindle.data.storage.columns import split_lists
from rekindle.data.storage.units import unit_of
from rekindle.data.targets.codec import Columns, decode_ids
from rekindle.data.targets.kinds.embedding import Embedding
from rekindle.data.targets.kinds.registry import kind_of
from rekindle.data.targets.reading.cut import Counts
from rekindle.data.targets.reading.reader import TeacherReader, target_positions
from rekindle.data.targets.schema import MAPPABLE, MAPPED_MASS, TeacherInfo
from rekindle.data.views.pairs import PairView
from rekindle.pipeline.caching.batching import joined_columns, padded, padded_inputs, run_batches
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
    others: tuple["UnitResult", ...] = ()  # of the other teachers that share the passes

    def of_teacher(self, number: int) -> "UnitResult":
        """Return one teacher's result: the columns whose names begin with its number."""
        lead, columns = f"{number} ", self.columns.items()
        own = {name.removeprefix(lead): v for name, v in columns if name.startswith(lead)}
        return replace(self, columns=own | {n: v for n, v in columns if n == "positions"})


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
    only_rows: Rows | None = None,
    stored: TeacherReader | None = None,
    for_audit: bool = False,
    others: Sequence[Teacher] = (),
) -> UnitResult:
    """Return all targets of ``teacher`` on one unit (or on its rows ``only_rows``) and of the
    ``others`` that share its forward passes (``shared_pass.py``).

    ``stored`` reads cached ids: only their tails, at further temperatures, are then computed.
    ``for_audit``: means of Monte-Carlo passes come with standard errors, and vectors are exact.
    """
    steps = begin_unit(teacher, unit, only_rows, stored, for_audit, others)
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: UnitResult = end.value
            return result


def begin_unit(
    teacher: Teacher,
    unit: Unit,
    only_rows: Rows | None = None,
    stored: TeacherReader | None = None,
    for_audit: bool = False,
    others: Sequence[Teacher] = (),
) -> Steps:
    """Do as ``run_unit`` in steps; yield for each batch on the device whether it is the last."""
    run = UnitRun(teacher, unit, only_rows, for_audit)
    if teacher.config.vocabulary:
        return run.run_vocabulary(stored, others)
    if teacher.encoder is not None:
        return run.run_vectors(teacher.encoder)
    return run.run_sequences() if kind_of(teacher.info).per_sequence else run.run_token_labels()


class UnitRun:
    """A teacher and the rows of one unit."""

    def __init__(self, teacher: Teacher, unit: Unit, only_rows: Rows | None, for_audit: bool):
        self.for_audit = for_audit
        self.teacher, self.unit, self.view, self.info = teacher, unit, teacher.view, teacher.info
        self.table = teacher.corpus.shard(unit.shard).table()
        self.batches = self.table.to_batches()
        domains, taught = self.table["domain"].to_pylist(), self.info.domains
        self.included = np.array([taught is None or domain in taught for domain in domains], bool)
        if only_rows is not None:
            self.included &= np.isin(np.arange(len(domains)), only_rows)
        self.facts: Mapping[str, object] = {}

    def run_vocabulary(self, stored: TeacherReader | None, others: Sequence[Teacher] = ()) -> Steps:
        """Compute the kept part of each position's distribution, for the ``others`` too."""
        teacher, info, unit = self.teacher, self.info, self.unit
        shown_ids = corpus_ids = split_lists(self.batches, "input_ids")
        positions = target_positions(teacher.corpus, info, self.view, unit.shard, unit.replica)
        offset, sources = info.task == "causal_lm", positions
        gold_ids = [row[at + offset] for row, at in zip(shown_ids, positions, strict=True)]
        if self.view is not None:
            masked_ids = split_lists(self.view.batches(unit.shard, unit.replica), "input_ids")
            shown_ids = [row.copy() for row in shown_ids]
            for row, at, ids in zip(shown_ids, positions, masked_ids, strict=True):
                row[at] = ids
        if teacher.map is not None:
            mapped_rows = teacher.map.map_rows(self.table, teacher.max_length)
            shown_ids, sources, positions, expected = mapped_rows
            self.facts = {MAPPABLE: int(expected[self.included].sum())}
            gold_ids = [row[at + 1] for row, at in zip(corpus_ids, positions, strict=True)]
        digests = self.table["digest"].to_pylist()

        def extra(info: TeacherInfo, rows: Rows) -> Tensor | None:
            """Return the stored ids that the tails belong to, or the keys to draw with."""
            if stored is not None:
                shard_rows = [(unit.shard, int(row)) for row in rows]
                _, columns = stored.gather(shard_rows, unit.replica, scalars=False)
                return teacher.tensor(decode_ids(columns, info.vocabulary_size or 0))
            if not kind_of(info).is_sample:
                return None
            row_digests = [digests[r] for r in rows for _ in positions[r]]
            places = np.concatenate([positions[r] for r in rows])
            return teacher.tensor(sample_keys(info, row_digests, unit.replica, places))

        def forward(rows: Rows, inputs: Inputs) -> Pending:
            truth = teacher.tensor(np.concatenate([gold_ids[r] for r in rows]))
            model, chosen = teacher.language_model, self._flat_indices(inputs, rows, sources)
            hidden, _ = model.hidden(with_known_padding(inputs, self.teacher.model.config), chosen)
            pending: list[list[Pending]] = []
            for sharer in (teacher, *others):
                more, columns = extra(sharer.info, rows), sharer.token_columns
                blocks = scored_blocks(hidden, model.head, truth, sharer.info, more, columns)
                pending.append([teacher.transfer.fetch(kept, finish) for finish, kept in blocks])

            def read_columns() -> Columns:
                joined = {}
                for number, blocks in enumerate(pending):
                    for name, values in joined_columns([block() for block in blocks]).items():
                        joined[f"{number} {name}"] = values
                return joined

            return read_columns

        segment_ids = split_lists(self.batches, TOKEN_TYPES) if teacher.corpus.has_pairs else None
        inputs = (shown_ids, forward, positions, segment_ids, self._document_numbers())
        combined = yield from self._run_batches(*inputs)
        if teacher.map is not None:
            combined = self._mass_as_fact(combined)
        first, *rest = (combined.of_teacher(number) for number in range(1 + len(others)))
        return replace(first, others=tuple(rest))

    def _mass_as_fact(self, result: UnitResult) -> UnitResult:
        """Move the mass of the tokens in both vocabularies from the columns to the facts."""
        columns = dict(result.columns)
        mass = [columns.pop(name) for name in result.columns if name.endswith(f" {MAPPED_MASS}")]
        if not mass:
            return result
        check_mass(mass[0], self.info.name, self.teacher.config.map_coverage)
        facts = {**result.facts, MAPPED_MASS: float(mass[0].mean())}
        return replace(result, columns=columns, facts=facts)

    def _document_numbers(self) -> list[NDArray] | None:
        """Return the document number of each token of a row; None if each row is one document."""
        if not self.teacher.corpus.is_packed:
            return None
        lengths = [len(ids) for ids in split_lists(self.batches, "input_ids")]
        numbers = np.concatenate([document_numbers(batch) for batch in self.batches])
        return np.split(numbers, np.cumsum(lengths)[:-1])

    def run_token_labels(self) -> Steps:
        """Compute the logits of each word's first token, at its corpus position."""
        texts = self.table["text"].to_pylist()
        encoded = self.teacher.tokenizer.encode(texts)
        shown_ids, token_limit = self._with_special_tokens(encoded)
        lists = [split_lists(self.batches, name) for name in ("char_starts", "word_starts")]
        positions, sources = [], []
        for text, tokens, starts, word_starts in zip(texts, encoded, *lists, strict=True):
            word_positions, characters = word_characters(text, starts, word_starts)
            token_indices = tokens.tokens_at(characters, token_limit)
            covered = token_indices >= 0
            positions.append(word_positions[covered])
            sources.append(token_indices[covered] + len(self.teacher.tokenizer.prefix))

        def forward(rows: Rows, inputs: Inputs) -> Pending:
            logits = self._logits(inputs).flatten(0, 1)
            return self._fetch_logits(logits[self._flat_indices(inputs, rows, sources)])

        return (yield from self._run_batches(shown_ids, forward, positions))

    def run_sequences(self) -> Steps:
        """Compute the logits of each sequence, or of each pair."""
        shown_ids, segment_ids = self._expert_inputs()

        def forward(rows: Rows, inputs: Inputs) -> Pending:
            logits = self._logits(inputs)
            if not self.info.monte_carlo_passes:
                return self._fetch_logits(logits, {})
            return self._fetch_logits(logits, self._monte_carlo(inputs, rows, logits))

        return (yield from self._run_batches(shown_ids, forward, segment_ids=segment_ids))

    def run_vectors(self, encoder: SentenceEncoder) -> Steps:
        """Compute a vector of each sequence, as stored; for an audit, the exact one."""
        texts = self.teacher.plan.with_prompt(self.table["text"].to_pylist())
        shown_ids, _ = self._with_special_tokens(self.teacher.tokenizer.encode([*texts]))

        def forward(rows: Rows, inputs: Inputs) -> Pending:
            with explaining_run_errors(f"teacher {self.info.name!r} ({self.info.model})"):
                vectors = encoder(with_known_padding(inputs, encoder.config), self.teacher.skipped)
            return self.teacher.transfer.fetch({"vectors": vectors}, dict)

        result = yield from self._run_batches(shown_ids, forward)
        kind = kind_of(self.info)
        if self.for_audit or not len(result.rows) or not isinstance(kind, Embedding):
            return result
        columns, facts = kind.stored(result.columns["vectors"])
        return replace(result, columns=columns, facts={**result.facts, **facts})

    def _logits(self, inputs: Inputs) -> Tensor:
        """Return an expert's logits in fp32; raise InputError if its own code fails."""
        with explaining_run_errors(f"teacher {self.info.name!r} ({self.info.model})"):
            logits: Tensor = self.teacher.model(
                **with_known_padding(inputs, self.teacher.model.config)
            ).logits.float()
        return logits

    def _expert_inputs(self) -> tuple[list[NDArray], list[NDArray] | None]:
        """Encode each row's text or pair with the expert's tokenizer; empty without a pair."""
        tokenizer, longest = self.teacher.tokenizer, self.teacher.max_length
        if not self.teacher.config.pair_expert:
            encoded_texts = tokenizer.encode(self.table["text"].to_pylist())
            return self._with_special_tokens(encoded_texts)[0], None
        assert self.view is not None
        cut_rule = PairView.cut_of(self.view.identity)
        batches = self.view.batches(self.unit.shard)
        texts = ([t for b in batches for t in b[name].to_pylist()] for name in ("text_a", "text_b"))
        pairs = list(zip(*texts, strict=True))
        encoded = [
            tokenizer.encode_pair(a, b, longest, cut_rule) if a is not None else ([], [])
            for a, b in pairs
        ]
        ids, segment_ids = ([np.array(pair[part], np.int64) for pair in encoded] for part in (0, 1))
        full_lengths = np.array([len(row) for row in ids], np.int64)
        at_limit = np.flatnonzero(full_lengths == longest)  # those that may have been cut
        if len(at_limit):
            at_limit_texts = zip(*(pairs[row] for row in at_limit), strict=True)
            full_lengths[at_limit] = tokenizer.uncut_lengths(*at_limit_texts)
        self._count_cut(full_lengths)
        return ids, segment_ids

    def _monte_carlo(self, inputs: Inputs, rows: Rows, logits: Tensor) -> dict[str, Tensor]:
        """Return mean class probabilities over dropout passes, and whether dropout has an effect.

        ``logits`` are those of the pass without dropout. Logits are compared, not probabilities:
        those of a very confident expert may be 0 and 1 whatever dropout does.
        """
        seed_text = f"{self.info.seed}\0{self.unit.name}\0{rows.tolist()}"
        model, count = self.teacher.model, self.info.monte_carlo_passes
        torch.manual_seed(xxhash.xxh3_64_intdigest(seed_text.encode()) >> 1)
        model.train()  # dropout on; text models have no batch statistics that this would change
        try:
            passes = torch.stack([self._logits(inputs) for _ in range(count)])
        finally:
            model.eval()
        # Each pass is compared with the next, a single one with the pass without dropout.
        compared = passes[1:] if len(passes) > 1 else logits
        probs = torch.softmax(passes, dim=-1)
        outputs = {"mc_probs": probs.mean(dim=0), "has_dropout": (passes[0] != compared).any()}
        if self.for_audit:
            outputs["mc_errors"] = probs.std(dim=0, correction=min(1, count - 1)) / count**0.5
        return outputs

    def _with_special_tokens(self, texts: list[Encoded]) -> tuple[list[NDArray], int]:
        """Return each text's ids between special tokens, and how many ids of a text fit."""
        prefix, suffix = self.teacher.tokenizer.prefix, self.teacher.tokenizer.suffix
        token_limit = self.teacher.max_length - len(prefix) - len(suffix)
        full_lengths = np.array([len(text.ids) for text in texts]) + len(prefix) + len(suffix)
        if len(full_lengths) > 1 and not full_lengths.any():
            raise InputError(
                f"teacher {self.info.name!r}: its tokenizer gives no token for any of "
                f"{len(full_lengths)} texts, so it would judge none. Save the tokenizer it was "
                f"trained with into its folder ({self.info.model})"
            )
        self._count_cut(full_lengths)
        id_lists = (np.concatenate([prefix, text.ids[:token_limit], suffix]) for text in texts)
        return [ids.astype(np.int64) for ids in id_lists], token_limit

    def _count_cut(self, lengths: NDArray[np.int64]) -> None:
        """Record how many of the texts, given their lengths in tokens, are cut."""
        limit = self.teacher.max_length
        is_below_corpus = limit < self.teacher.corpus.info["config"]["sequence_length"]
        self.facts = Counts.of(lengths * self.included, limit).facts(is_below_corpus)

    def _flat_indices(self, inputs: Inputs, rows: Rows, places: list[Rows]) -> Tensor:
        """Return where the ``places`` of some rows lie in a batch of them, flattened."""
        width = inputs["input_ids"].shape[1]
        flat = [i * width + places[r] for i, r in enumerate(rows)]
        return self.teacher.tensor(np.concatenate(flat))

    def _fetch_logits(self, logits: Tensor, extra: Mapping[str, Tensor] | None = None) -> Pending:
        """Fetch an expert's logits, and ``extra`` from ``_monte_carlo``."""
        outputs = {"logits": logits, **(extra or {}), "finite": torch.isfinite(logits).all()}
        return self.teacher.transfer.fetch(outputs, self._check_logits)

    def _check_logits(self, outputs: Arrays) -> Columns:
        """Raise InputError for logits that are not finite, and if dropout changes nothing."""
        if not outputs.pop("finite"):
            raise InputError(
                f"teacher {self.info.name!r} produced logits that are not finite in "
                f"{self.info.precision}; try `precision: fp32` for it, and check the model"
            )
        if not outputs.pop("has_dropout", True):
            raise InputError(
                f"teacher {self.info.name!r}: {self.info.monte_carlo_passes} Monte-Carlo passes "
                "are identical, so the model has no dropout to draw uncertainty from. Set "
                "hidden_dropout_prob in its config.json, or monte_carlo.passes to 0"
            )
        return outputs

    def _run_batches(
        self,
        shown_ids: list[NDArray],
        forward: Forward,
        positions: list[Rows] | None = None,
        segment_ids: list[NDArray] | None = None,
        documents: list[NDArray] | None = None,
    ) -> Steps:
        """Return the columns of the rows that have a target, in the order of the corpus.

        ``shown_ids`` are the ids that the teacher reads, ``segment_ids`` those of pairs, and
        ``documents`` the document numbers in rows of several. ``forward`` returns the columns of a
        batch: an entry for each of its ``positions``, which ascend, or for each row. Rows without a
        token or a position are left out.
        """
        lengths = np.array([len(row) for row in shown_ids]) * self.included
        if positions is not None:
            lengths *= np.array([len(row) > 0 for row in positions])

        @torch.inference_mode()
        def of_batch(rows: Rows) -> Pending:
            inputs = padded_inputs(self.teacher, [shown_ids[r] for r in rows])
            if segment_ids is not None and self.teacher.token_types:
                segments = [segment_ids[r] for r in rows]
                inputs["token_type_ids"] = padded(self.teacher, segments, 0)
            if documents is not None:
                numbers = [documents[r] for r in rows]
                if any((row > 0).any() for row in numbers):
                    inputs[DOCUMENTS] = padded(self.teacher, numbers, -1)
            return forward(rows, inputs)

        results: list[tuple[Rows, Columns]] = []
        for batch in run_batches(self.teacher, lengths, of_batch):
            if isinstance(batch, bool):
                yield batch
            else:
                results.append(batch)
        if not results:
            return UnitResult(np.zeros(0, np.int64), {}, self.facts)
        rows = np.concatenate([of for of, _ in results])
        columns = joined_columns([columns for _, columns in results])
        if positions is not None:
            columns["positions"] = np.concatenate([positions[r] for r in rows]).astype(np.uint16)
            rows = np.repeat(rows, [len(positions[r]) for r in rows])
        order = np.argsort(rows, kind="stable")
        columns = {name: values[order] for name, values in columns.items()}
        return UnitResult(rows[order], columns, self.facts)
