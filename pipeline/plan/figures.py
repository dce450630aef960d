"""What ``pipeline plan`` knows of a run, as values: its text, its JSON and its totals read them.

None stands for what is not known.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from rekindle.data.targets.reading.cut import Cut


@dataclass(frozen=True)
class Padding:
    """Tokens that a student computes for each of the text, with either ``train.batching``; of
    groups about as many as shuffled.
    """

    batching: str  # as configured
    shuffled: float
    similar_lengths: float

    def as_text(self) -> str:
        """Say what the configured one costs, and the other."""
        values = {"shuffled": self.shuffled, "similar_lengths": self.similar_lengths}
        by_length = self.batching == "similar_lengths"
        own = values.pop("similar_lengths" if by_length else "shuffled")
        ((other, value),) = values.items()
        return (
            f"train.batching {self.batching}: with padding, about {own:.2f} tokens are computed "
            f"for each of the text ({other}: {value:.2f})"
        )


@dataclass(frozen=True)
class CorpusPlan:
    """The corpus. ``bytes`` are those to be written; ``basis`` says what the figures rest on, or
    why there are none. ``texts``: documents, where so many were asked about.
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
    trained: float | None = None  # the share of the tokens that is; None where all are
    full: float | None = None  # the share of rows of several documents that is text; None: of one


@dataclass(frozen=True)
class ViewPlan:
    """A view that a teacher or the student is shown."""

    name: str
    units_to_make: int
    units_present: int
    bytes: int
    at_most: bool = False  # whether the bytes are a bound: what is hard is not known before


@dataclass(frozen=True)
class TeacherWork:
    """What is left to do for one teacher; ``reason`` says why something is not known."""

    name: str
    task: str
    kept: str = "?"
    share: float | None = None  # of the sequences: those of its domains
    units_to_make: int | None = None
    units_present: int | None = None
    positions: int | None = None
    bytes: int | None = None
    seconds_per_token: float | None = None  # of the corpus, in one replica, as probed
    seconds: float | None = None
    reason: str | None = None
    replicas: int = 1  # how often it sees each sequence
    at_most: bool = False  # whether the bytes are a bound: without a probe they depend on the model
    cut: Cut | None = None  # None: it sees all of its texts, or is not at hand
    longest: int | None = None  # tokens that its model takes, of one that reads texts
    shares: tuple[str, ...] = ()  # teachers by whose forward passes it is made, too
    requests: int | None = None  # of one that a server runs: how often that is asked
    at_a_time: int | None = None  # of these


@dataclass(frozen=True)
class BreakEven:
    """Student runs after which the cache has paid for itself; None where it cannot be said.

    ``assumes``: what the runs are taken to be.
    """

    runs: int | None
    teachers: Mapping[str, int | None]
    sentence: str
    assumes: str = ""


@dataclass(frozen=True)
class NotMade:
    """A built-in model or file that the command which needs it will make."""

    name: str
    what: str
    path: str
    unknown: tuple[str, ...]  # the figures that are missing for want of it


@dataclass(frozen=True)
class Totals:
    """Sums of what is known; ``unknown`` names the teachers of which something is not."""

    bytes: int | None  # None: the corpus is not known
    seconds: float | None  # None: not known of any
    unknown: tuple[str, ...]
    disk: str | None  # the existing folder nearest to the cache; None for an object store
    disk_free: int | None


@dataclass(frozen=True)
class RunPlan:
    """All that `pipeline plan` shows."""

    cache: str
    corpus: CorpusPlan
    views: tuple[ViewPlan, ...]
    teachers: tuple[TeacherWork, ...]
    break_even: BreakEven
    totals: Totals
    warnings: tuple[str, ...]
    to_make: tuple[NotMade, ...]  # built-in models and files that are not made yet

    def as_dict(self) -> dict[str, object]:
        """The plan as JSON has it."""
        values: dict[str, object] = json.loads(json.dumps(asdict(self), allow_nan=False))
        return values
