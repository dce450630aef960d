"""The finished seeds of a fine-tuning, kept until all are: an interrupt, or a kill, costs one.

.OUT.seeds/about.json    what is fine-tuned, on what, and how
.OUT.seeds/seed-0.json   what came out of seed 0
.OUT.seeds/best-0/       its model, while it is the best; at the end it becomes OUT
"""

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from shlex import quote

from pydantic import TypeAdapter

from rekindle.data.counted import counted
from rekindle.data.errors import RekindleError
from rekindle.data.storage.atomic import (
    new_folder,
    publish_folder,
    remove,
    remove_leftovers,
    write_json,
)
from rekindle.train.finetune.result import SeedResult, best_of
from rekindle.train.interrupts import telling
from rekindle.train.model.files import config_fingerprint, weights_fingerprint
from rekindle.train.model.folder import resolve_model
from rekindle.train.record.run_folder import LOCK_FILE, alone_in, check_same, read_record, reading
from rekindle.train.running_out import is_out_of_memory

ABOUT_FILE = "about.json"

logger = logging.getLogger("rekindle")


class FinishedSeeds:
    """Those of ``planned`` that are finished, beside ``out``; by ``metric`` one is the best."""

    def __init__(self, out: Path, planned: Sequence[int], metric: str):
        self.folder = out.parent / f".{out.name}.seeds"
        self.planned, self.metric = planned, metric
        self.found: dict[int, SeedResult] = {}

    @contextmanager
    def held(self, about: Mapping[str, object]) -> Iterator[None]:
        """Hold them alone, those included that an earlier call has left of what is ``about`` that.

        They stay when the block is interrupted or killed, or the disk is full; what else ends it
        would come again, or asks for other settings. Raises CheckpointError where those that are
        there are of other settings, InputError where another process works there.
        """
        with alone_in(self.folder):
            self._read(about)
            try:
                with telling(self.told):
                    yield
            except BaseException as error:
                comes_again = isinstance(error, RekindleError) or is_out_of_memory(error)
                if comes_again or not self.found:
                    self.found = {}
                    remove(self.folder)
                raise
            remove(self.folder)

    def _read(self, about: Mapping[str, object]) -> None:
        """Take up what an earlier call has left. CheckpointError where it was of something else."""
        remove_leftovers(self.folder)
        advice = f"remove it (`rm -r {quote(str(self.folder))}`), or give another --out"
        found = {}
        for seed in self.planned:
            if (one := read_record(self._result(seed), advice)) is not None:
                with reading(self._result(seed), advice):
                    found[seed] = TypeAdapter(SeedResult).validate_python(one)
        before = read_record(self.folder / ABOUT_FILE, advice)
        # Without its model, which a kill may have come after it was published, it is of no use.
        if found and before and self._model(best_of([*found.values()], self.metric).seed).is_dir():
            kept = f"It holds {_named(found)} of a fine-tuning that was interrupted"
            rule = f"{kept}: give its own settings to go on with it, or {advice}"
            check_same(self.folder, before, about, rule)
            self.found = found
            logger.info("%s finished before, and kept in %s", _named(found), self.folder)
            return
        for path in self.folder.iterdir():
            if path.name != LOCK_FILE:
                remove(path)
        write_json(self.folder / ABOUT_FILE, about)

    def missing(self) -> Iterator[int]:
        """Yield the seeds that are left to do, one after another."""
        yield from (seed for seed in self.planned if seed not in self.found)

    @property
    def results(self) -> list[SeedResult]:
        """What there is, in the order of the seeds."""
        return [self.found[seed] for seed in self.planned if seed in self.found]

    def add(self, result: SeedResult, save: Callable[[Path], None]) -> None:
        """Keep what came out of a seed; ``save`` writes its model, where it is the best yet."""
        best = best_of([*self.results, result], self.metric)
        if result is best:
            with new_folder(self._model(result.seed)) as staged:
                save(staged)
        write_json(self._result(result.seed), asdict(result))
        self.found[result.seed] = result
        for seed in self.found.keys() - {best.seed}:
            remove(self._model(seed))

    def publish(self, out: Path, write: Callable[[Path], None]) -> None:
        """Make the best one's folder, with what ``write`` adds to it, ``out``; nothing is left."""
        made = self._model(best_of(self.results, self.metric).seed)
        write(made)
        publish_folder(made, out)

    def told(self) -> tuple[str, bool]:
        """What an interrupt leaves, and whether that is anything."""
        if not self.found:
            return "no seed was finished: nothing of it is kept", False
        return f"{_named(self.found)} of {len(self.planned)} finished, and kept", True

    def kept(self) -> str:
        """What there is of it, for a message that begins with it."""
        told, _ = self.told()
        return f"{told[0].upper()}{told[1:]}"

    def _result(self, seed: int) -> Path:
        return self.folder / f"seed-{seed}.json"

    def _model(self, seed: int) -> Path:
        return self.folder / f"best-{seed}"


def _named(seeds: Mapping[int, object]) -> str:
    return f"{counted(len(seeds), 'seed')} ({', '.join(map(str, seeds))})"


def what_is_tuned(
    model: str, files: Mapping[str, str], settings: Mapping[str, object]
) -> dict[str, object]:
    """What decides the result of every seed: by content, wherever it lies."""
    directory = resolve_model(model)
    weights = {"config": config_fingerprint(directory), "weights": weights_fingerprint(directory)}
    digests = {split: _sha256(Path(path)) for split, path in files.items()}
    return {"model": weights, "files": digests, "settings": dict(settings)}


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
