"""What all kinds of views share, and what other code may ask a view.

A view is how an example is shown to a model. Its recorded name begins with its kind: ``clean`` and
``text`` are the corpus itself; ``masked-<fingerprint>`` and ``pairs-<kind>-<fingerprint>`` are
stored beside it. A fingerprint covers everything that decides a view's bytes, so equal names mean
equal inputs. The models that see views are unknown here.
"""

import hashlib
import json
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import ClassVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rekindle.data.corpus.corpus import Corpus
from rekindle.data.storage.columns import Lists
from rekindle.data.storage.seal import seal
from rekindle.data.storage.shards import ShardSet, shard_schema
from rekindle.data.storage.units import unit_of

Lengths = NDArray[np.int64]
ALGORITHM = 1  # raise it when masks or pairs would come out differently


class View:
    """One kind of view. This base class stands for unknown kinds, which nobody may be shown."""

    kind: ClassVar[str] = ""  # the beginning of recorded names
    tasks: ClassVar[tuple[str, ...]] = ()  # tasks of the teachers that may be shown it
    stored: ClassVar[bool] = False  # it has its own shards, with a row for each of the corpus's
    masked: ClassVar[bool] = False  # it shows replicas of a sequence with different masks
    paired: ClassVar[bool] = False  # it shows two texts, which not every sequence has
    fields: ClassVar[tuple[pa.Field, ...]] = ()  # its columns
    list_column: ClassVar[str] = ""  # the column whose lists are as long as those of ``input_ids``

    @classmethod
    def numbers(cls, replicas: int) -> list[int | None]:
        """Return the numbers of a sequence's ``replicas``; None for a view with only one form."""
        return [*range(replicas)] if cls.masked else [None]

    @classmethod
    def unit(cls, shard: int, replica: int | None) -> str:
        """Return the name of the unit that has this replica of a corpus shard."""
        return unit_of(shard, replica if cls.masked else None)

    @classmethod
    def is_valid_batch(cls, batch: pa.RecordBatch, lists: Lists, lengths: Lengths) -> bool:
        """Return whether our own code can have written the batch, beyond its ids.

        ``lengths`` [R] are the numbers of tokens of the corpus's sequences.
        """
        return True


class StoredView(View):
    """A view with its own shards; an instance is one view of a corpus, and can make it."""

    stored = True
    replicas = 1

    def __init__(
        self, corpus: Corpus, seed: int, identity_facts: Mapping[str, object], variant: str = ""
    ):
        self.corpus, self.seed = corpus, seed
        self.identity = {
            "algorithm": ALGORITHM,
            "seed": seed,
            "tokenizer": corpus.info["tokenizer"]["digest"],
            **identity_facts,
        }
        # before gaps were known, random ids could lie in them
        if "holes" in corpus.info["tokenizer"]:
            self.identity["holes"] = corpus.info["tokenizer"]["holes"]
        parts = json.dumps(self.identity, sort_keys=True).encode()
        fingerprint = hashlib.sha256(parts).hexdigest()[:12]
        self.name = "-".join(filter(None, (self.kind, variant, fingerprint)))
        self.shards = ShardSet(corpus.store, f"views/{self.name}")

    def build(self) -> None:
        """Write what is missing of every replica of every corpus shard."""
        description = self.identity | ({"replicas": self.replicas} if self.masked else {})
        self.corpus.store.create(f"{self.shards.folder}/view.json", seal(description))
        numbers = self.numbers(self.replicas)
        missing = self.shards.committed().missing_units(len(self.corpus.commits), numbers)
        for shard, replica in sorted(missing, key=lambda place: place[0]):
            metadata = unit_metadata(self.name, shard, replica) | self.identity
            schema = shard_schema(list(self.fields), metadata)
            columns = self._columns(shard, replica)
            batches = (pa.record_batch(arrays, schema=schema) for arrays in columns)
            self.shards.write(self.unit(shard, replica), schema, batches)

    @abstractmethod
    def _columns(self, number: int, replica: int | None) -> Iterator[list[pa.Array]]:
        """Yield the columns of each record batch of one unit."""


def unit_metadata(name: str, shard: int, replica: int | None) -> dict[str, object]:
    """Return the metadata of a unit of the view ``name``."""
    metadata: dict[str, object] = {"kind": "view", "view": name, "shard": shard}
    return metadata if replica is None else metadata | {"replica": replica}
