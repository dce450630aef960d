"""Read a cache: what is in it, one example, and batches in any order.

Nothing here depends on the order in which teachers ran: targets are found by corpus row and checked
against the row's digest. Bytes are verified against their checksums the first time they are
touched.
"""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from copy import copy
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

import numpy as np
from numpy.typing import NDArray

from rekindle.data.batch import (
    Batch,
    Ints,
    read_clean,
    read_masked,
    read_pairs,
    read_targets,
)
from rekindle.data.corpus.columns import GROUP
from rekindle.data.corpus.config import version_of
from rekindle.data.corpus.corpus import Corpus
from rekindle.data.corpus.texts import CorpusTexts
from rekindle.data.errors import CacheError, CacheMismatchError, InputError
from rekindle.data.example import Example, Target
from rekindle.data.exchange.config import ImportConfig, ImportSettings
from rekindle.data.exchange.exporting import Export
from rekindle.data.exchange.files import in_memory_dataset, mapped_dataset
from rekindle.data.exchange.importing import ImportResult, import_targets, numbered
from rekindle.data.exchange.rows import Row
from rekindle.data.journal import JOURNAL_KEYS, explain_missing, log_change, read_with_overlay
from rekindle.data.marks import read_marks, read_trained
from rekindle.data.permutation import epoch_batch, sequence_numbers
from rekindle.data.roll_up import ROLLED_UP, check_roll_up, roll_up
from rekindle.data.settings import parse_settings
from rekindle.data.sharing.card import write_card
from rekindle.data.storage.base import Store
from rekindle.data.storage.cuts import RowTexts, cut_lengths
from rekindle.data.storage.manifest import MANIFEST, read_manifest
from rekindle.data.storage.seal import FORMAT_VERSION, VERSION, seal
from rekindle.data.storage.shards import ROWS_PER_BATCH
from rekindle.data.storage.store import open_store
from rekindle.data.summary import summarise
from rekindle.data.targets.reading.extent import Extent, TeacherExtent
from rekindle.data.targets.reading.files import has_files, read_parts
from rekindle.data.targets.reading.reader import TeacherReader
from rekindle.data.targets.reading.sequence_ranking import (
    HARD,
    HardPositions,
    Score,
    ScoreSettings,
    hard_positions,
    sequence_scores,
)
from rekindle.data.views.reader import ViewReader

if TYPE_CHECKING:
    from datasets import Dataset

TEXTS = ("text_a", "text_b")  # columns of a pair
ALL_TARGETS = TeacherExtent()  # everything stored of a teacher


class Cache:
    """An opened cache. ``corpus``, ``teachers`` (by name), ``views`` (by name).

    It can be pickled (for example for DataLoader workers): it stays what it was when it was opened,
    and its files are mapped again in each process.
    """

    def __init__(self, store: Store):
        self.store = store
        self.manifest = read_with_overlay(store)
        self.corpus = Corpus(store)
        check_roll_up(self.manifest, self.corpus)
        self.extent = Extent()  # everything in it
        self.views = {name: ViewReader(self.corpus, name) for name in store.folders("views")}
        self.teachers: dict[str, TeacherReader] = {
            name: self._open_teacher(name, self.views)
            for name in store.folders("targets")
            if has_files(store, name)
        }

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> "Cache":
        """Open the cache at a local path or URL.

        Raises CacheFormatError if there is none, or its format version is not readable here;
        CacheMismatchError if its parts do not belong together.
        """
        cache = cls(open_store(path))
        log_change(cache.manifest, cache.store)
        return cache

    def within(self, extent: Extent) -> "Cache":
        """Return the cache as a run of that extent reads it."""
        limited = copy(self)
        limited.extent = extent
        limited.views = {
            name: ViewReader(self.corpus, name, extent.replicas) if view.kind.masked else view
            for name, view in self.views.items()
        }
        limited.teachers = {
            name: self._open_teacher(name, limited.views, extent.targets.get(name, ALL_TARGETS))
            for name in self.teachers
        }
        return limited

    def _open_teacher(
        self, name: str, views: Mapping[str, ViewReader], limits: TeacherExtent = ALL_TARGETS
    ) -> TeacherReader:
        infos = read_parts(self.store, name)
        info = infos[0]
        recorded_weights = (self.manifest.get("teachers") or {}).get(name, {}).get("weights")
        if recorded_weights is not None and recorded_weights != info.fingerprints.get("weights"):
            raise CacheMismatchError(
                f"{self.store.location}: {MANIFEST} and targets/{name}/teacher.json disagree "
                f"about the weights of teacher {name!r}; the targets were replaced"
            )
        return TeacherReader(self.corpus, infos, views.get(info.view), limits.part, limits.k)

    @property
    def tokenizer_digest(self) -> str:
        """Return the identity of the vocabulary that token ids and vocabulary targets use."""
        return str(self.corpus.info["tokenizer"]["digest"])

    @property
    def rolled_up(self) -> dict[str, object]:
        """Return what ``cache.json`` repeats of it."""
        return roll_up(self.corpus, self.views, self.teachers)

    def __len__(self) -> int:
        return len(self.corpus)

    def __repr__(self) -> str:
        return summarise(self.corpus, self.teachers.values())

    @property
    def texts(self) -> CorpusTexts:
        """Return the text of each sequence, by its number or a slice, read on access."""
        return CorpusTexts(self.corpus)

    def masked_view(self, name: str | None = None) -> ViewReader:
        """Return the masked view of that name, or the only one; InputError if unclear."""
        masked_names = [name for name, view in self.views.items() if view.kind.masked]
        if name is None and len(masked_names) == 1:
            name = masked_names[0]
        if name is None or name not in masked_names:
            raise InputError(
                f"{self.store.location} has the masked views {masked_names or 'none'}"
                + (f", not {name!r}" if name else "; name one")
                + ". Masked-LM students need the view that `pipeline cache-teachers` makes"
            )
        return self.views[name]

    def teacher(self, name: str) -> TeacherReader:
        """Return the teacher of that name; InputError, with the known ones, if missing."""
        if name not in self.teachers:
            known = ", ".join(sorted(self.teachers)) or "none"
            explanation = explain_missing(self.manifest, self.store, name, self.teachers)
            advice = " Cache it with `pipeline cache-teachers`, or remove it from train.objective"
            raise InputError(
                f"{self.store.location} has no teacher {name!r} (it has: {known})."
                f"{explanation or advice}"
            )
        if name in self.extent.refused:
            raise InputError(self.extent.refused[name])
        return self.teachers[name]

    def batches(
        self,
        teachers: Sequence[str] | None = None,
        batch_sequences: int = 64,
        seed: int = 0,
        epoch: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> Iterator[Batch]:
        """Yield one epoch in its shuffled order, each sequence exactly once over all ranks.

        ``teachers`` defaults to all. Masked teachers give replica ``epoch mod replicas``, and
        ``Batch.masked`` is that replica. The last batch may be short. Raises ValueError for a rank
        outside the world, InputError for an unknown teacher.
        """
        if batch_sequences < 1 or not 0 <= rank < world_size:
            raise ValueError(
                f"batch_sequences must be at least 1 (got {batch_sequences}), and rank in "
                f"0..world_size − 1 (got {rank} of {world_size})"
            )
        names = list(self.teachers) if teachers is None else list(teachers)
        infos = [self.teacher(name).info for name in names]
        views = {info.view for info in infos if info.view_class.masked}
        if len(views) > 1:
            raise InputError(f"teachers with different masks cannot share a batch: {sorted(views)}")
        view = views.pop() if views else None
        batches = range(-(-len(self) // batch_sequences))
        position = {"seed": seed, "epoch": epoch, "rank": rank, "world_size": world_size}
        parts = (epoch_batch(number, len(self), batch_sequences, **position) for number in batches)
        return (
            self.gather(part, names, epoch=epoch, masked_view=view) for part in parts if len(part)
        )

    def gather(
        self,
        index: Ints | Sequence[int],
        teachers: Sequence[str],
        *,
        epoch: int = 0,
        masked_view: str | None = None,
        allow_missing: Sequence[str] = (),
        scalars: bool = True,
    ) -> Batch:
        """Return the batch of the sequences ``index`` [B], in that order, with those teachers'
        targets.

        Raises CacheMismatchError for a unit that is not committed, unless its teacher is in
        ``allow_missing``: its sequences then have no targets. Raises InputError if a masked teacher
        saw other masks than ``masked_view``. Without ``scalars`` the batch has no gold_log_prob,
        gold_rank and entropy: no loss needs them.
        """
        index = sequence_numbers(index)
        for name in teachers:
            info = self.teacher(name).info
            if info.view_class.masked and info.view != masked_view:
                raise InputError(
                    f"teacher {name!r} saw {info.view}, but this batch has "
                    f"{masked_view or 'no masks'}: its targets belong to other inputs. Use the "
                    "masks it was cached with"
                )
        shards, rows = self.corpus.locate(index)
        places = list(zip(shards.tolist(), rows.tolist(), strict=True))
        clean, lengths = read_clean(self.corpus, places)
        masked = None
        if masked_view is not None:
            view = self.masked_view(masked_view)
            masked = read_masked(view, places, clean, epoch % max(1, view.replicas))
        replica, has_groups = masked.replica if masked else None, self.corpus.has_groups
        shown = [teacher.view for teacher in map(self.teacher, teachers) if teacher.view]
        pairs = {view.name: view for view in shown if view.kind.paired}
        return Batch(
            index=index,
            digests=RowTexts(partial(self.corpus.text, "digest"), places),
            domains=RowTexts(partial(self.corpus.text, "domain"), places),
            input_ids=clean,
            lengths=lengths,
            masked=masked,
            pairs={name: read_pairs(pairs[name], places) for name in sorted(pairs)},
            targets={
                name: read_targets(
                    self.teacher(name), places, replica, name in allow_missing, scalars
                )
                for name in teachers
            },
            epoch=epoch,
            documents=RowTexts(partial(self.corpus.text, "document"), places),
            groups=RowTexts(partial(self.corpus.text, GROUP), places) if has_groups else (),
            **read_marks(self.corpus, places),
        )

    def lengths(self, index: Ints) -> Ints:
        """Return how many tokens each of the sequences ``index`` [B] has, as stored."""
        places = zip(*(part.tolist() for part in self.corpus.locate(index)), strict=True)
        return cut_lengths([self.corpus.cut(place) for place in places])

    def longest_first(self, index: Ints) -> Ints:
        """Return the sequences ``index`` [B] by falling length; ties keep their order."""
        return index[np.argsort(-self.lengths(index), kind="stable")]

    def scores(
        self,
        teacher: str,
        score: Score = "median_loss",
        replica: int | None = None,
        **settings: Unpack[ScoreSettings],
    ) -> NDArray[np.float64]:
        """Return every sequence's score [N], from stored scalars: ``sequence_scores``."""
        return sequence_scores(self.teacher(teacher), score, replica, **settings)

    def ranking(
        self,
        teacher: str,
        score: Score = "median_loss",
        replica: int | None = None,
        **settings: Unpack[ScoreSettings],
    ) -> Ints:
        """Return the sequences by falling score, ties in corpus order, unscored last."""
        scores = self.scores(teacher, score, replica, **settings)
        return np.argsort(-np.nan_to_num(scores, nan=-np.inf), kind="stable")

    def hard_positions(
        self, teacher: str, threshold: float = HARD, replica: int | None = None
    ) -> Iterator[HardPositions]:
        """Yield each sequence's positions with −log p > ``threshold`` of the true token."""
        return hard_positions(self.teacher(teacher), threshold, replica)

    def import_targets(
        self,
        name: str,
        rows: Iterable[Row],
        provenance: Mapping[str, object],
        *,
        where: str = "rows",
        **settings: Unpack[ImportSettings],
    ) -> ImportResult:
        """Write targets that were made elsewhere as the teacher ``name``; return what was done.

        ``rows`` are mappings as docs/targets_elsewhere.md describes them, in any order; those of
        one shard are held until it is complete. ``provenance`` names the ``model``, and whatever
        else to record. The ``settings`` are those of ``ImportConfig``: ``task``, ``view``, ``k``,
        ``codec``, ``labels``, ``problem``, ``allow_missing``. Raises InputError, naming the row (as
        one of ``where``), and CacheMismatchError, as ``import_targets`` does.
        """
        values = {"name": name, "provenance": dict(provenance), **settings}
        config = parse_settings(ImportConfig, values, "import_targets")
        result = import_targets(self.corpus, numbered(rows, where), config)
        write_manifest(self.store)
        self.manifest = read_manifest(self.store)
        self.teachers[name] = self._open_teacher(name, self.views)
        return result

    def to_datasets(
        self,
        teachers: Sequence[str] | None = None,
        folder: str | os.PathLike[str] | None = None,
        k: int | None = None,
    ) -> "dict[str, Dataset]":
        """Return each teacher's targets, with their text, as a ``datasets.Dataset``.

        ``teachers`` defaults to all. The rows are those of docs/targets_elsewhere.md and can be
        imported again. They are held in memory or, as a large cache needs, mapped from files in
        ``folder``. ``k``: only this many candidates of each position. Raises InputError for an
        unknown teacher, and for one with whole distributions if no ``k`` is given.
        """
        datasets = {}
        for name in self.teachers if teachers is None else teachers:
            export = Export(self.corpus, self.teacher(name), k=k)
            if folder is None:
                datasets[name] = in_memory_dataset(export)
            else:
                datasets[name] = mapped_dataset(export, Path(folder) / f"{name}.arrow")
        return datasets

    def example(self, index: int) -> Example:
        """Return sequence ``index`` with all committed targets decoded, or IndexError."""
        shards, rows = self.corpus.locate(np.array([index]))
        shard, row = int(shards[0]), int(rows[0])
        columns = ["digest", "document", "domain", "text", *[GROUP] * self.corpus.has_groups]
        record = self.corpus.rows(shard, row, 1).select(columns).to_pylist()[0]
        ids = read_clean(self.corpus, [(shard, row)])[0][0]
        pairs = {}
        for name, view in self.views.items():
            if view.kind.paired and view.has(shard):
                number, local = divmod(row, ROWS_PER_BATCH)
                a, b = (view.batch(shard, number)[text][local].as_py() for text in TEXTS)
                pairs[name] = None if a is None else (a, b)
        targets = {
            name: list(self._example_targets(teacher, shard, row, ids))
            for name, teacher in self.teachers.items()
        }
        trained = read_trained(self.corpus, [(shard, row)])
        record |= {} if trained is None else {"trained": trained[0]}
        return Example(index=index, input_ids=ids, pairs=pairs, targets=targets, **record)

    def _example_targets(
        self, teacher: TeacherReader, shard: int, row: int, ids: NDArray[np.int32]
    ) -> Iterator[Target]:
        places = [(shard, row)]
        for replica in teacher.info.view_class.numbers(teacher.replicas):
            if not teacher.has(shard, replica):
                continue
            seen = ids
            if replica is not None and teacher.view is not None:
                seen = read_masked(teacher.view, places, ids[None], replica).input_ids[0]
            target = read_targets(teacher, places, replica).example(ids, seen, replica)
            if target is not None:
                yield target


def write_manifest(store: Store) -> None:
    """Write the roll-up if it changed; it can be rebuilt from the rest of the cache."""
    before = read_manifest(store)
    with suppress(CacheError):  # raised if the roll-up describes an earlier state
        if Cache(store).rolled_up == {key: before.get(key) for key in ROLLED_UP}:
            return
    version = max(FORMAT_VERSION, before[VERSION])
    journal = {key: before[key] for key in JOURNAL_KEYS if key in before}
    store.replace(MANIFEST, seal(journal, version))
    cache = Cache(store)
    versions = (teacher.info.format_version for teacher in cache.teachers.values())
    version = max([version, version_of(cache.corpus.info["config"]), *versions])
    write_card(store, cache.corpus, cache.teachers, version)  # before what says that all is done
    store.replace(MANIFEST, seal(cache.rolled_up | journal, version))
