"""What is left to be made of a teacher's targets or a view: shards, positions, bytes.

Nothing is run here. Positions are counted on the plan's sample rows, as exactly as that goes
without the model, and scaled by tokens. Bytes follow from the widths of the columns.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from rekindle.data.corpus.corpus import Corpus, unit_of
from rekindle.data.storage.shards import ShardSet
from rekindle.data.targets.kinds.registry import kind_of
from rekindle.data.targets.reading.positions import target_positions
from rekindle.data.targets.schema import TeacherInfo
from rekindle.data.views.reader import ViewReader
from rekindle.data.views.registry import view_kind
from rekindle.pipeline.caching.cache_teachers import missing_units
from rekindle.pipeline.caching.extensions import view_of
from rekindle.pipeline.caching.run_teacher import ShardRows
from rekindle.pipeline.plan.sample import CorpusSurvey


@dataclass(frozen=True)
class Shards:
    """Shards of one size that have to be made."""

    count: int
    rows: int  # in each
    tokens: float  # in each
    share: float = 1.0  # of the rows: those that the teacher is for


def domain_share(corpus: Corpus, domains: Sequence[str] | None) -> float:
    """The share of a corpus's sequences that is of ``domains`` (None: of any)."""
    if domains is None:
        return 1.0
    return sum(corpus.domains.get(domain, 0) for domain in set(domains)) / len(corpus)


def work_of_part(
    survey: CorpusSurvey, info: TeacherInfo, replicas: int, per_shard: int
) -> tuple[list[Shards], int]:
    """The shards that are missing of a part of a teacher's targets, and how many are there."""
    work: list[Shards] = []
    present = 0
    if survey.present is not None:
        missing, present = missing_units(survey.present, info, replicas)
        for unit in missing:
            commit = survey.present.commits[unit.shard]
            known, share = commit.facts["domains"], 1.0
            if info.domains is not None:
                share = sum(known.get(domain, 0) for domain in info.domains) / commit.rows
            work.append(Shards(1, commit.rows, commit.facts["tokens"], share))
    times = len(info.shown.numbers(replicas))
    return work + _new_shards(survey, info.domains, times, per_shard), present


def work_of_view(
    survey: CorpusSurvey, name: str, replicas: int, per_shard: int
) -> tuple[list[Shards], int]:
    """The shards that are missing of a view, and how many of its units are there."""
    each = view_kind(name).numbers(replicas)
    work: list[Shards] = []
    present = 0
    if survey.present is not None:
        done = ShardSet(survey.present.store, f"views/{name}").committed()
        for shard, commit in enumerate(survey.present.commits):
            left = sum(unit_of(shard, replica) not in done for replica in each)
            present += len(each) - left
            work += [Shards(left, commit.rows, commit.facts["tokens"])] if left else []
    return work + _new_shards(survey, None, len(each), per_shard), present


def _new_shards(
    survey: CorpusSurvey, domains: Sequence[str] | None, times: int, per_shard: int
) -> list[Shards]:
    """The shards of the corpus that are not there yet, each ``times`` over."""
    sequences = survey.new_sequences
    if not sequences:
        return []
    share = domain_share(survey.reference, domains)
    tokens = survey.new_tokens / sequences
    whole, rest = divmod(sequences, per_shard)
    sizes = [(whole, per_shard), (1, rest)]
    return [Shards(n * times, rows, rows * tokens, share) for n, rows in sizes if n and rows]


# --- positions ------------------------------------------------------------------------------------


def positions_in(work: Iterable[Shards], steps: Corpus, info: TeacherInfo) -> float:
    """Targets that the teacher will leave in those shards; its view of ``steps`` has been made."""
    samples = [ShardRows(steps, info, shard) for shard in range(len(steps.commits))]
    view = view_of(info, steps)
    counted = sum(_positions(sample, view) for sample in samples)
    return sum(w.count * w.share * w.tokens for w in work) * counted / steps.tokens


def _positions(sample: ShardRows, view: ViewReader | None) -> float:
    """Positions of one sample shard that get a target in one replica (the mean over them)."""
    info, corpus, shard = sample.info, sample.corpus, sample.shard
    if info.is_vocabulary:
        each = info.shown.numbers(view.replicas if view else 1)
        found = [target_positions(corpus, info, view, shard, replica) for replica in each]
        return sum(len(positions) for rows in found for positions in rows) / len(found)
    if view is not None:
        return sum(len(b["text_a"]) - b["text_a"].null_count for b in view.batches(shard))
    if kind_of(info).per_sequence:
        return len(sample.wanted)
    return sum(int(words.sum()) for words in sample.lists("word_starts"))


# --- bytes ----------------------------------------------------------------------------------------


def bytes_of(
    work: Iterable[Shards], info: TeacherInfo, positions: float, per_position: float | None = None
) -> int:
    """Bytes of the shards with those targets: what each has without one, and the columns.

    ``per_position``: as measured; by the widths of the columns without it.
    """
    frames = {rows: bytes_without_positions(info, rows) for rows in {w.rows for w in work}}
    if per_position is None:
        per_position = kind_of(info).bytes_per_position
    return round(sum(w.count * frames[w.rows] for w in work) + positions * per_position)


def bytes_without_positions(info: TeacherInfo, rows: int) -> int:
    """Bytes of a shard whose rows have no positions; of a sequence expert's, all of them."""
    kind, sink = kind_of(info), pa.BufferOutputStream()
    schema = kind.schema({"shard": 0, "replica": 0})
    nowhere = np.zeros(0, np.int64)
    with pa.ipc.new_file(sink, schema) as file:
        for batch in kind.batches(schema, ["0" * 32] * rows, nowhere, {}):
            file.write_batch(batch)
    return int(sink.getvalue().size)
