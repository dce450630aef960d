"""What a record may hold that is no plain text: a dialogue as its template writes it, or tokens.

And who makes that of a record. Knows no template and no tokenizer.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from rekindle.data.source.record import Bad

Span = tuple[int, int]  # characters, from and to
PRIVATE_RUN = re.compile(f"[{chr(0xF0000)}-{chr(0xFFFFD)}]+")  # how special tokens are written


class Dialogue(NamedTuple):
    """A dialogue as its template writes it. ``written`` is as long as its text, and has other
    characters for the special tokens that are meant as such; ``trained``: what the assistant says.
    """

    written: str
    trained: tuple[Span, ...]

    @property
    def parts(self) -> str:
        """What stands between its special tokens, each in a line of its own."""
        return PRIVATE_RUN.sub("\n", self.written)


class GivenTokens(NamedTuple):
    """Tokens as they were given [L]: ids int32, and which are ``trained``; all where it is None."""

    ids: NDArray[np.int32]
    trained: NDArray[np.bool_] | None


Given = Dialogue | GivenTokens


class Form(Protocol):
    """Makes what is given of a record."""

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields that it reads."""
        ...

    def __call__(
        self, values: Mapping[str, object], columns: bool, where: str
    ) -> tuple[str, Given] | Bad:
        """The text (empty of tokens) and what it is; ``columns``: what a record lacks is null
        there; ``where``: the record in a message.
        """
        ...
