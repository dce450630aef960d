"""What a record may hold besides plain text: a dialogue as its template writes it, or tokens.

Also the interface of what reads these. Templates and tokenizers are unknown here.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from rekindle.data.source.record import BadRecord

Span = tuple[int, int]  # characters, from and to
PRIVATE_RUN = re.compile(f"[{chr(0xF0000)}-{chr(0xFFFFD)}]+")  # how special tokens are written


class Dialogue(NamedTuple):
    """A dialogue as its template writes it. ``written`` is as long as its text, with other
    characters for the special tokens that are meant as such; ``trained``: what the assistant says.
    """

    written: str
    trained: tuple[Span, ...]

    @property
    def parts(self) -> str:
        """Return the texts between its special tokens, each on its own line."""
        return PRIVATE_RUN.sub("\n", self.written)


class TokenRow(NamedTuple):
    """Tokens as given [L]: ids int32, and which are ``trained``; None: all."""

    ids: NDArray[np.int32]
    trained: NDArray[np.bool_] | None


RichContent = Dialogue | TokenRow


class Form(Protocol):
    """Reads a record's content."""

    @property
    def fields(self) -> tuple[str, ...]:
        """Return the fields that it reads."""
        ...

    def __call__(
        self, values: Mapping[str, object], columns: bool, where: str
    ) -> tuple[str, RichContent] | BadRecord:
        """Return the text (empty for tokens) and the content; ``columns``: missing values are null
        there; ``where``: the record's name in messages.
        """
        ...
