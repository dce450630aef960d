"""What a task head of a student is: which expert it imitates, and what comes out of it.

Torch is not imported here.
"""

from typing import Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from rekindle.data.settings import Settings
from rekindle.data.targets.schema import TeacherInfo

# As sentence-transformers calls them.
Pooling = Literal["mean", "cls", "lasttoken", "max", "mean_sqrt_len_tokens", "weightedmean"]


class HeadConfig(Settings):
    """A task head: which expert it imitates and what comes out of it."""

    kind: Literal["sequence", "token", "embedding"]
    num_labels: int = Field(gt=0)  # of an embedding: the numbers of its vector
    label_names: tuple[str, ...] = ()
    problem: str | None = None
    form: Literal["ours", "family"] = "ours"  # ``TaskHead``, or ``FamilyHead``
    padding: int | None = None  # of a family's head: the id, where the model names none
    pooling: Pooling | None = None  # of an embedding, as what follows
    normalise: bool | None = None
    projection: bool | None = None  # None: not yet known, as long as the student's size is not
    as_long: bool = Field(False, exclude=True)  # whether it must be as long as the teacher's

    @model_serializer(mode="wrap")
    def _as_before_there_were_others(
        self, rest: SerializerFunctionWrapHandler
    ) -> dict[str, object]:
        """Earlier versions refuse keys that they do not know: they read students of our heads."""
        values: dict[str, object] = rest(self)
        if self.form == "ours":
            del values["form"], values["padding"]
        if self.kind != "embedding":
            del values["pooling"], values["normalise"], values["projection"]
        return values

    @classmethod
    def of(
        cls, info: TeacherInfo, projection: bool | None = None, as_long: bool = False
    ) -> "HeadConfig":
        """Return the head that fits a cached expert; of a sentence encoder still without what the
        student decides. ``projection``, ``as_long``: what is asked of its vectors.
        """
        if info.kind != "embedding":
            return cls.model_validate(info, from_attributes=True)
        assert info.dimensions is not None
        return cls(
            kind="embedding",
            num_labels=info.dimensions,
            normalise=info.normalised,
            projection=projection,
            as_long=as_long,
        )

    @property
    def judges(self) -> Literal["sequence", "token"]:
        """Return what a classifier's head judges; an embedding judges nothing."""
        if self.kind == "embedding":
            raise ValueError("a head that gives vectors is no classifier's")
        return self.kind


def width_of(config: Any) -> int:
    """Return how many numbers the body's final states have."""
    text = config.get_text_config()
    # OPT-350m's states are narrower after its last layer.
    return int(getattr(text, "word_embed_proj_dim", None) or text.hidden_size)
