"""Makes the units of a teacher that a server runs: asks, checks, and keeps nothing wrong.

A unit is the same as for other teachers, a file of the corpus; so are its commits, resuming, repair
and workers.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from rekindle.data.corpus.corpus import Corpus
from rekindle.data.storage.columns import split_lists
from rekindle.data.targets.codec import Columns
from rekindle.data.targets.reading.reader import target_positions
from rekindle.data.targets.served import digest_of
from rekindle.pipeline.caching.batching import joined_columns
from rekindle.pipeline.caching.compute_unit import Unit, UnitResult
from rekindle.pipeline.caching.served_plan import NamedServer, check_same_answers
from rekindle.pipeline.caching.teachers import TeacherPlan
from rekindle.pipeline.served.answers import AnswerReader
from rekindle.pipeline.served.in_threads import ask_in_order
from rekindle.pipeline.served.probes import ask_probes, probes_of

Rows = Sequence[NDArray]


class ServedTeacher:
    """A server's model, ready to be asked about a corpus."""

    def __init__(self, plan: TeacherPlan, corpus: Corpus):
        self.info, self.config, self.corpus = plan.info, plan.config, corpus
        self.named_server = NamedServer.of(plan.config)
        self.answer_reader = AnswerReader(corpus, plan.info)
        self.check_same()

    def check_same(self) -> str:
        """Return the digest of the server's present answers to the probes. Raises
        CacheMismatchError if another model answers.
        """
        served, k = self.info.served, self.info.k
        assert served is not None
        assert k is not None
        prompts = [[*probe.input_ids] for probe in served.probes]
        with self.named_server.naming():
            answers, _ = ask_probes(self.named_server.server, prompts, k)
        check_same_answers(served, answers, self.config)
        return digest_of(probes_of(prompts, answers, k))

    def sequences(
        self, unit: Unit, only_rows: NDArray[np.int64] | None = None
    ) -> tuple[list[int], Rows, Rows]:
        """Return the rows of a unit that have a target (of ``only_rows``, if given) and, of each
        row of the unit, its tokens and the positions of its targets.
        """
        table = self.corpus.shard(unit.shard).table()
        tokens = split_lists(table.to_batches(), "input_ids")
        positions = target_positions(self.corpus, self.info, None, unit.shard, None)
        taught, domains = self.info.domains, table["domain"].to_pylist()
        rows = range(len(tokens)) if only_rows is None else sorted(map(int, only_rows))
        included = [
            row
            for row in rows
            if len(positions[row]) and (taught is None or domains[row] in taught)
        ]
        return included, tokens, positions

    def unit(self, unit: Unit, only_rows: NDArray[np.int64] | None = None) -> UnitResult:
        """Return all targets of the teacher on one unit, or on its rows ``only_rows``.

        Raises InputError for a wrong answer, with its place; CacheMismatchError if the server has
        changed its model meanwhile: nothing is kept of the unit.
        """
        rows, tokens, positions = self.sequences(unit, only_rows)
        per_request = self.config.served.prompts_per_request if self.config.served else 1
        parts = [rows[start : start + per_request] for start in range(0, len(rows), per_request)]
        columns_of_parts = self._ask_parts(self.corpus.first(unit.shard), tokens, positions, parts)
        row_columns = [columns for part in columns_of_parts for columns in part]
        facts = {"probes": self.check_same()}
        if not row_columns:
            return UnitResult(np.zeros(0, np.int64), {}, facts)
        counts = [len(positions[row]) for row in rows]
        return UnitResult(
            np.repeat(np.array(rows, np.int64), counts), joined_columns(row_columns), facts
        )

    def _ask_parts(
        self, first: int, tokens: Rows, positions: Rows, parts: Sequence[Sequence[int]]
    ) -> Iterator[list[Columns]]:
        def ask_part(rows: Sequence[int]) -> list[Columns]:
            label = f"sequence {first + rows[0]}"
            label += f" to {first + rows[-1]}" if rows[1:] else ""
            with self.named_server.naming(f"{label}: "):
                answers = self.named_server.server.prompt_logprobs(
                    [tokens[row].tolist() for row in rows], self.info.k or 0
                )
            columns = []
            for row, entries in zip(rows, answers, strict=True):
                with self.named_server.naming(f"sequence {first + row}: "):
                    columns.append(self.answer_reader.columns(entries, tokens[row], positions[row]))
            return columns

        served = self.config.served
        threads = served.max_concurrency if served else 1
        return ask_in_order(ask_part, parts, threads, self.named_server.server.client.stop)
