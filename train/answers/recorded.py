"""Read from an expert's folder how it was fine-tuned, so that it is asked in the same way."""

import json
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any

from rekindle.data.errors import InputError, did_you_mean
from rekindle.data.settings import parse_settings
from rekindle.train.answers.config import AskConfig
from rekindle.train.finetune.config import FORMER_FIELDS, FinetuneConfig
from rekindle.train.finetune.result import RESULT_FILE, WRITER

log = logging.getLogger("rekindle")

# Settings of the fine-tuning that say how texts and labels are read.
_READING = ("max_length", "problem", "label_separator", "label_names", "threshold", "positive")
# An expert's own settings, kept even when it is compared with others on the same rows. batch_size
# is one of them because the last digits depend on it.
_OWN = ("max_length", "threshold", "batch_size")


@dataclass(frozen=True)
class Recorded:
    """What ``pipeline finetune`` wrote beside an expert; empty for others."""

    metric: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    pairs: bool | None = None  # whether it scores pairs of texts, if recorded


def recorded(directory: Path) -> Recorded:
    """Read the record of a folder. A metrics.json written by another program is ignored.

    Raises InputError, naming file and key, if one of ours is damaged: ignoring it would silently
    change how texts are read.
    """
    path = directory / RESULT_FILE
    if not path.is_file():
        return Recorded()
    content = path.read_bytes()
    try:
        found = json.loads(content)
    except ValueError as error:  # also for bytes that are not UTF-8
        if WRITER.encode() not in content:
            return Recorded()
        raise _damaged(path, f"it is not JSON, {error}") from None
    if not isinstance(found, dict) or found.get("written_by") != WRITER:
        if isinstance(found, dict) and found.keys() >= {"metric", "config", "per_seed"}:
            raise _damaged(path, f"written_by is {found.get('written_by')!r}, not {WRITER!r}")
        return Recorded()
    metric, pairs = found.get("metric"), found.get("pairs")
    if not isinstance(metric, str) or not isinstance(found.get("config"), dict):
        raise _damaged(path, "metric must be a name, and config an object")
    if not isinstance(pairs, bool | NoneType):
        raise _damaged(path, f"pairs is {pairs!r}, but must be true or false")
    config = dict(found["config"])
    for former, name in zip(FORMER_FIELDS, ("text_field", "label_field"), strict=True):
        config.setdefault(name, config.pop(former, None))
    _check_config(path, config)
    return Recorded(metric, config, pairs)


def _check_config(path: Path, config: Mapping[str, Any]) -> None:
    """Raise InputError if a setting that is read again is misspelt or invalid."""
    names = {
        *_READING,
        *_OWN,
        "text_field",
        "label_field",
        "group_field",
    } & AskConfig.model_fields.keys()
    for key in config.keys() - FinetuneConfig.model_fields.keys():
        if meant := did_you_mean(key, names - config.keys()):
            raise _damaged(path, f"unknown key config.{key}{meant}")
    given = {name: config[name] for name in names if config.get(name) is not None}
    parse_settings(AskConfig, given, f"{path} is damaged, in config")


def _damaged(path: Path, told: str) -> InputError:
    return InputError(
        f"{path}, which says how the expert was fine-tuned, is damaged: {told}. Restore it from a "
        "copy, or remove it and give all settings again"
    )


def as_recorded(
    given: AskConfig, before: Recorded, columns: Collection[str], also: Sequence[str] = ()
) -> AskConfig:
    """Return ``given`` with its unset settings filled from the record, as far as the file has the
    columns they name; ``also`` lists further settings to fill.

    Log in one line what was taken over.
    """
    old, names = before.settings, _unusual(before, _READING)
    texts, label = old.get("text_field") or (), old.get("label_field")
    names += ["text_field"] if texts and all(name in columns for name in texts) else []
    group = old.get("group_field")
    names += ["group_field"] if group is not None and group in columns else []
    names += ["label_field"] if label not in (None, "label") and label in columns else []
    return _taken_over(given, before, [*names, *also])


def as_its_own(given: AskConfig, before: Recorded, who: str) -> AskConfig:
    """Return ``given`` with unset settings filled from an expert's own record, for a comparison:
    how it cuts texts, and from which probability a label holds. Log it in a line that begins with
    ``who``.
    """
    return _taken_over(given, before, _unusual(before, _OWN), f"{who}, ")


def _unusual(before: Recorded, names: Sequence[str]) -> list[str]:
    usual = AskConfig().model_dump(mode="json")
    return [name for name in names if name in usual and before.settings.get(name) != usual[name]]


def _taken_over(
    given: AskConfig, before: Recorded, names: Sequence[str], who: str = ""
) -> AskConfig:
    values, old = given.model_dump(exclude_unset=True), before.settings
    taken = {name: old[name] for name in names if name in old and name not in values}
    if not taken:
        return given
    told = ", ".join(f"{name}={_written(value)}" for name, value in taken.items())
    log.info("%sas it was fine-tuned: %s", who, told)
    return parse_settings(AskConfig, values | taken, RESULT_FILE)


def _written(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
