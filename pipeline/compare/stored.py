"""Compare runs in object stores: fetch what the comparison needs."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from rekindle.data.places import address_of
from rekindle.data.storage.folders import CHECKPOINTS, tree_copy
from rekindle.train.record.working_copy import naming_address

# Records of runs, experts and cycles; and large files that say nothing about a run.
_RECORDS = (".json", ".jsonl", ".yaml", ".csv")
_OTHERS = ("tokenizer.json", "vocab.json", "predictions.jsonl")


@contextmanager
def fetched(
    directories: Sequence[Path], models: bool
) -> Iterator[tuple[list[Path], Callable[[str], str]]]:
    """Yield the directories, and a function that puts their addresses back into a text.

    Directories in a store are replaced by local copies of their records and, with ``models``, of
    their models.
    """
    places: dict[Path, str] = {}
    found: list[Path] = []

    def wanted(name: str) -> bool:
        *folders, file = name.split("/")
        if CHECKPOINTS in folders or "tensorboard" in folders:
            return False
        return models or (file.endswith(_RECORDS) and file not in _OTHERS)

    with ExitStack() as spoken:
        for directory in directories:
            if address := address_of(directory):
                directory = tree_copy(address, wanted)
                places[directory] = address
                spoken.enter_context(naming_address(address, directory))
            found.append(directory)

        def named(text: str) -> str:
            for directory, address in places.items():
                text = text.replace(str(directory), address)
            return text

        yield found, named
