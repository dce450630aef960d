"""Compare runs in object stores: fetch what the comparison needs."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from rekindle.data.places import address_of
from rekindle.data.storage.folders import CHECKPOINTS, tree_copy
from rekindle.train.record.working_copy import naming_address

# Records of runs, experts and cycles; and large files that say nothing about a run.
_RECORDS = (".json", ".jsonl", ".yaml", ".csv")
_NOT_NEEDED = ("tokenizer.json", "vocab.json", "predictions.jsonl")


@contextmanager
def local_copies(
    directories: Sequence[Path], models: bool
) -> Iterator[tuple[list[Path], Callable[[str], str]]]:
    """Yield the directories, and a function that puts their addresses back into a text.

    Directories in a store are replaced by local copies of their records and, with ``models``, of
    their models.
    """
    addresses: dict[Path, str] = {}
    folders: list[Path] = []

    def is_needed(name: str) -> bool:
        *parents, file = name.split("/")
        if CHECKPOINTS in parents or "tensorboard" in parents:
            return False
        return models or (file.endswith(_RECORDS) and file not in _NOT_NEEDED)

    with ExitStack() as renamed:
        for directory in directories:
            if address := address_of(directory):
                directory = tree_copy(address, is_needed)
                addresses[directory] = address
                renamed.enter_context(naming_address(address, directory))
            folders.append(directory)

        def with_addresses(text: str) -> str:
            for directory, address in addresses.items():
                text = text.replace(str(directory), address)
            return text

        yield folders, with_addresses
