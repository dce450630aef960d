"""Read one teacher's targets by corpus shard and row, checked before use.

A teacher's targets are in one part or several: the first, and extensions with a
larger k or more temperatures. A reader presents the finished parts as one.
"""

import math
import threading
from collections.abc import Sequence
from functools import cached_property
from itertools import compress

import numpy as np
from numpy.typing import NDArray

from rekindle.data.corpus.columns import next_token_places, trained_content
from rekindle.data.corpus.corpus import Corpus
from rekindle.data.errors import CacheFormatError, CacheMismatchError, InputError
from rekindle.data.storage.columns import ascend_within, flat_lists, list_views, split_lists
from rekindle.data.storage.commits import SECONDS, Commits
from rekindle.data.storage.cuts import (
    BatchKey,
    Flat,
    Place,
    RowLists,
    RowReader,
    cut_lengths,
    join_cuts,
)
from rekindle.data.storage.shards import Shard
from rekindle.data.targets.codec import Columns
from rekindle.data.targets.head import StoredHead, read_head
from rekindle.data.targets.imported import EXPECTED
from rekindle.data.targets.kinds.registry import kind_of
from rekindle.data.targets.reading.cut import Truncation, truncation_of
from rekindle.data.targets.reading.files import check_owner
from rekindle.data.targets.reading.part import Part
from rekindle.data.targets.scalars import PositionScalars, decode_scalars, read_scalars
from rekindle.data.targets.schema import (
    GOLD_SCALARS,
    MAPPABLE,
    MAPPED_MASS,
    POSITIONED_SCALARS,
    SCALARS,
    TeacherInfo,
)
from rekindle.data.views.reader import ViewReader, check_aligned, shown_view

CHECKED_FILES = 64  # files of a part checked before reading
DECODED_BATCHES = 64  # record batches kept decoded, for codecs that cannot be used directly


class TeacherReader(RowReader):
    """One teacher of a cache: ``info`` and its committed units.

    ``infos`` describes its parts, first the one it was begun with; ``view`` is the view it was
    shown, if already open. The part with the largest k that covers the first one is read (within
    the units of the first), with all tails that cover it; or the ``part`` of that name, using no
    more than ``max_k`` candidates.
    """

    recomputed = ("head", "_evicting")

    def __init__(
        self,
        corpus: Corpus,
        infos: Sequence[TeacherInfo],
        view: ViewReader | None = None,
        part: str | None = None,
        max_k: int | None = None,
    ):
        super().__init__()
        self.corpus, self.view = corpus, view or shown_view(corpus, infos[0].view)
        self.parts = [Part.of(corpus.store, info) for info in infos]
        base = self.parts[0]
        larger = [p for p in self.parts if kind_of(p.info).can_grow and p.covers(base)]
        self.main = max([base, *larger], key=lambda p: p.info.k or 0)
        if part is not None:
            self.main = self._part(part)
        self.max_k = max_k
        self.tails = [
            p for p in self.parts if p.info.extends == self.main.info.part and p.covers(self.main)
        ]
        temperatures = self.main.info.temperatures
        for tail in self.tails:
            temperatures += tail.info.temperatures
        self.info = self.main.info.model_copy(update={"temperatures": temperatures})
        self.kind, self.rows_per_batch = kind_of(self.info), self.info.rows_per_batch
        # Units whose tails are missing count as missing.
        tails = [part.commits for part in self.tails]
        self.commits = self._commits_to_read(self.main).shared_with(tails)
        self._open: dict[tuple[str, str], Shard] = {}
        self._evicting = threading.Lock()  # several threads may read ahead

    def __setstate__(self, state: dict[str, object]) -> None:
        vars(self).update(state)
        self._evicting = threading.Lock()

    def _part(self, name: str) -> Part:
        for part in self.parts:
            if part.info.part == name:
                return part
        raise CacheMismatchError(
            f"teacher {self.parts[0].info.name!r} has no targets {name!r} any more, which the run "
            "was begun with. Start a new run in another --out"
        )

    def _commits_to_read(self, part: Part) -> Commits:
        """Return the commits of a part, without replicas that are not to be read."""
        if self.view is None or self.view.max_replicas is None or not self.masked:
            return part.commits
        return part.commits.select_first(len(self.corpus.commits), self.view.max_replicas)

    def __getattr__(self, name: str) -> object:
        # task, k, label_names, fingerprints, … are read as attributes of the teacher itself.
        if name in TeacherInfo.model_fields:
            return getattr(self.info, name)
        raise AttributeError(f"a cached teacher has no attribute {name!r}")

    @property
    def fingerprint(self) -> str:
        """The digest of the teacher's weights; for an imported one of its provenance; for a served
        one of its answers to the probes.
        """
        prints = self.info.fingerprints
        return prints.get("weights") or prints.get("provenance") or prints.get("probes") or ""

    @property
    def folder(self) -> str:
        """The folder of its shards: the part with the candidates."""
        return self.info.folder

    @property
    def masked(self) -> bool:
        """Whether there is one unit per masked replica."""
        return self.info.view_class.masked

    @cached_property
    def replicas(self) -> int:
        """Replicas of the view; 1 for a teacher without a masked view."""
        return self.view.replicas if self.masked and self.view else 1

    @property
    def bytes(self) -> int:
        """Bytes of all committed shards, of every part."""
        return sum(part.commits.bytes for part in self.parts)

    @cached_property
    def bytes_on_disk(self) -> int:
        """``bytes`` plus those of the output matrix beside the shards."""
        store, name = self.corpus.store, f"{self.folder}/head.safetensors"
        head = store.state(name)[0] if self.kind.has_head and store.exists(name) else 0
        return self.bytes + head

    @property
    def _all_commits_to_read(self) -> list[Commits]:
        return [self._commits_to_read(part) for part in (self.main, *self.tails)]

    @property
    def bytes_read(self) -> int:
        """Bytes of the parts that are read, without a smaller k that a larger one has replaced."""
        return sum(commits.bytes for commits in self._all_commits_to_read)

    @property
    def unseen(self) -> Truncation | None:
        """The share of the texts an expert did not see; None if it saw all, or if it is unknown."""
        return truncation_of(self.info, self.main.commits)

    @property
    def seconds(self) -> float | None:
        """Computing time in seconds of the parts that are read, added over processes, without
        loading models. None unless every unit recorded it; older caches did not.
        """
        seconds = np.concatenate(
            [commits.number_facts(SECONDS) for commits in self._all_commits_to_read]
        )
        known = (seconds >= 0) & (seconds < math.inf)
        return sum(seconds.tolist()) if len(seconds) and known.all() else None

    @property
    def positions(self) -> int:
        """Positions (for sequence teachers, sequences) that have a target."""
        return int(self.commits.count_facts("positions").sum())

    @property
    def coverage(self) -> float:
        """Share of the planned units (corpus shards × replicas) that are committed, weighted by
        rows. An imported unit counts with its share of the targets it could have.
        """
        planned = len(self.corpus) * self.replicas
        return _rows_with_targets(self.commits) / planned if planned else 0.0

    @property
    def mapped_coverage(self) -> tuple[float, float] | None:
        """For a teacher whose tokens are mapped to the corpus's: the share of positions with a
        target, and the mean share of its probability there on mapped tokens.
        """
        if self.info.mapped is None or not self.positions:
            return None
        counts = self.commits.count_facts("positions")
        mass = np.nan_to_num(self.commits.number_facts(MAPPED_MASS))
        share = counts.sum() / self.commits.count_facts(MAPPABLE).sum()
        return float(share), float((mass * counts).sum() / counts.sum())

    def check_files(self) -> None:
        """Raise CacheFormatError if a shard is cut short or missing.

        At most CHECKED_FILES files, spread over all, are checked; problems in the others are found
        when they are read.
        """
        for part in (self.main, *self.tails):
            units = list(self._commits_to_read(part))
            part.shards.check_sizes(units[:: -(-len(units) // CHECKED_FILES) or 1], part.commits)

    def has(self, shard: int, replica: int | None) -> bool:
        """Return whether the unit is committed."""
        return self.info.view_class.unit(shard, replica) in self.commits

    def gather(
        self,
        places: Sequence[Place],
        replica: int | None,
        allow_missing: bool = False,
        scalars: bool = True,
    ) -> tuple[NDArray[np.int64], Columns]:
        """Return the number of targets of each row (shard, row in it) [B], and the columns of them
        all.

        Rows follow one another, copied. ``scalars=False`` leaves out gold_log_prob, gold_rank and
        entropy, which no loss needs. A row of an uncommitted unit has no targets with
        ``allow_missing``; else raise CacheMismatchError.
        """
        is_present = [not allow_missing or self.has(shard, replica) for shard, _ in places]
        cuts = [self.cut(place, replica) for place in compress(places, is_present)]
        counts = np.zeros(len(places), np.int64)
        counts[is_present] = cut_lengths(cuts)
        columns = join_cuts(cuts, () if scalars else SCALARS) if cuts else self.kind.empty_columns()
        return counts, columns

    def _read_lists(self, shard: int, index: int, replica: int | None) -> Flat:
        """Return the flat columns as they are used, with checksums, alignment and ranges
        checked.
        """
        unit = self.info.view_class.unit(shard, replica)
        unit_path = f"{self.main.info.folder}/{unit}"
        offsets, columns = self._read(self.main, shard, index, replica)
        if self.kind.per_sequence:
            return offsets, columns
        odds = [columns["tail_log_odds"]] if self.tails else []
        for part in self.tails:
            part_offsets, added = self._read(part, shard, index, replica)
            pairs = ((part_offsets, offsets), (added["positions"], columns["positions"]))
            if not all(np.array_equal(*pair) for pair in pairs):
                raise CacheMismatchError(
                    f"{part.info.folder}/{unit}: record batch {index} has other positions than "
                    f"{unit_path}, which it extends"
                )
            odds.append(added["tail_log_odds"])
        if odds:
            columns["tail_log_odds"] = np.concatenate(odds, axis=1)
        self._validate(offsets, columns, shard, index, unit_path)
        return offsets, columns

    def _keep(self, key: BatchKey, lists: RowLists) -> None:
        with self._evicting:  # held until it is stored: another thread's entry could come between
            while self.kind.is_copied_on_read and len(self._lists) >= DECODED_BATCHES:
                del self._lists[next(iter(self._lists))]
            super()._keep(key, lists)

    def _read(
        self, part: Part, shard: int, index: int, replica: int | None
    ) -> tuple[NDArray[np.int32], Columns]:
        kind = kind_of(part.info)
        batch = self._shard(part, shard, replica).batch(index, not kind.codec.is_compressed)
        unit_path = f"{part.info.folder}/{self.info.view_class.unit(shard, replica)}"
        check_aligned(batch, self.corpus, shard, index, unit_path, part.info.rows_per_batch)
        if not kind.per_sequence:  # before columns of any size are decoded
            counts = np.diff(list_views(batch[kind.codec.per_position], unit_path)[0])
            tokens = self.corpus.lengths(shard, index * part.info.rows_per_batch, len(batch))
            if (counts > tokens).any():
                raise CacheFormatError(
                    f"{unit_path}: record batch {index} has positions outside its sequences"
                )
        return kind.read(batch)

    def _shard(self, part: Part, number: int, replica: int | None) -> Shard:
        """Return the unit's own file, with its description checked."""
        unit = self.info.view_class.unit(number, replica)
        key = (part.info.part, unit)
        if key not in self._open:
            if unit not in part.commits:
                raise CacheMismatchError(
                    f"teacher {self.info.name!r} has no targets for unit {unit}: the cache is "
                    f"incomplete. Run {self.info.made_by} again; it makes only what is missing"
                )
            replica = replica if self.masked else None
            about = {"kind": "targets", "shard": number, "replica": replica}
            columns = [*kind_of(part.info).schema({})]
            shard = part.shards.open(part.commits[unit], about, columns)
            if part.commits[unit].rows_per_batch != part.info.rows_per_batch:
                raise CacheFormatError(
                    f"{shard.name} has {part.commits[unit].rows_per_batch} rows in a record batch; "
                    f"teacher.json says {part.info.rows_per_batch}"
                )
            check_owner(shard, part.info)
            self._open[key] = shard
        return self._open[key]

    def scalars(self, shard: int, replica: int | None) -> list[PositionScalars]:
        """Return the scalars of a unit by record batch, without reading the targets beside them."""
        if not self.info.is_vocabulary:
            raise InputError(
                f"teacher {self.info.name!r} ({self.info.task}) has no scalars of the true "
                "tokens: scores and hard positions need a masked_lm or causal_lm teacher"
            )
        lacks = self.info.lacks
        if {*lacks} & {*GOLD_SCALARS}:
            raise InputError(
                f"teacher {self.info.name!r} was imported without scalars of the true tokens: "
                "scores and hard positions need gold_log_probs and gold_ranks in its rows"
            )
        file = self._shard(self.main, shard, replica)
        if self.kind.codec.is_compressed or lacks:
            lists = [self.row_lists(shard, i, replica) for i in range(file.batch_count)]
            return [decode_scalars(batch.offsets, batch.columns) for batch in lists]
        scalars = []
        for index, batch in enumerate(read_scalars(file)):
            unit_path = f"{self.main.info.folder}/{self.info.view_class.unit(shard, replica)}"
            check_aligned(batch, self.corpus, shard, index, unit_path, self.info.rows_per_batch)
            scalars.append(decode_scalars(*flat_lists(batch, POSITIONED_SCALARS)))
        return scalars

    @cached_property
    def head(self) -> StoredHead:
        """The output matrix of a teacher with stored hidden states."""
        head = read_head(self.corpus.store, self.info.folder)
        if head.weight.shape != (self.info.vocabulary_size, self.info.hidden_size):
            raise CacheFormatError(
                f"{self.info.folder}/head.safetensors has another shape than teacher.json announces"
            )
        return head

    def _validate(
        self, offsets: NDArray[np.int32], columns: Columns, shard: int, index: int, unit_path: str
    ) -> None:
        """Check that positions ascend within their sequence and that the columns are valid."""
        first, count = index * self.info.rows_per_batch, len(offsets) - 1
        # A causal target is the distribution of the next token: the last token has none.
        lengths = self.corpus.lengths(shard, first, count) - (self.info.task == "causal_lm")
        if not ascend_within(offsets, columns["positions"], lengths):
            raise CacheFormatError(
                f"{unit_path}: record batch {index} has positions outside its sequences"
            )
        for problem in self.kind.problems(columns):
            raise CacheFormatError(f"{unit_path}: record batch {index} has {problem}")


def _rows_with_targets(commits: Commits) -> float:
    rows, expected = commits.rows, commits.number_facts(EXPECTED)
    if not (counted := expected > 0).any():
        return int(rows.sum())
    shares = commits.count_facts("positions")[counted] / expected[counted]
    return float(rows[~counted].sum() + (rows[counted] * shares).sum())


def target_positions(
    corpus: Corpus, info: TeacherInfo, view: ViewReader | None, shard: int, replica: int | None
) -> list[NDArray[np.int64]]:
    """Return the ascending positions, per row of a corpus shard, where a vocabulary teacher has
    targets.

    For a masked view these are the positions that the replica masks; for a masked LM that sees
    unmasked text, all except special tokens. A causal LM's position t holds the distribution of
    token t + 1, so the last token has none, nor has the last of a document in a row of several. If
    the corpus says what is trained, only trained tokens count.
    """
    if view is not None:
        masked = split_lists(view.batches(shard, replica), "positions")
        return [row.astype(np.int64) for row in masked]
    batches = [*corpus.shard(shard).batches()]
    if info.sees_clean_text:
        return [np.flatnonzero(row) for batch in batches for row in trained_content(batch)]
    packed = corpus.is_packed
    return [places for batch in batches for places in next_token_places(batch, packed)]
