"""What a folder is that is to be sent, and what of it: looked at before anything is sent."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from rekindle.data.errors import InputError
from rekindle.data.hub.places import HubPlace
from rekindle.data.storage.client import is_remote
from rekindle.data.storage.manifest import MANIFEST
from rekindle.data.storage.store import open_store
from rekindle.pipeline.progress import Progress
from rekindle.pipeline.sharing.caches import cache_files
from rekindle.pipeline.sharing.models import model_files
from rekindle.train.embedding.folder import (
    MODULES_FILE,
    check_encoder_folder,
    is_encoder_folder,
    read_encoder_folder,
)
from rekindle.train.model.folder import ADAPTER_FILE, SETTINGS_FILE
from rekindle.train.model.unfinished import describe_unfinished

_SEVERAL = {"stages.json": "stages", "sweep.json": "students of a sweep", "cycle.yaml": "a cycle"}


@dataclass(frozen=True)
class Asked:
    """What is to be sent, as it was asked for."""

    place: str
    repo: str  # OWNER/NAME
    revision: str | None = None
    with_text: bool = False
    readable: bool = False  # targets, too, from which text can be read
    teachers: tuple[str, ...] = ()  # of a cache; none: all


@dataclass(frozen=True)
class Contents:
    """What is sent: of which kind, by their names the files, and what is said of it."""

    kind: str  # cache, student, expert, model
    repo_type: str  # as a hub has it
    files: dict[str, Path | bytes]
    told: list[str] = field(default_factory=list)
    fingerprints: frozenset[str] = frozenset()  # that a cache's corpus has, or had once

    def size(self, name: str) -> int:
        """The bytes of a file."""
        found = self.files[name]
        return len(found) if isinstance(found, bytes) else found.stat().st_size

    @property
    def bytes(self) -> int:
        """Those of all."""
        return sum(map(self.size, self.files))


@contextmanager
def contents_of(
    asked: Asked, progress: Progress, ready: Callable[[str], object]
) -> Iterator[Contents]:
    """What of a place is sent, as long as it is needed: copies are removed after that.

    ``ready`` is called with the type of the repository once it is known that there is something to
    send, before dear work. Raises InputError for what is no cache and no model, or not finished;
    CacheError for a cache that is damaged.
    """
    if is_cache(asked.place):
        with cache_files(
            asked.place,
            _address(asked),
            asked.teachers,
            with_text=asked.with_text,
            readable=asked.readable or asked.with_text,
            progress=progress,
            ready=lambda: ready("dataset"),
        ) as found:
            yield Contents("cache", "dataset", found.files, found.told, found.fingerprints)
        return
    if given := _of_caches(asked):
        raise InputError(f"{' and '.join(given)}: of a cache, and {asked.place} is none")
    folder = model_place(asked.place)
    kind, files, told = model_files(folder, asked.place, asked.repo)
    ready("model")
    yield Contents(kind, "model", files, told)


def _address(asked: Asked) -> str:
    """What the cache is read by once it is sent."""
    if asked.revision:
        return HubPlace("dataset", asked.repo, None, "").at(asked.revision)
    return f"hf://datasets/{asked.repo}"


def is_cache(place: str) -> bool:
    """Whether there is a cache."""
    if not is_remote(place) and not Path(place).is_dir():
        raise InputError(f"{place!r}: there is no such folder; give that of a cache or a model")
    return open_store(place).exists(MANIFEST)


def _of_caches(asked: Asked) -> list[str]:
    given = {"--with-text": asked.with_text, "--with-readable-targets": asked.readable}
    return [
        option for option, said in (given | {"--teacher": bool(asked.teachers)}).items() if said
    ]


def model_place(place: str) -> Path:
    """The local folder of a model; InputError for what is none, not finished, or damaged."""
    from rekindle.train.model.folder import check_headers, resolve_model, weight_files

    if not is_remote(place):
        folder = Path(place)
        if told := describe_unfinished(folder):
            raise InputError(f"{told}. Nothing was sent")
        if not any(
            (folder / name).is_file() for name in (SETTINGS_FILE, ADAPTER_FILE, MODULES_FILE)
        ):
            raise InputError(f"{place}: {_told_of_none(folder)}. Nothing was sent")
        place = str(folder.absolute())
    found = resolve_model(place, check_encoder_folder)
    model = read_encoder_folder(found).transformer if is_encoder_folder(found) else found
    weight_files(model)
    check_headers(model)
    return found


def _told_of_none(folder: Path) -> str:
    for name, what in _SEVERAL.items():
        if (folder / name).is_file():
            return f"it holds {what}; give the folder of one of them"
    models = sorted(path.parent.name for path in folder.glob(f"*/{SETTINGS_FILE}"))
    caches = sorted(path.parent.name for path in folder.glob(f"*/{MANIFEST}"))
    if found := [*models, *caches][:5]:
        return f"it is no cache and no model; it holds some ({', '.join(found)}): give one of them"
    return (
        f"it is no cache (it has no {MANIFEST}) and no model (no {SETTINGS_FILE}); give a cache, "
        "or the folder that train-student, finetune, export or merge-adapter wrote"
    )


def check_repo(repo: str) -> str:
    """OWNER/NAME as it is meant; InputError for what a hub does not take."""
    plain = re.sub(r"^(hf://)?(datasets/|models/)?", "", repo.strip("/"))
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", plain, re.ASCII):
        shown = "it" if plain.startswith("hf_") else repr(repo)  # a token, given by mistake
        raise InputError(
            f"{shown} is no repository: give OWNER/NAME (letters, digits, '-', '_' and '.'), the "
            "owner being your account's name or an organisation's"
        )
    return plain
