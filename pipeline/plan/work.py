"""What is left to make of a teacher's targets or a view: shards, positions, bytes.

Runs nothing. Positions are counted on the plan's sample rows, as exactly as possible without the
model, and scaled by tokens. Bytes follow from the column widths.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from rekindle.data.corpus.corpus import Corpus
from rekindle.data.storage.columns import split_lists
from rekindle.data.targets.kinds.registry import kind_of
from rekindle.data.targets.reading.cut import Counts, Truncation
from rekindle.data.targets.reading.reader import target_positions
from rekindle.data.targets.schema import TeacherInfo
from rekindle.data.views.reader import ViewReader, shown_view
from rekindle.data.views.registry import view_kind
from rekindle.pipeline.caching.cache_teachers import missing_units
from rekindle.pipeline.caching.teachers import TeacherPlan, tokenizer_and_limit
from rekindle.pipeline.config import CacheConfig
from rekindle.pipeline.plan.sample import CorpusSurvey


@dataclass(frozen=True)
class Shards:
    """Shards of one size that are still to be made."""

    count: int
    rows: int  # in each
    tokens: float  # in each
    share: float = 1.0  # of the rows, those in the teacher's domains


@dataclass(frozen=True)
class FolderWork:
    """What is left to make in a folder: a view, or a part of a teacher's targets."""

    missing: list[Shards]
    present: int  # units that exist

    @property
    def units(self) -> int:
        """Number of missing shards."""
        return sum(shards.count for shards in self.missing)

    @property
    def rows(self) -> int:
        """Number of rows in them."""
        return sum(shards.count * shards.rows for shards in self.missing)

    @property
    def tokens(self) -> float:
        """Tokens of the rows that the teacher is run on."""
        return sum(shards.count * shards.share * shards.tokens for shards in self.missing)


def share_of(domains: Sequence[str] | None, rows: Mapping[str, int], total: int) -> float:
    """Return the share of rows in ``domains`` (None: all) among ``total``; ``rows`` counts the rows
    of each domain.
    """
    return 1.0 if domains is None else sum(rows.get(name, 0) for name in set(domains)) / total


def work_of(
    survey: CorpusSurvey,
    cache: CacheConfig,
    folder: str,
    view: str,
    domains: Sequence[str] | None = None,
) -> FolderWork:
    """Return what is missing of the view, or of a teacher for ``domains`` that is shown it."""
    work: list[Shards] = []
    present = 0
    if survey.cached is not None:
        units, present = missing_units(survey.cached, folder, view, cache.masked_replicas)
        work += _missing_shards(survey.cached, [unit.shard for unit in units], domains)
    if sequences := survey.new_sequences:
        replica_count = len(view_kind(view).numbers(cache.masked_replicas))
        share = share_of(domains, survey.reference.domains, len(survey.reference))
        size = cache.sequences_per_shard or survey.shard_size
        full_shards, last_rows = divmod(sequences, size)
        for count, rows in ((full_shards, size), (1, last_rows)):
            tokens = rows * survey.new_tokens / sequences
            work += [Shards(count * replica_count, rows, tokens, share)] if count and rows else []
    return FolderWork(work, present)


def _missing_shards(
    corpus: Corpus, numbers: Sequence[int], domains: Sequence[str] | None
) -> Iterator[Shards]:
    """Yield the given shards of ``corpus``, grouped by number of rows."""
    rows, tokens = (
        corpus.commits_by_unit.rows,
        corpus.commits_by_unit.count_facts("tokens").astype(float),
    )
    taught_tokens = tokens
    if domains is not None:
        counted = enumerate(corpus.commits_by_unit.counts_by_name("domains"))
        shares = [share_of(domains, counts or {}, int(rows[shard])) for shard, counts in counted]
        taught_tokens = tokens * shares
    shard_numbers = np.array(numbers, np.int64)
    for size in np.unique(rows[shard_numbers]).tolist():
        same_size = shard_numbers[rows[shard_numbers] == size]
        token_sum = float(tokens[same_size].sum())
        share = float(taught_tokens[same_size].sum()) / token_sum if token_sum else 1.0
        yield Shards(len(same_size), size, token_sum / len(same_size), share)


# --- positions ------------------------------------------------------------------------------------


def positions_per_token(probe_corpus: Corpus, info: TeacherInfo) -> float:
    """Return the targets the teacher leaves per token. Its view of ``probe_corpus`` must exist."""
    view = shown_view(probe_corpus, info.view)
    return (
        sum(_positions(probe_corpus, info, view, n) for n in range(len(probe_corpus.commits)))
        / probe_corpus.tokens
    )


def _positions(corpus: Corpus, info: TeacherInfo, view: ViewReader | None, shard: int) -> float:
    """Count the positions of a sample shard that get a target, averaged over replicas."""
    if info.is_vocabulary:
        replicas = info.view_class.numbers(view.replicas if view else 1)
        positions_of_replicas = [
            target_positions(corpus, info, view, shard, replica) for replica in replicas
        ]
        return sum(len(positions) for rows in positions_of_replicas for positions in rows) / len(
            positions_of_replicas
        )
    if view is not None:
        return sum(len(b["text_a"]) - b["text_a"].null_count for b in view.batches(shard))
    if kind_of(info).per_sequence:
        return corpus.commits[shard].rows
    words = split_lists([*corpus.shard(shard).batches()], "word_starts")
    return sum(int(row.sum()) for row in words)


# --- what is cut ----------------------------------------------------------------------------------


def foreseen_cut(plan: TeacherPlan, corpus: Corpus) -> tuple[Truncation | None, int]:
    """Return the shares cut from the texts of ``corpus``, and the limit in tokens. The view of
    pairs must exist.
    """
    tokenizer, limit = tokenizer_and_limit(plan, corpus)
    view, taught = shown_view(corpus, plan.info.view), plan.info.domains
    lengths = [np.zeros(0, np.int64)]
    for number in range(len(corpus.commits)):
        table = corpus.shard(number).table()
        domains = table["domain"].to_pylist()
        texts_a, texts_b = table["text"].to_pylist(), None
        if view is not None:
            batches = view.batches(number)
            texts_a, texts_b = (
                [text for batch in batches for text in batch[name].to_pylist()]
                for name in ("text_a", "text_b")
            )
        rows = [
            row
            for row, text in enumerate(texts_a)
            if text is not None and (taught is None or domains[row] in taught)
        ]
        pairs = texts_b and [texts_b[row] for row in rows]
        texts = plan.with_prompt([texts_a[row] for row in rows])
        lengths.append(tokenizer.uncut_lengths(texts, pairs))
    counts = Counts.of(np.concatenate(lengths), limit)
    shares = Truncation(counts.cut / max(counts.texts, 1), counts.lost / max(counts.tokens, 1))
    return shares if counts.cut else None, limit


# --- bytes ----------------------------------------------------------------------------------------


def bytes_of(
    work: Iterable[Shards], info: TeacherInfo, positions: float, per_position: float | None = None
) -> int:
    """Return the bytes of the shards with these targets: a fixed part per shard, and the columns.

    ``per_position``: as measured; None takes the column widths.
    """
    fixed_bytes = {rows: bytes_without_positions(info, rows) for rows in {w.rows for w in work}}
    if per_position is None:
        per_position = kind_of(info).bytes_per_position
    return round(sum(w.count * fixed_bytes[w.rows] for w in work) + positions * per_position)


def bytes_without_positions(info: TeacherInfo, rows: int) -> int:
    """Return the bytes of a shard whose rows have no positions (a sequence expert's entire
    shard).
    """
    kind, sink = kind_of(info), pa.BufferOutputStream()
    schema = kind.schema({"shard": 0, "replica": 0})
    no_positions = np.zeros(0, np.int64)
    with pa.ipc.new_file(sink, schema) as file:
        for batch in kind.batches(schema, ["0" * 32] * rows, no_positions, {}):
            file.write_batch(batch)
    return int(sink.getvalue().size)
