"""Render dialogues with a chat template, and find the assistant's part of the result.

No tokens are made here. Templates are programs by strangers: they run in transformers' sandbox.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from rekindle.data.errors import InputError
from rekindle.data.source.content import Span
from rekindle.data.storage.addresses import open_binary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Some templates write the date into the system message; a corpus must be the same every day.
DAY = "26 Jul 2024"
_GENERATION = re.compile(r"\{%-?\+?\s*generation\s*-?\+?%\}")
_TODAY = f"{{%- macro strftime_now(format) -%}}{DAY}{{%- endmacro -%}}"

Messages = Sequence[Mapping[str, object]]


class UnfitDialogue(Exception):
    """What is wrong with a dialogue: the kind, for counting, and in words."""

    def __init__(self, kind: str, reason: str):
        super().__init__(reason)
        self.kind, self.reason = kind, reason


class Template:
    """A chat template: its ``source`` as Jinja, and the special tokens by the names it uses."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]):
        self.source, self.special_tokens = source, dict(special_tokens)

    @property
    def digest(self) -> str:
        """Return the identity of what it writes."""
        content = f"{self.source}\0{sorted(self.special_tokens.items())}"
        return hashlib.sha256(content.encode()).hexdigest()

    @cached_property
    def marks_generation(self) -> bool:
        """Return whether it marks what the assistant generates, by ``{% generation %}``."""
        return bool(_GENERATION.search(self.source))

    def render(
        self, messages: Messages, tools: Sequence[object] | None
    ) -> tuple[str, tuple[Span, ...]]:
        """Return the dialogue as text, and where in it the assistant speaks.

        Raises UnfitDialogue if the template raises, and if its text for the first turns alone
        differs from its text for them within the whole.
        """
        if self.marks_generation:
            text, spans = self._render(messages, tools, mark_generation=True)
            return text, tuple((a, b) for a, b in spans if a < b)
        text = self._render(messages, tools)[0]
        spans = []
        for number, message in enumerate(messages):
            if message.get("role") == "assistant":
                before = self._render(messages[:number], tools, prompt=True)[0]
                content = self._render(messages[: number + 1], tools)[0]
                if not content.startswith(before) or not text.startswith(content):
                    raise _rewrite_error(number)
                spans.append((len(before), len(content)))
        return text, tuple((a, b) for a, b in spans if a < b)

    def prompt(self, messages: Messages, tools: Sequence[object] | None) -> str:
        """Return the messages as text, up to the assistant's turn. Raise UnfitDialogue if the
        template raises.
        """
        return self._render(messages, tools, prompt=True)[0]

    def _render(
        self,
        messages: Messages,
        tools: Sequence[object] | None,
        mark_generation: bool = False,
        prompt: bool = False,
    ) -> tuple[str, list[Span]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        source = _TODAY + self.source if "strftime_now" in self.source else self.source
        try:
            texts, spans = render_jinja_template(
                [[*messages]],
                tools=None if tools is None else [*tools],
                chat_template=source,
                return_assistant_tokens_mask=mark_generation,
                add_generation_prompt=prompt,
                **self.special_tokens,
            )
        except Exception as error:  # any error on unexpected input
            count = len(messages)
            scope = (
                f" (of the first {count} messages, with a prompt for the next)" if prompt else ""
            )
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            reason = f"the chat template raises{scope}: {reason}"
            raise UnfitDialogue("the template raises", reason) from None
        return str(texts[0]), [*spans[0]] if mark_generation else []


def _rewrite_error(number: int) -> UnfitDialogue:
    return UnfitDialogue(
        "the template rewrites turns",
        f"what the template writes up to message {number + 1} differs from what it writes of it "
        "within the whole dialogue (it rewrites earlier turns), so the assistant's part cannot "
        f"be found. Put {{% generation %}} … {{% endgeneration %}} around it in a template of "
        "your own (corpus.chat_template: FILE)",
    )


def find_template(hf: "PreTrainedTokenizerFast", name: str, file: str | None) -> Template:
    """Return the template in a ``file``, or else that of the tokenizer called ``name``.

    Raises InputError if there is none.
    """
    source = hf.chat_template if file is None else _read(file)
    if isinstance(source, dict):  # some tokenizers have several, by name
        source = source.get("default")
    if not source:
        raise InputError(
            f"the tokenizer {name} has no chat template, which dialogues (corpus.format: chat) "
            "need. Give a file with one, in Jinja (corpus.chat_template: FILE), or the tokenizer "
            "of the model's instruction-tuned sibling, which has one"
        )
    return Template(str(source), hf.special_tokens_map)


def _read(path: str) -> str:
    try:
        with open_binary(path) as file:
            return bytes(file.read()).decode()
    except (OSError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"corpus.chat_template: {path} cannot be read: {reason}") from None
