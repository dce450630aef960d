"""Which records of a source are left out, and why: counts, and how they are reported."""

import logging
from array import array
from collections.abc import Mapping, Sequence

from rekindle.data.counted import counted
from rekindle.data.source.held_texts import HeldCounts, HeldText, HeldTexts
from rekindle.data.source.record import BadRecord

log = logging.getLogger("rekindle")

MAX_SHOWN = 100  # characters of a test's text in a message


class LeftOut:
    """Records that are left out: bad ones, unless they are errors, and those that hold a text of a
    test; for each kind, how many documents were kept before each record.
    """

    def __init__(self, skips_bad: bool = True, held_texts: HeldTexts | None = None) -> None:
        self.skips_bad, self.held_texts = skips_bad, held_texts
        self.first = ""  # what is wrong with the first bad one
        self.first_held = ""  # the first record that holds a text, and the text
        # documents kept so far, in which the places of left-out records are counted
        self.kept_documents = 0
        self._bad: dict[str, array[int]] = {}
        self._held: dict[str, array[int]] = {}

    def add(self, bad: BadRecord) -> None:
        """Note one more bad record."""
        self.first = self.first or bad.message
        self._bad.setdefault(bad.kind, array("q")).append(self.kept_documents)

    def add_held(self, document: str, hold: HeldText) -> None:
        """Note one more record that holds a text."""
        nearly = " nearly" * (hold.kind == "near")
        text = f"{hold.text[:MAX_SHOWN]}{'…' * (len(hold.text) > MAX_SHOWN)}"
        self.first_held = self.first_held or f"{document} holds{nearly}: {text}"
        self._held.setdefault(hold.kind, array("q")).append(self.kept_documents)

    def extend(self, other: "LeftOut") -> None:
        """Append what was left out of the next part, and count its documents."""
        self.first = self.first or other.first
        self.first_held = self.first_held or other.first_held
        for own_places, other_places in ((self._bad, other._bad), (self._held, other._held)):
            for kind, places in other_places.items():
                shifted = array("q", [self.kept_documents + before for before in places])
                own_places.setdefault(kind, array("q")).extend(shifted)
        self.kept_documents += other.kept_documents

    def counts(self, last_document: int | None = None) -> dict[str, int]:
        """Return how many bad ones of each kind there are, up to the document of that index or in
        all.
        """
        return _count_up_to(self._bad, last_document)

    def held(self, last_document: int | None = None) -> HeldCounts:
        """Return how many hold a text, up to the document of that index or in all."""
        return HeldCounts(**_count_up_to(self._held, last_document))

    def log_first(self) -> None:
        """Log the first one of each in a line."""
        if self.first:
            log.warning("the first bad record that was left out: %s", self.first)
        if self.first_held:
            log.info("the first record left out for a test's text: %s", self.first_held)

    @property
    def total(self) -> int:
        """Return how many were left out so far."""
        return sum(map(len, (*self._bad.values(), *self._held.values())))

    def advice(self, usual: str) -> str:
        """Return advice if no document is left: ``usual``, unless all were left out for texts of
        tests.
        """
        if any(self.held()) and not self._bad:
            return "give other text, or other files in corpus.without: it held texts of these"
        return usual

    def describe(self, last_document: int | None = None) -> str:
        """Return what was left out, up to the document of that index or in all, in words; "" if
        nothing was.
        """
        sentences = []
        if bad := self.counts(last_document):
            sentences += [describe_bad(bad), f"the first: {self.first}"]
        if any(held := self.held(last_document)):
            sentences += [describe_held(held), f"the first: {self.first_held}"]
        return "; ".join(sentences)


def _count_up_to(left_out: "Mapping[str, array[int]]", last_document: int | None) -> dict[str, int]:
    counts = {
        kind: sum(last_document is None or before <= last_document for before in places)
        for kind, places in sorted(left_out.items())
    }
    return {kind: number for kind, number in counts.items() if number}


def describe_bad(counts: Mapping[str, int]) -> str:
    """Return how many bad records of each kind were left out, in words; "" if none."""
    kinds = ", ".join(f"{number:,} {kind}" for kind, number in counts.items())
    return f"bad records left out: {kinds}" if counts else ""


def describe_held(counts: HeldCounts, files: Sequence[str] = ()) -> str:
    """Return how many records were left out because they hold a text, in words."""
    of = ", ".join(files) or "corpus.without"
    return (
        f"{counted(sum(counts), 'record')} left out for texts of {of} ({counts.exact:,} hold one "
        f"exactly, {counts.near:,} nearly)"
    )
