"""The figures of ``pipeline plan`` as values, read by its text, its JSON and its totals.

None means unknown.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from rekindle.data.targets.reading.cut import Truncation


@dataclass(frozen=True)
class Padding:
    """Tokens a student computes per token of text, with each setting of ``train.batching``; for
    ``groups`` about as many as for ``shuffled``.
    """

    batching: str  # as configured
    shuffled: float
    similar_lengths: float

    def as_text(self) -> str:
        """Describe the cost of the configured batching and of the other one."""
        values = {"shuffled": self.shuffled, "similar_lengths": self.similar_lengths}
        is_by_length = self.batching == "similar_lengths"
        configured = values.pop("similar_lengths" if is_by_length else "shuffled")
        ((other, value),) = values.items()
        return (
            f"train.batching {self.batching}: with padding, about {configured:.2f} tokens are "
            f"computed for each of the text ({other}: {value:.2f})"
        )


@dataclass(frozen=True)
class CorpusPlan:
    """The corpus. ``bytes`` are still to be written; ``basis`` says where the figures come from, or
    why there are none. ``texts`` is the number of documents, if the user asked for one.
    """

    source: tuple[str, ...]
    sequences: int | None
    tokens: int | None
    estimated: bool
    basis: str
    bytes: int | None
    sequence_length: int | None = None
    texts: int | None = None
    sequences_per_shard: int | None = None
    padding: Padding | None = None  # of the student's batches; None without a student
    trained: float | None = None  # share of trained tokens; None if all are trained
    # share of text in rows of several documents; None if each row is one document
    full: float | None = None


@dataclass(frozen=True)
class ViewPlan:
    """A view shown to a teacher or to the student."""

    name: str
    units_to_make: int
    units_present: int
    bytes: int
    at_most: bool = False  # the bytes are an upper bound, because the hard tokens are not known yet


@dataclass(frozen=True)
class TeacherWork:
    """What is left to do for one teacher. ``reason`` says why a figure is unknown."""

    name: str
    task: str
    kept: str = "?"
    share: float | None = None  # of the sequences, those in the teacher's domains
    units_to_make: int | None = None
    units_present: int | None = None
    positions: int | None = None
    bytes: int | None = None
    seconds_per_token: float | None = None  # per corpus token, in one replica, as probed
    seconds: float | None = None
    reason: str | None = None
    replicas: int = 1  # how often it sees each sequence
    at_most: bool = False  # the bytes are an upper bound: without a probe they depend on the model
    cut: Truncation | None = None  # None if no text is cut, or the model is not here
    longest: int | None = None  # most tokens the model takes, if it reads texts
    shares: tuple[str, ...] = ()  # other teachers made in the same forward passes
    requests: int | None = None  # requests to the server, if one runs this teacher
    at_a_time: int | None = None  # requests sent at the same time


@dataclass(frozen=True)
class BreakEven:
    """Student runs after which the cache has paid for itself; None if unknown. ``assumes``
    describes the runs compared with.
    """

    runs: int | None
    teachers: Mapping[str, int | None]
    sentence: str
    assumes: str = ""


@dataclass(frozen=True)
class NotMade:
    """A built-in model or file that the command that needs it will make."""

    name: str
    what: str
    path: str
    unknown: tuple[str, ...]  # figures that are unknown without it


@dataclass(frozen=True)
class Totals:
    """Sums of the known figures; ``unknown`` names the teachers with an unknown figure."""

    bytes: int | None  # None: the corpus is unknown
    seconds: float | None  # None: unknown for every teacher
    unknown: tuple[str, ...]
    disk: str | None  # the existing folder nearest to the cache; None for an object store
    disk_free: int | None


@dataclass(frozen=True)
class RunPlan:
    """Everything `pipeline plan` shows."""

    cache: str
    corpus: CorpusPlan
    views: tuple[ViewPlan, ...]
    teachers: tuple[TeacherWork, ...]
    break_even: BreakEven
    totals: Totals
    warnings: tuple[str, ...]
    to_make: tuple[NotMade, ...]  # built-in models and files that do not exist yet

    def as_dict(self) -> dict[str, object]:
        """Return the plan as JSON values."""
        values: dict[str, object] = json.loads(json.dumps(asdict(self), allow_nan=False))
        return values
