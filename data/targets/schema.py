"""What a teacher leaves in the cache: ``teacher.json``.

Format version 1. ``targets/<teacher>/data/<unit>-<attempt>.arrow`` is row-aligned with the corpus
shard of the same number; its first column repeats the example digest. The other columns depend on
the teacher's kind and are described in its file in ``kinds/``.

A larger k or more temperatures are kept in ``targets/<teacher>/extensions/<part>/``, each with its
own ``teacher.json``, data and commits.

Scalars per position: ``gold_log_prob`` (uint16, −log-prob of the true token in 1/1024 nat),
``gold_rank`` (number of tokens with a larger logit), ``entropy`` (uint16, 1/1024 nat). Imported and
served targets lack the columns that ``lacks`` names.
"""

import re
from typing import Annotated, Literal

import numpy as np
from pydantic import AfterValidator, Field, SerializerFunctionWrapHandler, model_serializer

from rekindle.data.settings import Settings
from rekindle.data.storage.seal import (
    FORMAT_VERSION,
    WITH_IMPORTS,
    WITH_MAPPED,
    WITH_SERVED,
    WITH_VECTORS,
)
from rekindle.data.storage.shards import ROWS_PER_BATCH
from rekindle.data.targets.imported import Imported
from rekindle.data.targets.lineage import Ancestor
from rekindle.data.targets.served import Served
from rekindle.data.views.base import View
from rekindle.data.views.registry import view_kind

TEACHER_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"
LONGEST_PART = 60
PART_NAME = rf"^[a-z0-9.-]{{0,{LONGEST_PART}}}$"  # a part's name becomes a folder as well
Task = Literal[
    "masked_lm",
    "causal_lm",
    "sequence_classification",
    "regression",
    "token_classification",
    "embedding",
]
VocabularyKindName = Literal[
    "topk", "threshold", "random", "dense", "hidden"
]  # of vocabulary teachers
Kind = Literal[VocabularyKindName, "tails", "sequence", "token", "embedding"]
Vectors = Literal["fp16", "int8"]  # how vectors are stored
Codec = Literal["default", "precise", "compact"]
VOCABULARY_TASKS = ("masked_lm", "causal_lm")
MOST_DRAWS = 255  # of a sample: a count is stored in a byte
# Facts in the record of a unit whose teacher's tokens were mapped: the positions that could have a
# target, and the mean share of its probability on mapped tokens.
MAPPABLE, MAPPED_MASS = "mappable", "mapped_mass"
GOLD_SCALARS = ("gold_log_prob", "gold_rank")
SCALARS = (*GOLD_SCALARS, "entropy")
POSITIONED_SCALARS = ("positions", *SCALARS)


def _check_name(name: str) -> str:
    if not re.fullmatch(TEACHER_NAME, name):
        raise ValueError(
            "a name becomes a folder: give at most 100 of A-Z, a-z, 0-9, '.', '_' and '-', the "
            "first of them a letter or a digit"
        )
    return name


TeacherName = Annotated[
    str, AfterValidator(_check_name), Field(json_schema_extra={"pattern": TEACHER_NAME})
]


class TeacherInfo(Settings):
    """``teacher.json``: everything that decides a teacher's targets, and what is needed to read
    them.
    """

    name: TeacherName
    task: Task
    kind: Kind
    view: str  # the recorded name of what it saw, see data/views/
    vocabulary_size: int | None = Field(None, gt=0)  # of the corpus, not the head's padding
    k: int | None = Field(None, gt=0)
    temperatures: tuple[float, ...] = ()
    num_labels: int | None = Field(None, gt=0)
    label_names: tuple[str, ...] = ()
    problem: str | None = None
    domains: tuple[str, ...] | None = None
    monte_carlo_passes: int = Field(0, ge=0)
    seed: int = 0  # of Monte-Carlo passes and of samples
    precision: str = "fp32"
    estimator: dict[str, str] = Field(default_factory=dict)  # kind and its bias class
    codec: Codec = "default"
    rows_per_batch: int = Field(ROWS_PER_BATCH, gt=0, le=ROWS_PER_BATCH)
    hidden_size: int | None = Field(None, gt=0)
    dimensions: int | None = Field(None, gt=0)  # D, of vectors
    pooling: str | None = None  # of token states to a vector: a mode, or several joined by "+"
    normalised: bool = False  # whether its vectors have length 1
    vectors: Vectors | None = None
    prompt: str | None = None  # what it reads before each text
    part: str = Field("", pattern=PART_NAME)  # "" or the extension this is
    extends: str | None = None  # of tails: the part whose ids they belong to
    fingerprints: dict[str, str | None] = Field(default_factory=dict)  # weights, config, tokenizer
    versions: dict[str, str] = Field(default_factory=dict)  # informative, not enforced
    model: str = ""  # where it was loaded from; informative
    lineage: tuple[Ancestor, ...] = ()  # of a student: the runs that made it; informative
    mapped: int | None = Field(None, gt=0)  # tokens that its own tokenizer has, by their bytes
    imported: Imported | None = None  # of targets made elsewhere: their source, and what is unknown
    served: Served | None = None  # of a server's model: what identifies it

    @model_serializer(mode="wrap")
    def _without_unset_new_keys(
        self, serialize: SerializerFunctionWrapHandler
    ) -> dict[str, object]:
        """Leave out the keys of newer versions where they are unset: earlier versions refuse a
        key that they do not know.
        """
        values: dict[str, object] = serialize(self)
        newer_keys = {"lineage", "imported", "served", "mapped"}
        newer_keys |= {"dimensions", "pooling", "normalised", "vectors", "prompt"}
        return {key: value for key, value in values.items() if key not in newer_keys or value}

    def identity(self) -> dict:
        """Return what must be equal for two runs to have the same teacher."""
        return self.model_dump(mode="json", exclude={"versions", "model", "lineage"})

    def identity_of_model(self) -> dict:
        """Return what a teacher's extensions share with it: all except what is kept of its
        output.
        """
        output_keys = {
            "kind",
            "k",
            "temperatures",
            "estimator",
            "part",
            "extends",
            "rows_per_batch",
        }
        output_keys |= {"codec"}  # tails have none
        return {key: value for key, value in self.identity().items() if key not in output_keys}

    @property
    def folder(self) -> str:
        """The folder of its shards."""
        base = f"targets/{self.name}"
        return f"{base}/extensions/{self.part}" if self.part else base

    @property
    def view_class(self) -> type[View]:
        """The kind of view it was shown."""
        return view_kind(self.view)

    @property
    def lacks(self) -> tuple[str, ...]:
        """The scalars that are not stored, because the source of the targets did not give them."""
        source = self.imported or self.served
        return () if source is None else source.lacks

    @property
    def format_version(self) -> int:
        """The lowest format version of a cache with such a teacher."""
        needed = {
            WITH_IMPORTS: self.imported,
            WITH_SERVED: self.served,
            WITH_MAPPED: self.mapped,
            WITH_VECTORS: self.vectors,
        }
        return max([FORMAT_VERSION, *(version for version, value in needed.items() if value)])

    @property
    def made_by(self) -> str:
        """The command that makes its targets."""
        return "`pipeline cache-teachers`" if self.imported is None else "`pipeline import-targets`"

    @property
    def is_vocabulary(self) -> bool:
        """Whether its targets are distributions over the vocabulary."""
        return self.task in VOCABULARY_TASKS

    @property
    def sees_clean_text(self) -> bool:
        """Whether it is a masked LM that was shown unmasked text. It then has a target for every
        content token, at the token itself (a causal LM's is at the token before).
        """
        return self.task == "masked_lm" and not self.view_class.masked


def rank_dtype(vocabulary_size: int) -> type:
    """Return the integer type that holds every rank of a vocabulary."""
    return np.uint16 if vocabulary_size <= 65_536 else np.uint32
