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
class ExpertRecord:
    """What ``pipeline finetune`` wrote beside an expert; empty for others."""

    metric: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    pairs: bool | None = None  # whether it scores pairs of texts, if recorded


def read_expert_record(directory: Path) -> ExpertRecord:
    """Read the record of a folder. A metrics.json written by another program is ignored.

    Raises InputError, naming file and key, if one of ours is damaged: ignoring it would silently
    change how texts are read.
    """
    path = directory / RESULT_FILE
    if not path.is_file():
        return ExpertRecord()
    content = path.read_bytes()
    try:
        record = json.loads(content)
    except ValueError as error:  # also for bytes that are not UTF-8
        if WRITER.encode() not in content:
            return ExpertRecord()
        raise _damaged(path, f"it is not JSON, {error}") from None
    if not isinstance(record, dict) or record.get("written_by") != WRITER:
        if isinstance(record, dict) and record.keys() >= {"metric", "config", "per_seed"}:
            raise _damaged(path, f"written_by is {record.get('written_by')!r}, not {WRITER!r}")
        return ExpertRecord()
    metric, pairs = record.get("metric"), record.get("pairs")
    if not isinstance(metric, str) or not isinstance(record.get("config"), dict):
        raise _damaged(path, "metric must be a name, and config an object")
    if not isinstance(pairs, bool | NoneType):
        raise _damaged(path, f"pairs is {pairs!r}, but must be true or false")
    config = dict(record["config"])
    for former, name in zip(FORMER_FIELDS, ("text_field", "label_field"), strict=True):
        config.setdefault(name, config.pop(former, None))
    _check_config(path, config)
    return ExpertRecord(metric, config, pairs)


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
        if suggestion := did_you_mean(key, names - config.keys()):
            raise _damaged(path, f"unknown key config.{key}{suggestion}")
    values = {name: config[name] for name in names if config.get(name) is not None}
    parse_settings(AskConfig, values, f"{path} is damaged, in config")


def _damaged(path: Path, problem: str) -> InputError:
    return InputError(
        f"{path}, which says how the expert was fine-tuned, is damaged: {problem}. Restore it from "
        "a copy, or remove it and give all settings again"
    )


def fill_from_record(
    settings: AskConfig, record: ExpertRecord, columns: Collection[str], others: Sequence[str] = ()
) -> AskConfig:
    """Return ``settings`` with what is unset filled from the record, as far as the file has the
    columns they name; ``others`` lists further settings to fill.

    Log in one line what was taken over.
    """
    recorded_settings, names = record.settings, _unusual(record, _READING)
    texts, label = recorded_settings.get("text_field") or (), recorded_settings.get("label_field")
    names += ["text_field"] if texts and all(name in columns for name in texts) else []
    group = recorded_settings.get("group_field")
    names += ["group_field"] if group is not None and group in columns else []
    names += ["label_field"] if label not in (None, "label") and label in columns else []
    return _taken_over(settings, record, [*names, *others])


def fill_own_settings(settings: AskConfig, record: ExpertRecord, subject: str) -> AskConfig:
    """Return ``settings`` with unset settings filled from an expert's own record, for a comparison:
    how it cuts texts, and from which probability a label holds. Log it in a line that begins with
    ``subject``.
    """
    return _taken_over(settings, record, _unusual(record, _OWN), f"{subject}, ")


def _unusual(record: ExpertRecord, names: Sequence[str]) -> list[str]:
    defaults = AskConfig().model_dump(mode="json")
    return [
        name for name in names if name in defaults and record.settings.get(name) != defaults[name]
    ]


def _taken_over(
    settings: AskConfig, record: ExpertRecord, names: Sequence[str], subject: str = ""
) -> AskConfig:
    values, recorded_settings = settings.model_dump(exclude_unset=True), record.settings
    filled = {
        name: recorded_settings[name]
        for name in names
        if name in recorded_settings and name not in values
    }
    if not filled:
        return settings
    described = ", ".join(f"{name}={_written(value)}" for name, value in filled.items())
    log.info("%sas it was fine-tuned: %s", subject, described)
    return parse_settings(AskConfig, values | filled, RESULT_FILE)


def _written(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
