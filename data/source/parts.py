"""Divide a source into parts that can be read in parallel: cut here as bytes or record batches,
made into documents wherever a part is sent.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from rekindle.data.errors import InputError
from rekindle.data.source.documents import (
    Document,
    Fields,
    Pages,
    accept,
    document_blocks,
    documents_of,
)
from rekindle.data.source.held_texts import HeldTexts
from rekindle.data.source.left_out import LeftOut
from rekindle.data.source.record import BadRecord, Block
from rekindle.data.source.sources import Origin

PART_BYTES = 1 << 16  # small, so that the last parts leave no core idle for long


class Part(NamedTuple):
    """Consecutive blocks, each with its origin and the origin's number; and the error that stopped
    reading after them, if any.
    """

    blocks: Sequence[tuple[int, Origin, Block | Pages]]
    error: InputError | None = None

    @property
    def content(self) -> str:
        """Return the kind of content of its records, the same for all."""
        return self.blocks[0][1].content if self.blocks else "text"


@dataclass
class Documents:
    """The result of a part: its documents, what was left out, which origins had any text, and the
    error that stopped reading, if any.
    """

    documents: list[Document] = field(default_factory=list)
    left_out: LeftOut = field(default_factory=LeftOut)
    with_text: set[int] = field(default_factory=set)
    reached: int = 0  # the number of the last origin
    error: InputError | None = None


def cut_parts(origins: Sequence[Origin], fields: Fields) -> Iterator[Part]:
    """Yield all origins in parts of about PART_BYTES; small files with the same kind of content
    share a part. An error comes in its place among the parts.
    """
    blocks: list[tuple[int, Origin, Block | Pages]] = []
    size = 0
    try:
        for number, origin in enumerate(origins):
            if blocks and blocks[0][1].content != origin.content:
                yield Part(blocks)
                blocks, size = [], 0
            for block in document_blocks(origin, fields, PART_BYTES):
                blocks.append((number, origin, block))
                size += block.size
                if size >= PART_BYTES:
                    yield Part(blocks)
                    blocks, size = [], 0
    except InputError as error:
        yield Part(blocks, error)
        return
    if blocks:
        yield Part(blocks)


@dataclass(frozen=True)
class Reader:
    """Reads parts: which ``fields`` they have, whether bad records are left out, and texts that no
    record may hold. Small except for these texts, and picklable.
    """

    fields: Fields
    skip_bad: bool
    held: HeldTexts | None

    def __call__(self, part: Part) -> Documents:
        """Return a part's documents, up to the first error."""
        left_out = LeftOut(self.skip_bad, self.held)
        result = Documents(left_out=left_out, error=part.error)
        try:
            for number, origin, block in part.blocks:
                result.reached = number
                for document in documents_of(block, origin, self.fields):
                    if not isinstance(document, BadRecord):
                        result.with_text.add(number)
                    if accept(document, left_out):
                        result.documents.append(document)
                        left_out.kept_documents += 1
        except InputError as error:
            result.error = error
        left_out.held_texts = None  # everyone has them
        return result
