"""What the configuration says of a run of several stages, and what ``"{first}"`` in it stands for.

No stage is configured or run here: ``config.configure_stage`` makes a stage's whole configuration,
``stages.py`` runs them.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field, field_validator

from rekindle.data.errors import InputError, did_you_mean
from rekindle.data.settings import Settings
from rekindle.data.targets.schema import TEACHER_NAME
from rekindle.pipeline.plain_values import strings_in, values_in, with_strings

_REFERENCE = re.compile(r"\{([^{}]*)\}")
_PLACEHOLDERS = ("text", "label")


class PromptsConfig(Settings):
    """Text made of cached predictions before a stage begins (prompted continued pre-training)."""

    teacher: str = Field(description="a cached classifier; its most probable label is written")
    template: str = Field(
        "{text} This is about {label}.",
        description="the line: {text} is the sequence, {label} the word of its label",
    )
    words: dict[str, str] | None = Field(
        None, description="label name -> word, for every label; null: the names themselves"
    )
    to: str = Field(
        pattern=r"\.jsonl$", description="the new corpus: lines with id, text and domain"
    )
    confidence: float = Field(
        0.0, ge=0, le=1, description="only sequences whose label has at least this probability"
    )
    cache: str | None = Field(
        None, description="the cache the teacher is in; null: that of the file's own cache.path"
    )

    @field_validator("template")
    @classmethod
    def _complete(cls, value: str) -> str:
        check_template(value)
        return value


class StageConfig(Settings):
    """One run: the file with some values changed."""

    name: str = Field(pattern=TEACHER_NAME, description="its folder in the output directory")
    set: dict[str, object] = Field(
        default_factory=dict,
        description="key.path: value over the file; '{first}' stands for the directory of the "
        "earlier stage of that name",
    )
    write_prompts: PromptsConfig | None = Field(
        None, description="text that is made of cached predictions before the stage begins"
    )

    @field_validator("set")
    @classmethod
    def _each_key_once(cls, value: dict[str, object]) -> dict[str, object]:
        for key in value:
            if key.split(".")[0] == "stages":
                raise ValueError(f"{key}: a stage has no stages of its own")
            above = next((other for other in value if key.startswith(f"{other}.")), None)
            if above:
                raise ValueError(f"{above!r} and {key!r} set the same value; give one of them")
        return value


def check_template(template: str) -> None:
    """Raise ValueError unless ``template`` has {text} and {label}, and no other placeholder."""
    found = _REFERENCE.findall(template)
    missing = [name for name in _PLACEHOLDERS if name not in found]
    unknown = [name for name in found if name not in _PLACEHOLDERS]
    if missing or unknown:
        wrong = f"has no {{{missing[0]}}}" if missing else f"has {{{unknown[0]}}}"
        raise ValueError(
            f"the template {template!r} {wrong}; it needs {{text}} and {{label}}, and takes "
            "nothing else in braces"
        )


def fill_template(template: str, text: str, label: str) -> str:
    """The template with its placeholders filled; braces in ``text`` stay as they are."""
    values = {"text": text, "label": label}
    return _REFERENCE.sub(lambda found: values[found[1]], template)


def check_stages(stages: Sequence[StageConfig]) -> None:
    """Raise InputError for two stages of one name, and for a reference to no earlier stage."""
    earlier: list[str] = []
    for stage in stages:
        name = stage.name.casefold()  # some file systems do not tell them apart
        if name == "stages.json":
            raise InputError(f"a stage cannot be called {stage.name!r}: a file has that name")
        if name in (other.casefold() for other in earlier):
            raise InputError(f"two stages are called {stage.name!r}; give each its own name")
        if stage.write_prompts is not None:
            prompts = stage.write_prompts
            _check_references(stage.name, [prompts.to, prompts.cache or ""], earlier)
        _check_references(stage.name, stage.set, earlier)
        earlier.append(stage.name)


def _check_references(stage: str, value: object, earlier: Sequence[str]) -> None:
    for name in references(value):
        if name not in earlier:
            hint = did_you_mean(f"{{{name}}}", [f"{{{one}}}" for one in earlier])
            raise InputError(
                f"stage {stage!r}: '{{{name}}}' is no earlier stage (there are: "
                f"{', '.join(earlier) or 'none'}){hint}"
            )
    for name in earlier:
        if {name: None} in values_in(value):
            raise InputError(
                f"stage {stage!r}: {{{name}}} without quotes is a mapping in YAML; write "
                f'"{{{name}}}" for the directory of that stage'
            )


def references(value: object) -> list[str]:
    """Return the names in braces in ``value``'s strings, each once, in the order they stand."""
    return list(dict.fromkeys(n for text in strings_in(value) for n in _REFERENCE.findall(text)))


def with_directories(value: Any, directories: Mapping[str, str]) -> Any:
    """Return ``value`` with the directories for the references in its strings; unknown ones
    stay.
    """

    def replaced(text: str) -> str:
        return _REFERENCE.sub(lambda found: directories.get(found[1], found[0]), text)

    return with_strings(value, replaced)
