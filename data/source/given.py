"""What a record may hold other than plain text (a templated dialogue, or tokens), and the protocol
of what makes it. Knows no template and no tokenizer.
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
    """A dialogue as its template writes it. ``written`` is as long as its text, with placeholder
    characters for real special tokens; ``trained``: what the assistant says.
    """

    written: str
    trained: tuple[Span, ...]

    @property
    def parts(self) -> str:
        """The text between its special tokens, each part in its own line."""
        return PRIVATE_RUN.sub("\n", self.written)


class GivenTokens(NamedTuple):
    """Given tokens [L]: ids int32, and which are ``trained`` (None: all)."""

    ids: NDArray[np.int32]
    trained: NDArray[np.bool_] | None


Given = Dialogue | GivenTokens


class Form(Protocol):
    """Turns a record into a dialogue or tokens."""

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields it reads."""
        ...

    def __call__(
        self, values: Mapping[str, object], columns: bool, where: str
    ) -> tuple[str, Given] | Bad:
        """Return the text (empty for tokens) and its form. ``columns``: missing fields are null;
        ``where``: the record's place for messages.
        """
        ...
