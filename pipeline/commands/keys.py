"""The configuration keys of a command, beside its options: listed by --help, and named to whoever
gives one as an option. Reads the settings, so it is imported only where one of the two happens.
"""

import json
import shlex
import sys
from collections.abc import Sequence
from itertools import takewhile
from typing import Any, get_args, get_origin

from pydantic import BaseModel
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from rekindle.data.errors import InputError
from rekindle.data.settings import keys_called, sections_in


def settings_of(command: str, arguments: Sequence[str] = ()) -> type[BaseModel]:
    """Return the settings that ``--set`` of a command changes; ``arguments``: what else is
    typed.
    """
    if command == "finetune":
        from rekindle.train.finetune.config import FinetuneConfig

        return FinetuneConfig
    if command == "rekindle":
        from rekindle.pipeline.cycle.config import CycleConfig

        return CycleConfig
    if command == "import-targets":
        from rekindle.data.exchange.config import ImportConfig

        return ImportConfig
    if command == "generate":
        from rekindle.train.answers.config import GenerateConfig

        return GenerateConfig
    if command in ("evaluate", "predict", "compare"):
        from rekindle.train.answers.config import AskConfig, PerplexityConfig

        is_perplexity = any(argument.partition("=")[0] == "--text" for argument in arguments)
        return PerplexityConfig if command == "evaluate" and is_perplexity else AskConfig
    from rekindle.pipeline.config import RunConfig

    return RunConfig


def print_keys(command: str) -> None:
    """Print each key with its default and its meaning, as --help prints options."""
    for option in ("--test", "--text") if command == "evaluate" else ("",):
        table = Table.grid(padding=(0, 2))
        for key, meaning in listed(command, [option]):
            table.add_row(Text(key, style="bold cyan", overflow="fold"), Text(meaning))
        title = f"Keys of --set KEY=VALUE{option and f' with {option}'}, with their defaults"
        Console().print(Panel(table, title=title, title_align="left", border_style="dim"))


def listed(command: str, arguments: Sequence[str] = ()) -> list[tuple[str, str]]:
    """Return each key with its default as ``--set`` takes it, and its meaning."""
    rows = []
    for key, field in settings_of(command, arguments).model_fields.items():
        choices = _choices(field.annotation)
        choices_note = f" [{' | '.join(choices)}]" if len(choices) > 1 else ""
        rows.append((f"{key}={_as_yaml(field.default)}", f"{field.description}{choices_note}"))
    return rows


def refuse_option(command: str, option: str, arguments: Sequence[str]) -> None:
    """Raise InputError with the line to type if an unknown ``option`` is a key of the
    configuration, or another library's name for one; do nothing if it is neither.
    """
    settings = settings_of(command, arguments)
    keys = keys_called(settings, option.lstrip("-"))[:3]
    if not keys:
        return
    values = _typed_values(option, arguments)
    assignments = [f"{key}={_as_typed(_annotation(settings, key), values)}" for key in keys]
    lines = " or ".join(f"--set {shlex.quote(assignment)}" for assignment in assignments)
    raise InputError(
        f"{option} is no option of `pipeline {command}`: it is a key of the configuration, which "
        f"is set with --set. Type: {lines}"
    )


def _typed_values(option: str, arguments: Sequence[str]) -> list[str]:
    """Return what stands behind an option, until the next one."""
    for index, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name == option:
            following = arguments[index + 1 :]
            return (
                [value]
                if equals
                else [*takewhile(lambda argument: argument[:2] != "--", following)]
            )
    return []


def _as_typed(annotation: Any, values: Sequence[str]) -> str:
    """Return the first value, or all of a list, as ``--set`` takes them; a placeholder if there is
    none.

    A list has its own brackets, or gets them.
    """
    if not values:
        return "true" if annotation is bool else "VALUE"
    if (max_values := _max_values(annotation)) and not values[0].startswith("["):
        return f"[{', '.join(values[:max_values])}]"
    return values[0]


def _max_values(annotation: Any) -> int:
    """Return how many values a list takes at most; 0 for anything but a list."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (tuple, list):
        return sys.maxsize if origin is list or arguments[-1] is ... else len(arguments)
    return 0 if origin is dict else max(map(_max_values, arguments), default=0)


def _annotation(settings: type[BaseModel], key: str) -> Any:
    """Return the annotation of the value at a dotted key; None if unknown."""
    sections, annotation = [settings], None
    for part in key.split("."):
        if not part.isdecimal():
            fields = [
                section.model_fields[part] for section in sections if part in section.model_fields
            ]
            annotation = fields[0].annotation if fields else None
            sections = sections_in(annotation)
    return annotation


def _choices(annotation: Any) -> list[str]:
    """Return the words that a value may be."""
    if get_origin(annotation) is not None and not isinstance(annotation, type):
        return [word for argument in get_args(annotation) for word in _choices(argument)]
    return [annotation] if isinstance(annotation, str) else []


def _as_yaml(value: object) -> str:
    """Return a default as YAML."""
    return value if isinstance(value, str) else json.dumps(value)
