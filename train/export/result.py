"""What an export came to."""

from dataclasses import asdict, dataclass

from rekindle.data.counted import counted

PIPELINES = {"token_classification": "token-classification"}  # of transformers, by problem


@dataclass(frozen=True)
class Exported:
    """What was written: where, of which head, and how far its logits are from the head's."""

    out: str
    student: str
    head: str
    auto_class: str  # of transformers, which loads it
    problem: str
    label_names: tuple[str, ...]
    max_length: int  # tokens at which its tokenizer cuts: those the student was trained with
    difference: float  # the largest, as a share of the largest logit if that is above 1

    def as_dict(self) -> dict[str, object]:
        """Return it as plain values for JSON."""
        return asdict(self)

    def told(self) -> str:
        """Say what it is, in a sentence."""
        return (
            f"The head {self.head!r} of {self.student} as {self.auto_class} ({self.problem}, "
            f"{counted(len(self.label_names), 'output')}): its tokenizer cuts texts at "
            f"{self.max_length} tokens, as the student was trained, and the logits are those of "
            f"the head (the largest difference is {self.difference:.1g})"
        )

    @property
    def pipeline(self) -> str:
        """What transformers calls its pipeline."""
        return PIPELINES.get(self.problem, "text-classification")
