"""The finished seeds of a fine-tuning, kept until all are finished: an interrupt, or a kill, costs
one.

  .OUT.seeds/about.json    what is fine-tuned, on what, and how
  .OUT.seeds/seed-0.json   the result of seed 0
  .OUT.seeds/model-0/      its model, while it is the best; at the end it becomes OUT. If every
                           seed's is kept, a copy becomes OUT/seeds/seed-0
"""

import hashlib
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from shlex import quote

import torch
from pydantic import TypeAdapter

from rekindle.data.counted import counted
from rekindle.data.errors import CheckpointError, RekindleError
from rekindle.data.storage.addresses import sha256_of
from rekindle.data.storage.atomic import (
    new_folder,
    publish_folder,
    remove,
    remove_leftovers,
    write_json,
)
from rekindle.train.finetune.classifier import padded_tokenizer
from rekindle.train.finetune.config import fill_former_defaults
from rekindle.train.finetune.result import SeedResult, best_of, seed_folder
from rekindle.train.interrupts import reporting_interrupts
from rekindle.train.model.files import Placement, config_fingerprint, weights_fingerprint
from rekindle.train.model.folder import resolve_model
from rekindle.train.record.run_folder import (
    LOCK_FILE,
    check_same_settings,
    locked_folder,
    read_record,
    reading_record,
)
from rekindle.train.record.stored_result import upload_result
from rekindle.train.record.working_copy import store_of

ABOUT_FILE = "about.json"
# Writes what belongs to the results of some seeds: into a folder, which will be at a path relative
# to the output.
Write = Callable[[Path, Path, Sequence[SeedResult]], None]

logger = logging.getLogger("rekindle")


class FinishedSeeds:
    """The finished ones of ``planned``, beside ``out``; by ``metric`` one is the best.

    ``keep_every``: keep the model of every seed, not only the best one's.
    """

    def __init__(self, out: Path, planned: Sequence[int], metric: str, keep_every: bool = False):
        self.folder = out.parent / f".{out.name}.seeds"
        self.planned, self.metric, self.keep_every = planned, metric, keep_every
        self.finished: dict[int, SeedResult] = {}
        self.unplanned: dict[int, SeedResult] = {}  # of an earlier call, and not planned now

    @contextmanager
    def lock(self, about: Mapping[str, object]) -> Iterator[None]:
        """Lock the folder, and take up the seeds that an earlier call left for the same ``about``.

        They stay, and this is logged, if anything ends the block early. Raises CheckpointError if
        existing ones have other settings, InputError if another process works there.
        """
        with locked_folder(self.folder):
            self._read(about)
            try:
                with reporting_interrupts(self.describe_interrupt):
                    yield
            except BaseException as error:
                if not self.finished and not self.unplanned:
                    remove(self.folder)
                elif isinstance(error, RekindleError):
                    logger.warning("%s in %s", self.describe_kept(), self.folder)
                raise
            remove(self.folder)

    def _read(self, about: Mapping[str, object]) -> None:
        """Take up what an earlier call left; raise CheckpointError if it was of something else."""
        remove_leftovers(self.folder)
        self._take_up_older()
        advice = f"remove it (`rm -r {quote(str(self.folder))}`), or give another --out"
        left_results = self._read_results(advice)
        recorded = read_record(self.folder / ABOUT_FILE, advice)
        if not left_results:
            for path in self.folder.iterdir():
                if path.name != LOCK_FILE:
                    remove(path)
            write_json(self.folder / ABOUT_FILE, about)
            return
        summary = f"It holds {_named(left_results)} of a fine-tuning that did not end"
        if recorded is None:
            raise CheckpointError(f"{self.folder / ABOUT_FILE} is missing. {summary}: {advice}")
        if isinstance(settings := recorded.get("settings"), Mapping):
            recorded = {**recorded, "settings": fill_former_defaults(settings)}
        rule = f"{summary}: give its own settings to go on with it, or {advice}"
        check_same_settings(self.folder, recorded, about, rule)
        self.unplanned = {
            seed: one for seed, one in left_results.items() if seed not in self.planned
        }
        self.finished = {seed: one for seed, one in left_results.items() if seed in self.planned}
        repeated: dict[int, SeedResult] = {}
        # Only the best of the seeds planned then has its model; now the best of those planned needs
        # one, or every one.
        while without_model := [s for s in self._with_models() if not self._model(s).is_dir()]:
            repeated |= {seed: self.finished.pop(seed) for seed in without_model}
        for seeds, state in (
            (self.finished, "finished before, and kept"),
            (repeated, "finished before, repeated for the model, which is not kept"),
            (
                self.unplanned,
                "finished before, not asked for now: kept until the result is written,",
            ),
        ):
            if seeds:
                logger.info("%s %s in %s", _named(seeds), state, self.folder)

    def _take_up_older(self) -> None:
        """Handle folders best-0 of older versions: of two models, nothing tells whose the scores
        are.
        """
        for older in self.folder.glob("best-*"):
            model = self.folder / older.name.replace("best-", "model-")
            if model.exists():
                remove(model)
                remove(older)
            else:
                older.rename(model)

    def _read_results(self, advice: str) -> dict[int, SeedResult]:
        """Return every result that an earlier call left, planned now or not."""
        results = []
        for path in self.folder.glob("seed-*.json"):
            record = read_record(path, advice)
            with reading_record(path, advice):
                results.append(TypeAdapter(SeedResult).validate_python(record))
        return {one.seed: one for one in sorted(results, key=lambda one: one.seed)}

    def missing(self) -> Iterator[int]:
        """Yield the remaining seeds, one after another."""
        yield from (seed for seed in self.planned if seed not in self.finished)

    @property
    def results(self) -> list[SeedResult]:
        """Return the results, in the order of the seeds."""
        return [self.finished[seed] for seed in self.planned if seed in self.finished]

    def add(self, result: SeedResult, save: Callable[[Path], None]) -> None:
        """Keep the result of a seed; ``save`` writes its model if it is the best yet."""
        best = best_of([*self.results, result], self.metric)
        if self.keep_every or result is best:
            remove(self._result(result.seed))  # of a seed done again: it belongs to another model
            with new_folder(self._model(result.seed)) as staged:
                save(staged)
        write_json(self._result(result.seed), asdict(result))
        self.finished[result.seed] = result
        for seed in set() if self.keep_every else self.finished.keys() - {best.seed}:
            remove(self._model(seed))

    def publish(self, out: Path, write: Write, force: bool = False) -> None:
        """Move the best model's folder to ``out`` and, if every seed's is kept, copy those into it;
        ``write`` adds to each the results of its seeds. Nothing else is left. ``force``: see
        ``upload_result``.
        """
        best_model = self._model(self._best().seed)
        if not self.keep_every and store_of(out) is None:
            write(best_model, Path(), self.results)
            publish_folder(best_model, out)
            return
        result_folder = self.folder / "whole"
        # made of copies: after a kill every seed is still here
        with new_folder(result_folder) as staged:
            shutil.copytree(best_model, staged, dirs_exist_ok=True)
            write(staged, Path(), self.results)
            for one in self.results if self.keep_every else ():
                shutil.copytree(self._model(one.seed), seed_folder(staged, one.seed))
                write(seed_folder(staged, one.seed), seed_folder(Path(), one.seed), [one])
        publish_folder(result_folder, out)
        upload_result(out, force)

    def describe_interrupt(self) -> tuple[str, bool]:
        """Return what an interrupt leaves, and whether that is anything."""
        if not self.finished:
            other_text = (
                f", but {_named(self.unplanned)} of an earlier call" if self.unplanned else ""
            )
            return f"no seed was finished: nothing of it is kept{other_text}", False
        return f"{_named(self.finished)} of {len(self.planned)} finished, and kept", True

    def describe_kept(self) -> str:
        """Return what is kept, as the beginning of a message."""
        summary, has_kept = self.describe_interrupt()
        restriction = " for these settings; other settings need another --out," if has_kept else ""
        return f"{summary[0].upper()}{summary[1:]}{restriction}".rstrip(",")

    def _with_models(self) -> list[int]:
        """Return the seeds whose models are needed: the best one, or all."""
        return [*self.finished] if self.keep_every or not self.finished else [self._best().seed]

    def _best(self) -> SeedResult:
        return best_of(self.results, self.metric)

    def _result(self, seed: int) -> Path:
        return self.folder / f"seed-{seed}.json"

    def _model(self, seed: int) -> Path:
        return self.folder / f"model-{seed}"


def _named(seeds: Mapping[int, object]) -> str:
    return f"{counted(len(seeds), 'seed')} ({', '.join(map(str, seeds))})"


def describe_tuning(
    model: str, files: Mapping[str, str], settings: Mapping[str, object], placement: Placement
) -> dict[str, object]:
    """Return what decides the result of every seed: by content, wherever it lies."""
    directory = resolve_model(model)
    weights = {"config": config_fingerprint(directory), "weights": weights_fingerprint(directory)}
    digests = {split: sha256_of(path) for split, path in files.items()}
    tokenizer = padded_tokenizer(model)  # as a whole: more than its vocabulary decides what is read
    tokenizer_text = f"{tokenizer.backend_tokenizer.to_str()}\0{tokenizer.model_max_length}"
    return {
        "model": weights,
        "tokenizer": hashlib.sha256(tokenizer_text.encode()).hexdigest(),
        "files": digests,
        "settings": dict(settings),
        "device": torch.device(placement.device).type,
        "precision": placement.precision,
    }
