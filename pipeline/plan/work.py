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
from rekindle.data.targets.reading.cut import Counts, Cut
from rekindle.data.targets.reading.reader import target_positions
from rekindle.data.targets.schema import TeacherInfo
from rekindle.data.views.reader import ViewReader, shown_view
from rekindle.data.views.registry import view_kind
from rekindle.pipeline.caching.cache_teachers import missing_units
from rekindle.pipeline.caching.teachers import TeacherPlan, reading_of
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
    if survey.present is not None:
        units, present = missing_units(survey.present, folder, view, cache.masked_replicas)
        work += _missing_shards(survey.present, [unit.shard for unit in units], domains)
    if sequences := survey.new_sequences:
        times = len(view_kind(view).numbers(cache.masked_replicas))
        share = share_of(domains, survey.reference.domains, len(survey.reference))
        size = cache.sequences_per_shard or survey.shard_size
        whole, rest = divmod(sequences, size)
        for count, rows in ((whole, size), (1, rest)):
            tokens = rows * survey.new_tokens / sequences
            work += [Shards(count * times, rows, tokens, share)] if count and rows else []
    return FolderWork(work, present)


def _missing_shards(
    corpus: Corpus, numbers: Sequence[int], domains: Sequence[str] | None
) -> Iterator[Shards]:
    """Yield the given shards of ``corpus``, grouped by number of rows."""
    rows, tokens = corpus.units.rows, corpus.units.counts("tokens").astype(float)
    chosen = tokens
    if domains is not None:
        counted = enumerate(corpus.units.counts_by_name("domains"))
        shares = [share_of(domains, counts or {}, int(rows[shard])) for shard, counts in counted]
        chosen = tokens * shares
    among = np.array(numbers, np.int64)
    for size in np.unique(rows[among]).tolist():
        alike = among[rows[among] == size]
        every = float(tokens[alike].sum())
        share = float(chosen[alike].sum()) / every if every else 1.0
        yield Shards(len(alike), size, every / len(alike), share)


# --- positions ------------------------------------------------------------------------------------


def positions_per_token(steps: Corpus, info: TeacherInfo) -> float:
    """Return the targets the teacher leaves per token. Its view of ``steps`` must exist."""
    view = shown_view(steps, info.view)
    return sum(_positions(steps, info, view, n) for n in range(len(steps.commits))) / steps.tokens


def _positions(corpus: Corpus, info: TeacherInfo, view: ViewReader | None, shard: int) -> float:
    """Count the positions of a sample shard that get a target, averaged over replicas."""
    if info.is_vocabulary:
        each = info.view_class.numbers(view.replicas if view else 1)
        found = [target_positions(corpus, info, view, shard, replica) for replica in each]
        return sum(len(positions) for rows in found for positions in rows) / len(found)
    if view is not None:
        return sum(len(b["text_a"]) - b["text_a"].null_count for b in view.batches(shard))
    if kind_of(info).per_sequence:
        return corpus.commits[shard].rows
    words = split_lists([*corpus.shard(shard).batches()], "word_starts")
    return sum(int(row.sum()) for row in words)


# --- what is cut ----------------------------------------------------------------------------------


def foreseen_cut(plan: TeacherPlan, corpus: Corpus) -> tuple[Cut | None, int]:
    """Return the shares cut from the texts of ``corpus``, and the limit in tokens. The view of
    pairs must exist.
    """
    tokenizer, limit = reading_of(plan, corpus)
    view, chosen = shown_view(corpus, plan.info.view), plan.info.domains
    found = [np.zeros(0, np.int64)]
    for number in range(len(corpus.commits)):
        table = corpus.shard(number).table()
        domains = table["domain"].to_pylist()
        first, second = table["text"].to_pylist(), None
        if view is not None:
            batches = view.batches(number)
            first, second = (
                [text for batch in batches for text in batch[name].to_pylist()]
                for name in ("text_a", "text_b")
            )
        rows = [
            row
            for row, text in enumerate(first)
            if text is not None and (chosen is None or domains[row] in chosen)
        ]
        pairs = second and [second[row] for row in rows]
        texts = plan.read_as([first[row] for row in rows])
        found.append(tokenizer.uncut_lengths(texts, pairs))
    one = Counts.of(np.concatenate(found), limit)
    shares = Cut(one.cut / max(one.texts, 1), one.lost / max(one.tokens, 1))
    return shares if one.cut else None, limit


# --- bytes ----------------------------------------------------------------------------------------


def bytes_of(
    work: Iterable[Shards], info: TeacherInfo, positions: float, per_position: float | None = None
) -> int:
    """Return the bytes of the shards with these targets: a fixed part per shard, and the columns.

    ``per_position``: as measured; None takes the column widths.
    """
    frames = {rows: bytes_without_positions(info, rows) for rows in {w.rows for w in work}}
    if per_position is None:
        per_position = kind_of(info).bytes_per_position
    return round(sum(w.count * frames[w.rows] for w in work) + positions * per_position)


def bytes_without_positions(info: TeacherInfo, rows: int) -> int:
    """Return the bytes of a shard whose rows have no positions (a sequence expert's entire
    shard).
    """
    kind, sink = kind_of(info), pa.BufferOutputStream()
    schema = kind.schema({"shard": 0, "replica": 0})
    nowhere = np.zeros(0, np.int64)
    with pa.ipc.new_file(sink, schema) as file:
        for batch in kind.batches(schema, ["0" * 32] * rows, nowhere, {}):
            file.write_batch(batch)
    return int(sink.getvalue().size)
