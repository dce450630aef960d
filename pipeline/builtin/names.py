"""The built-in models: names that begin with ``python-docs/``, for runs with nothing to download.

They are tiny, trained on the documentation that every Python carries, made when they are first
named and kept in the user's cache folder. Nothing heavy is imported here: what is there already is
found in milliseconds, and what is not is made by a process of its own (docs_models_make).
"""

import contextlib
import difflib
import hashlib
import json
import logging
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rekindle.data.errors import InputError, RekindleError

log = logging.getLogger("rekindle")

PREFIX = "python-docs/"
ALGORITHM = 1  # rises when the same settings would give other files

# A model of a part of the library, by the short name that stands for the part, its domain.
DOMAINS = {
    "text": "text",
    "files": "files and persistence",
    "network": "networking and internet",
}
LABELLED_TASKS = ("part", "kind", "next", "place", "part-1", "part-2")
MODELS = {
    "tokenizer": "a WordPiece tokenizer, and bert's configuration",
    "bert": "a masked language model",
    "bert-larger": "the configuration of a larger masked language model, without weights",
    "gpt2": "a causal language model, with the same tokenizer",
    "gpt2-larger": "the configuration of a larger causal language model, without weights",
    "expert-part": "bert as an expert: which part of the library is a text from?",
    "expert-kind": "bert as an expert: does a text describe a module, class, function or topic?",
    "expert-next": "bert as an expert on pairs: does the second sentence follow the first?",
    "expert-place": "bert as a regression expert: how far into its document (0 to 1) is a text?",
    "expert-part-1": "as expert-part, of the first half of the parts alone",
    "expert-part-2": "as expert-part, of the other half of the parts",
    **{
        f"bert-{name}": f"bert, trained further on the part {part!r}"
        for name, part in DOMAINS.items()
    },
}
# What the variables that torchrun sets begin with.
_TORCHRUN = (
    *("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "ROLE_NAME", "MASTER_", "TORCHELASTIC_"),
    *("WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE"),
)
CORPUS = "corpus"
FILES = {
    CORPUS: "1,500 documents of the whole library, none of them labelled; domain: the part",
    **{
        f"{task}/{split}": f"labelled examples of the task {task}: {split}"
        for task in LABELLED_TASKS
        for split in ("train", "dev", "test")
    },
}


def is_built_in(name: object) -> bool:
    """Whether ``name`` is (or means to be) that of a built-in model or file."""
    return isinstance(name, str) and name.startswith(PREFIX)


def resolve_values(values: Any) -> Any:
    """Nested dictionaries and lists with every built-in name replaced by its local path.

    What is not there yet is made first. A ``path`` is somebody's own and is left as it is.
    Raises InputError for an unknown name, with the nearest one.
    """
    paths = resolve(set(_names_in(values)))
    return _replaced(values, {name: str(path) for name, path in paths.items()})


def resolve_name(name: str) -> str:
    """The local path of a built-in name; any other name as it is."""
    return str(resolve([name])[name]) if is_built_in(name) else name


def resolve(names: Iterable[str]) -> dict[str, Path]:
    """Where each built-in of ``names`` is, made first where it is not there."""
    paths = {name: _place_of(name) for name in sorted(names)}
    missing = [name for name, path in paths.items() if not path.exists()]
    if missing:
        _make(missing)
    for name in missing:
        if not paths[name].exists():
            raise RekindleError(f"{paths[name]} was not made; remove {folder()} and try again")
    return paths


def _names_in(values: Any) -> Iterator[str]:
    if isinstance(values, dict):
        for key, value in values.items():
            yield from () if key == "path" else _names_in(value)
    elif isinstance(values, list):
        for value in values:
            yield from _names_in(value)
    elif is_built_in(values):
        yield values


def _replaced(values: Any, paths: dict[str, str]) -> Any:
    if isinstance(values, dict):
        return {k: v if k == "path" else _replaced(v, paths) for k, v in values.items()}
    if isinstance(values, list):
        return [_replaced(value, paths) for value in values]
    return paths.get(values, values) if isinstance(values, str) else values


# --- where they are -------------------------------------------------------------------------------


def home() -> Path:
    """``$REKINDLE_HOME``, or ``$XDG_CACHE_HOME/rekindle``, or ``~/.cache/rekindle``."""
    own, shared = os.environ.get("REKINDLE_HOME"), os.environ.get("XDG_CACHE_HOME")
    path = Path(own) if own else (Path(shared) if shared else Path("~/.cache")) / "rekindle"
    return Path(os.path.abspath(path.expanduser()))


def folder() -> Path:
    """The folder of these built-ins: its name says all that decides them."""
    from rekindle.pipeline.builtin.settings import SETTINGS

    decides = {
        "algorithm": ALGORITHM,
        "python": platform.python_version(),  # its documentation differs between versions
        "settings": SETTINGS.model_dump(mode="json"),
        "domains": DOMAINS,
    }
    digest = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()
    return home() / f"python-docs-{digest[:12]}"


def _place_of(name: str) -> Path:
    own = name.removeprefix(PREFIX)
    if own in MODELS:
        return folder() / own
    if own in FILES:
        return documents_file(folder(), own)
    known = [PREFIX + other for other in (*MODELS, *FILES)]
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
    raise InputError(
        f"there is no built-in {name!r}; did you mean {nearest!r}? (The models are "
        f"{', '.join(MODELS)}. A folder of your own is written ./{name})"
    )


def documents_file(where: Path, name: str) -> Path:
    """The file of a name in FILES, in the folder ``where`` of built-ins."""
    documents = where / "documents"
    return documents / (f"{name}.jsonl" if name == CORPUS else f"tasks/{name}.jsonl")


# --- making them ----------------------------------------------------------------------------------


def _make(names: list[str]) -> None:
    """Have what is missing made, by a process of its own.

    So that this one keeps its signals and its main module, and needs neither torch nor a GPU for
    it: the models are made on the CPU, where they are the same to the bit every time.
    """
    log.info("made once from Python's documentation, and kept in %s:", folder())
    for name in names:
        own = name.removeprefix(PREFIX)
        log.info("  %s: %s", name, MODELS.get(own) or FILES[own])
    # A session of its own: Ctrl-C is this process's to handle. -P: no module of the current folder.
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "rekindle.pipeline.builtin.make", *names],
        env=_environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        complaint, _ = process.communicate()
    except BaseException:
        process.terminate()  # it clears away what it had begun
        process.wait()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # its helpers have nothing to clear away
        raise
    if process.returncode:
        reason = complaint.strip() or f"its process ended with exit code {process.returncode}"
        error = InputError if process.returncode == InputError.exit_code else RekindleError
        raise error(f"{', '.join(names)} could not be made in {folder()}: {reason}")


def _environment() -> dict[str, str]:
    """Of the process that makes models: one by itself, also where torchrun has started this one.

    It would wait for the other processes' to join it, and those for the lock that it holds.
    """
    own = {k: v for k, v in os.environ.items() if not k.startswith(_TORCHRUN)}
    return own | {"CUDA_VISIBLE_DEVICES": ""}
