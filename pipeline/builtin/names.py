"""The names of the built-in models and files (``python-docs/…``), and their places.

They are tiny, trained on the documentation that comes with Python, and kept in the user's cache
folder. Nothing is made and nothing heavy is imported here: ``missing`` has them made.
"""

import hashlib
import json
import platform
from pathlib import Path

from rekindle.data.errors import InputError, did_you_mean
from rekindle.data.places import home
from rekindle.pipeline.plain_values import with_strings

PREFIX = "python-docs/"
ALGORITHM = 2  # raised when the same settings would give other files

# Domain models, each for a part of the library: the short name of the part.
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
    "expert-part-1": "like expert-part, for the first half of the parts only",
    "expert-part-2": "like expert-part, for the other half of the parts",
    "encoder": "bert as a sentence encoder: passages that follow each other have near vectors",
    **{
        f"bert-{name}": f"bert, trained further on the part {part!r}"
        for name, part in DOMAINS.items()
    },
}
CORPUS = "corpus"
FILES = {
    CORPUS: "1,500 documents of the whole library, unlabelled; domain: the part",
    **{
        f"{task}/{split}": f"labelled examples of the task {task}: {split}"
        for task in LABELLED_TASKS
        for split in ("train", "dev", "test")
    },
    **{
        f"section/{split}": f"titles with passages that may stand under them, labelled: {split}"
        for split in ("train", "dev", "test")
    },
    "section/text": "titles with passages that may stand under them, unlabelled",
}
ABOUT = {PREFIX + name: what for name, what in (MODELS | FILES).items()}


def resolve_values(values: object) -> object:
    """Return nested dictionaries and lists with each built-in name replaced by its local path.

    A ``path`` is the user's own place and stays as it is. Raises like ``resolve_name``.
    """
    return with_strings(values, resolve_name, leave="path")


def resolve_name(name: str) -> str:
    """Return the local path of a built-in name, made or not; any other name as it is.

    Raises InputError for an unknown built-in, with the nearest one.
    """
    if not name.startswith(PREFIX):
        return name
    local_paths = places()
    if name in local_paths:
        return str(local_paths[name])
    raise InputError(
        f"there is no built-in {name!r}{did_you_mean(name, local_paths) or '.'} (The models are "
        f"{', '.join(MODELS)}. A folder of your own is written ./{name})"
    )


# --- where they are -------------------------------------------------------------------------------


def folder() -> Path:
    """Return the folder of these built-ins; its name depends on everything that decides them."""
    from rekindle.pipeline.builtin.settings import SETTINGS

    deciding = {
        "algorithm": ALGORITHM,
        "python": platform.python_version(),  # its documentation differs between versions
        "settings": SETTINGS.model_dump(mode="json"),
        "domains": DOMAINS,
    }
    digest = hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()
    return home() / f"python-docs-{digest[:12]}"


def places() -> dict[str, Path]:
    """Return the places of all built-ins, models and files, by name."""
    root = folder()
    models = {PREFIX + name: root / name for name in MODELS}
    return models | {PREFIX + name: documents_file(root, name) for name in FILES}


def documents_file(root: Path, name: str) -> Path:
    """Return the file of a name in FILES, in the folder ``root`` of built-ins."""
    documents = root / "documents"
    return documents / (f"{name}.jsonl" if name == CORPUS else f"tasks/{name}.jsonl")
