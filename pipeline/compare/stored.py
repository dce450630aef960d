"""Runs in object stores beside each other: what is compared of them is fetched."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from rekindle.data.places import address_of
from rekindle.data.storage.folders import CHECKPOINTS, tree_copy
from rekindle.train.record.working_copy import speaking_of

# What runs, experts and cycles say of themselves; and what is large and says nothing of a run.
_RECORDS = (".json", ".jsonl", ".yaml", ".csv")
_OTHERS = ("tokenizer.json", "vocab.json", "predictions.jsonl")


@contextmanager
def fetched(
    directories: Sequence[Path], models: bool
) -> Iterator[tuple[list[Path], Callable[[str], str]]]:
    """The directories, those in a store as local copies of what they say of themselves, and with
    ``models`` of their models; and what gives a text their addresses back.
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
                spoken.enter_context(speaking_of(address, directory))
            found.append(directory)

        def named(text: str) -> str:
            for directory, address in places.items():
                text = text.replace(str(directory), address)
            return text

        yield found, named
