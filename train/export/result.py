"""The result of an export."""

from dataclasses import asdict, dataclass

from rekindle.data.counted import counted

ENCODER_CLASS = "SentenceTransformer"  # the class of sentence-transformers that loads vectors
PIPELINES = {
    "token_classification": "token-classification",
    "embedding": "sentence-similarity",
}  # transformers' names, by problem


@dataclass(frozen=True)
class Exported:
    """What was written: where, from which head, and how far its logits are from the head's."""

    out: str
    student: str
    head: str
    auto_class: str  # the class of transformers that loads it
    problem: str
    label_names: tuple[str, ...]
    max_length: int  # tokens at which its tokenizer cuts: those the student was trained with
    difference: float  # the largest, as a share of the largest logit if that is above 1
    vectors: str = ""  # for a head that gives vectors: their size, and how they are made

    def as_dict(self) -> dict[str, object]:
        """Return it as plain values for JSON."""
        values = asdict(self)
        return values if self.vectors else {k: v for k, v in values.items() if k != "vectors"}

    def describe(self) -> str:
        """Return what it is, in a sentence."""
        if self.vectors:
            return (
                f"{self.student} as {self.auto_class}: vectors of {self.vectors}; its tokenizer "
                f"cuts texts at {self.max_length} tokens, as the student was trained, and the "
                f"vectors are those of the head {self.head!r} (the largest difference is "
                f"{self.difference:.1g})"
            )
        return (
            f"The head {self.head!r} of {self.student} as {self.auto_class} ({self.problem}, "
            f"{counted(len(self.label_names), 'output')}): its tokenizer cuts texts at "
            f"{self.max_length} tokens, as the student was trained, and the logits are those of "
            f"the head (the largest difference is {self.difference:.1g})"
        )

    @property
    def pipeline(self) -> str:
        """Return the name of its transformers pipeline."""
        return PIPELINES.get(self.problem, "text-classification")
