"""Dialogues already written by a template, as rows: for samples that are read again."""

from collections.abc import Mapping
from typing import Any

from rekindle.data.source.content import Dialogue, TokenRow
from rekindle.data.source.documents import Document

WRITTEN = "written"  # the content of such rows; configurations do not name it
_FIELDS = ("text", "written", "trained")


class WrittenDialogues:
    """Reads the rows that ``row_of`` makes."""

    fields = _FIELDS

    def __call__(
        self, values: Mapping[str, Any], columns: bool, where: str
    ) -> tuple[str, Dialogue]:
        """Return the dialogue of a row."""
        spans = tuple((int(a), int(b)) for a, b in values["trained"])
        return values["text"], Dialogue(values["written"], spans)


def content_of(document: Document) -> str:
    """Return the kind of content in a row of the document."""
    content = document.content
    if content is None:
        return "text"
    return WRITTEN if isinstance(content, Dialogue) else "tokens"


def row_of(document: Document) -> dict[str, object]:
    """Return the document as a row, to be read as ``content_of`` says."""
    row: dict[str, object] = {"id": document.id, "domain": document.domain or ""}
    row |= {} if document.group is None else {"group": document.group}
    content = document.content
    if isinstance(content, Dialogue):
        return row | {"text": document.text, "written": content.written, "trained": content.trained}
    if isinstance(content, TokenRow):
        mask = None if content.trained is None else content.trained.astype(int).tolist()
        return row | {"input_ids": content.ids.tolist(), "loss_mask": mask}
    return row | {"text": document.text, "pair": document.pair}
