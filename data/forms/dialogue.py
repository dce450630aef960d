"""Rows of dialogues: ``messages``, and the available ``tools``, written by a chat template.

Names of special tokens that a user (or a tool) writes are text; those that the template writes are
tokens. To tell them apart, names within messages are hidden from the template by the same number of
meaningless characters, and afterwards the template's own names are marked as tokens.
"""

import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property

from rekindle.data.errors import did_you_mean
from rekindle.data.forms.template import Template, UnfitDialogue
from rekindle.data.source.content import Dialogue, Span
from rekindle.data.source.record import BadRecord, show_value

_FIELDS = ("messages", "tools")
_SPEAKER_KEYS = ("role", "name")  # says who speaks, not what is said
_TEXT_PLANE = 0x100000  # private characters for names that are text
_TOKEN_PLANE = 0xF0000  # and for tokens
MAX_NAMES = 0xFFFE  # a plane of private characters
_HIDDEN_RUN = re.compile(f"([{chr(_TEXT_PLANE)}-{chr(_TEXT_PLANE + MAX_NAMES)}])\\1*")
_PLANES = "".join(f"{chr(a)}-{chr(a + MAX_NAMES)}" for a in (_TOKEN_PLANE, _TEXT_PLANE))
_PRIVATE = re.compile(f"[{_PLANES}]")


def write_as_token(number: int, name: str) -> str:
    """Return how the special token of that ``number`` is written where it is meant as one: as long
    as its name, so that every character keeps its place.
    """
    return chr(_TOKEN_PLANE + number) * len(name)


class Dialogues:
    """Reads dialogues. ``names`` are those of the special tokens; ``as_tokens``: names in messages
    are tokens, too.
    """

    def __init__(self, template: Template, names: Sequence[str], as_tokens: bool):
        self.template, self.names, self.as_tokens = template, tuple(names), as_tokens

    @property
    def fields(self) -> tuple[str, ...]:
        """Return the fields that it reads."""
        return _FIELDS

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.names)}

    @cached_property
    def _name_pattern(self) -> re.Pattern[str]:
        longest_first = sorted(filter(None, self.names), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def __call__(
        self, values: Mapping[str, object], columns: bool, where: str
    ) -> tuple[str, Dialogue] | BadRecord:
        """Return the dialogue of a record, as its template writes it."""
        try:
            written, spans = self.template.render(*self._render_input(values, columns))
        except UnfitDialogue as error:
            return BadRecord(error.kind, f"{where}: {error.reason}")
        return self._document(written, spans, where)

    def prompt(
        self, values: Mapping[str, object], columns: bool, where: str
    ) -> tuple[str, Dialogue] | BadRecord:
        """Return the same up to the assistant's turn, without a last answer of the assistant."""
        try:
            messages, tools = self._render_input(values, columns)
            while messages and messages[-1].get("role") == "assistant":
                messages.pop()
            written = self.template.prompt(messages, tools)
        except UnfitDialogue as error:
            return BadRecord(error.kind, f"{where}: {error.reason}")
        return self._document(written, (), where)

    def _render_input(
        self, values: Mapping[str, object], columns: bool
    ) -> tuple[list[dict[str, object]], list[object] | None]:
        """Return what the template sees of a record."""
        messages, tools = _messages(values, columns), _tools(values, columns)
        messages_hidden = [
            {key: self._hide_in(item) for key, item in each.items()} for each in messages
        ]
        return messages_hidden, None if tools is None else [*map(self._hide_in, tools)]

    def _document(
        self, written: str, spans: tuple[Span, ...], where: str
    ) -> tuple[str, Dialogue] | BadRecord:
        if not written or written.isspace():
            return BadRecord(
                "nothing written", f"{where}: the template writes nothing for the dialogue"
            )
        return self._restore_names(written), Dialogue(
            self._restore_names(self._mark_tokens(written)), spans
        )

    # --- names of special tokens ---

    def _hide(self, text: str) -> str:
        if _PRIVATE.search(text):
            raise UnfitDialogue(
                "private characters",
                "a message has characters from Unicode's private planes 15 or 16, which are used "
                "to tell names of special tokens from the tokens; remove them",
            )
        if self.as_tokens:
            return text
        return self._name_pattern.sub(
            lambda m: chr(_TEXT_PLANE + self._numbers[m[0]]) * len(m[0]), text
        )

    def _mark_tokens(self, text: str) -> str:
        return self._name_pattern.sub(lambda m: write_as_token(self._numbers[m[0]], m[0]), text)

    def _restore_names(self, text: str) -> str:
        if not _HIDDEN_RUN.search(text):
            return text
        return _HIDDEN_RUN.sub(self._restored_name, text)

    def _restored_name(self, run: re.Match[str]) -> str:
        name, length = self.names[ord(run[0][0]) - _TEXT_PLANE], len(run[0])
        return (name * -(-length // len(name)))[:length]

    def _hide_in(self, value: object) -> object:
        if isinstance(value, str):
            return self._hide(value)
        if isinstance(value, Mapping):
            return {key: self._hide_in(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [*map(self._hide_in, value)]
        return value


# --- what a record holds --------------------------------------------------------------------------


def _messages(values: Mapping[str, object], columns: bool) -> list[dict[str, object]]:
    messages_given = values.get("messages")
    if messages_given is None:
        present = ", ".join(map(str, values)) or "no fields"
        hint = did_you_mean("messages", map(str, values))
        if "conversations" in values:
            hint = "; rename conversations, with role and content for from and value"
        raise UnfitDialogue("no messages", f"no field 'messages'; it has: {present}{hint}")
    messages = _parsed(messages_given, "messages")
    if not isinstance(messages, list) or not messages:
        raise UnfitDialogue(
            "no messages", f"messages must be a list, but is {show_value(messages_given)}"
        )
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            problem = f"message {number} is {show_value(message)}; each has a role (and a content)"
            raise UnfitDialogue("no message", problem)
        if problem := _content_problem(message):
            raise UnfitDialogue("no message", f"message {number} {problem}")
    return [
        # Like transformers: templates write null as "None".
        {key: _without_nulls(value, columns) for key, value in message.items() if value is not None}
        for message in messages
    ]


def _content_problem(message: Mapping[object, object]) -> str:
    """Return what is wrong with a content that a template would still write (treating a missing one
    as empty); "" if nothing.

    Tool calls, thoughts and the like may have no content; a number would be written as in Python.
    """
    content = message.get("content")
    if isinstance(content, int | float):
        return f"has {show_value(content)} as its content, which must be text"
    if content is not None:
        return ""
    others = [
        str(key) for key, value in message.items() if value is not None and key not in _SPEAKER_KEYS
    ]
    hint = did_you_mean("content", (key for key in others if abs(len(key) - len("content")) < 2))
    if others and not hint:
        return ""
    return f"of {message['role']!r} has no content{hint}; write an empty one if it says nothing"


def _tools(values: Mapping[str, object], columns: bool) -> list[object] | None:
    tools = _parsed(values.get("tools"), "tools")
    if tools is None or tools == []:
        return None
    schemas = [_parsed(tool, "tools") for tool in tools] if isinstance(tools, list) else [None]
    if not all(isinstance(tool, Mapping) for tool in schemas):
        problem = f"tools must be a list of their JSON schemas, but is {show_value(tools)}"
        raise UnfitDialogue("wrong tools", problem)
    return [_without_nulls(tool, columns) for tool in schemas]


def _parsed(value: object, field: str) -> object:
    """Return a value, or its content if it is JSON in a text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise UnfitDialogue(f"wrong {field}", f"{field} is text but not JSON: {error}") from None


def _without_nulls(value: object, columns: bool) -> object:
    """Return the value without its nulls, if ``columns`` have nulls for keys of other rows."""
    if not columns:
        return value
    if isinstance(value, Mapping):
        present = {key: item for key, item in value.items() if item is not None}
        return {key: _without_nulls(item, columns) for key, item in present.items()}
    return [_without_nulls(item, columns) for item in value] if isinstance(value, list) else value
