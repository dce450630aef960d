"""The configuration of a student's task head: the expert that it imitates, and its outputs.

Does not import torch.
"""

from typing import Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from rekindle.data.settings import Settings
from rekindle.data.targets.schema import TeacherInfo

# The names of sentence-transformers.
Pooling = Literal["mean", "cls", "lasttoken", "max", "mean_sqrt_len_tokens", "weightedmean"]


class HeadConfig(Settings):
    """A task head: the expert that it imitates, and its outputs."""

    kind: Literal["sequence", "token", "embedding"]
    num_labels: int = Field(gt=0)  # for an embedding: the numbers of its vector
    label_names: tuple[str, ...] = ()
    problem: str | None = None
    form: Literal["ours", "family"] = "ours"  # ``TaskHead``, or ``FamilyHead``
    padding: int | None = None  # for a family's head: the padding id, if the model names none
    pooling: Pooling | None = None  # for an embedding, as the next fields
    normalise: bool | None = None
    projection: bool | None = None  # None: not yet known, like the student's size
    as_long: bool = Field(False, exclude=True)  # whether it must have the teacher's length

    @model_serializer(mode="wrap")
    def _as_before_there_were_others(
        self, dump: SerializerFunctionWrapHandler
    ) -> dict[str, object]:
        """Leave unused newer keys out, which earlier versions refuse: they can read students with
        our heads.
        """
        values: dict[str, object] = dump(self)
        if self.form == "ours":
            del values["form"], values["padding"]
        if self.kind != "embedding":
            del values["pooling"], values["normalise"], values["projection"]
        return values

    @classmethod
    def of(
        cls, info: TeacherInfo, projection: bool | None = None, as_long: bool = False
    ) -> "HeadConfig":
        """Return the head that fits a cached expert; for a sentence encoder without what the
        student decides. ``projection``, ``as_long``: the settings for its vectors.
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
    """Return the width of the body's final states."""
    text = config.get_text_config()
    # OPT-350m's states are narrower after its last layer.
    return int(getattr(text, "word_embed_proj_dim", None) or text.hidden_size)
