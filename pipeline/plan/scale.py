"""The size of corpus the user asks about, in texts or tokens, whatever text exists."""

import re
from dataclasses import dataclass
from decimal import Decimal

from rekindle.data.errors import InputError

_SHORT_NUMBER = re.compile(r"(\d{1,3}(?:,\d{3})+|\d+(?:\.\d+)?) ?([kmbgt]?)", re.IGNORECASE)
_MULTIPLIERS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9, "t": 10**12}


@dataclass(frozen=True)
class Scale:
    """The number of texts (documents, records) or of tokens to plan for; one of the two."""

    texts: int | None = None
    tokens: int | None = None

    @classmethod
    def from_options(cls, texts: str | None, tokens: str | None) -> "Scale | None":
        """Read the options ``--texts`` and ``--tokens``; None if neither is given."""
        if texts is not None and tokens is not None:
            raise InputError("--texts and --tokens both say how large the corpus is; give one")
        if texts is not None:
            return cls(texts=_count(texts, "--texts"))
        return None if tokens is None else cls(tokens=_count(tokens, "--tokens"))

    def of(self, texts: int, tokens: int) -> tuple[int, int]:
        """Return both numbers, using the ratio of a sample."""
        if self.texts is not None:
            return self.texts, max(1, round(self.texts * tokens / texts))
        assert self.tokens is not None
        return max(1, round(self.tokens * texts / tokens)), self.tokens


def _count(text: str, option: str) -> int:
    try:
        number = float(text) if "e" in text.lower() else int(text)
        if 0 < number < 1e18 and number == int(number):
            return int(number)
    except ValueError:
        pass
    intended = _intended_number(text)
    hint = "as in 10000000 or 1e7" if intended is None else f"write {intended}"
    raise InputError(f"{option} {text!r} is no whole number above 0; {hint}")


def _intended_number(text: str) -> int | None:
    """Return the number meant by 1M, 1.5k or 1,000,000; None if it is not clear."""
    if (match := _SHORT_NUMBER.fullmatch(text.strip())) is None:
        return None
    number, unit = match.groups()
    value = Decimal(number.replace(",", "")) * _MULTIPLIERS[unit.lower()]
    return int(value) if value == int(value) and 0 < value < 10**18 else None
