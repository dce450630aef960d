"""Find out, before anything is sent, what a folder is and which of its files are sent."""

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
from rekindle.train.model.folder import ADAPTER_FILE, CONFIG_FILE
from rekindle.train.model.unfinished import describe_unfinished

_COLLECTIONS = {
    "stages.json": "stages",
    "sweep.json": "students of a sweep",
    "cycle.yaml": "a cycle",
}


@dataclass(frozen=True)
class PushRequest:
    """What ``pipeline push`` is to send, and where."""

    place: str
    repo: str  # OWNER/NAME
    revision: str | None = None
    with_text: bool = False
    with_readable_targets: bool = False  # also targets from which text can be read
    teachers: tuple[str, ...] = ()  # of a cache; empty: all


@dataclass(frozen=True)
class Contents:
    """What is sent: its kind, its files by name, and messages for the user."""

    kind: str  # cache, student, expert, model
    repo_type: str  # the hub's word: dataset, model
    files: dict[str, Path | bytes]
    messages: list[str] = field(default_factory=list)
    fingerprints: frozenset[str] = frozenset()  # of a cache's corpus, now and before it grew

    def size(self, name: str) -> int:
        """Return the bytes of a file."""
        content = self.files[name]
        return len(content) if isinstance(content, bytes) else content.stat().st_size

    @property
    def bytes(self) -> int:
        """Return the bytes of all files."""
        return sum(map(self.size, self.files))


@contextmanager
def contents_of(
    request: PushRequest, progress: Progress, connect: Callable[[str], object]
) -> Iterator[Contents]:
    """Yield what is sent; copies made for it are removed afterwards.

    ``connect`` is called with the type of the repository as soon as there is known to be something
    to send, before any long work. Raise InputError for a place that is neither cache nor model, or
    is not finished; CacheError for a damaged cache.
    """
    if is_cache(request.place):
        with cache_files(
            request.place,
            _address(request),
            request.teachers,
            with_text=request.with_text,
            with_readable_targets=request.with_readable_targets or request.with_text,
            progress=progress,
            connect=lambda: connect("dataset"),
        ) as sent:
            yield Contents("cache", "dataset", sent.files, sent.messages, sent.fingerprints)
        return
    if options := _cache_options(request):
        raise InputError(
            f"{' and '.join(options)}: only for a cache, and {request.place} is none. Leave it out"
        )
    folder = model_folder(request.place)
    kind, files, messages = model_files(folder, request.place, request.repo)
    connect("model")
    yield Contents(kind, "model", files, messages)


def _address(request: PushRequest) -> str:
    """Return the address by which the cache is read once it is sent."""
    if request.revision:
        return HubPlace("dataset", request.repo, None, "").at(request.revision)
    return f"hf://datasets/{request.repo}"


def is_cache(place: str) -> bool:
    """Return whether there is a cache; raise InputError if there is no such folder."""
    if not is_remote(place) and not Path(place).is_dir():
        raise InputError(f"{place!r}: there is no such folder; give that of a cache or a model")
    return open_store(place).exists(MANIFEST)


def _cache_options(request: PushRequest) -> list[str]:
    """Return the requested options that only a cache has."""
    options = {
        "--with-text": request.with_text,
        "--with-readable-targets": request.with_readable_targets,
        "--teacher": bool(request.teachers),
    }
    return [option for option, is_set in options.items() if is_set]


def model_folder(place: str) -> Path:
    """Return a model's local folder; raise InputError if it is none, not finished or damaged."""
    from rekindle.train.model.folder import check_headers, resolve_model, weight_files

    if not is_remote(place):
        folder = Path(place)
        if reason := describe_unfinished(folder):
            raise InputError(f"{reason}. Nothing was sent")
        if not any((folder / name).is_file() for name in (CONFIG_FILE, ADAPTER_FILE, MODULES_FILE)):
            raise InputError(f"{place}: {_describe_folder(folder)}. Nothing was sent")
        place = str(folder.absolute())
    folder = resolve_model(place, check_encoder_folder)
    model = read_encoder_folder(folder).transformer if is_encoder_folder(folder) else folder
    weight_files(model)
    check_headers(model)
    return folder


def _describe_folder(folder: Path) -> str:
    """Return what a folder is that is neither cache nor model, and what to give instead."""
    for name, contents in _COLLECTIONS.items():
        if (folder / name).is_file():
            return f"it holds {contents}; give the folder of one of them"
    models = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG_FILE}"))
    caches = sorted(path.parent.name for path in folder.glob(f"*/{MANIFEST}"))
    if inside := [*models, *caches][:5]:
        return f"it is no cache and no model; it holds some ({', '.join(inside)}): give one of them"
    return (
        f"it is no cache (it has no {MANIFEST}) and no model (no {CONFIG_FILE}); give a cache, "
        "or the folder that train-student, finetune, export or merge-adapter wrote"
    )


def check_repo(repo: str) -> str:
    """Return OWNER/NAME without hf:// and the type; raise InputError if no hub would accept it."""
    plain = re.sub(r"^(hf://)?(datasets/|models/)?", "", repo.strip("/"))
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", plain, re.ASCII):
        shown = "it" if plain.startswith("hf_") else repr(repo)  # a token, given by mistake
        raise InputError(
            f"{shown} is no repository: give OWNER/NAME (letters, digits, '-', '_' and '.'), the "
            "owner being your account's name or an organisation's"
        )
    return plain
