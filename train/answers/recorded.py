"""What an expert's folder says of how it was fine-tuned, so that it is asked in the same way."""

import json
import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rekindle.data.settings import parse_settings
from rekindle.train.answers.config import AskConfig
from rekindle.train.finetune.config import FORMER_FIELDS
from rekindle.train.finetune.result import RESULT_FILE, WRITER

log = logging.getLogger("rekindle")

# Settings of the fine-tuning that say how texts and labels are read.
_READING = ("max_length", "problem", "label_separator", "label_names", "threshold", "positive")
# Those that are an expert's own, whatever it is compared with on the same rows; the last digits
# depend on the size of a batch.
_OWN = ("max_length", "threshold", "batch_size")


@dataclass(frozen=True)
class Recorded:
    """What ``pipeline finetune`` wrote beside an expert; empty of others."""

    metric: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    pairs: bool | None = None  # whether it judges pairs of texts, if that was written


def recorded(directory: Path) -> Recorded:
    """Read it; what cannot be read is not there."""
    try:
        found = json.loads((directory / RESULT_FILE).read_text(encoding="utf-8"))
        if found["written_by"] != WRITER:
            return Recorded()
        config = dict(found["config"])
        for former, name in zip(FORMER_FIELDS, ("text_field", "label_field"), strict=True):
            config.setdefault(name, config.pop(former, None))
        return Recorded(found["metric"], config, found.get("pairs"))
    except (OSError, ValueError, KeyError, TypeError):
        return Recorded()


def as_recorded(
    given: AskConfig, before: Recorded, columns: Collection[str], also: Sequence[str] = ()
) -> AskConfig:
    """``given``, and of what it leaves open what was recorded, as far as a file has the columns;
    ``also`` of these further settings.

    What is taken over is said in a line.
    """
    old, names = before.settings, _unusual(before, _READING)
    texts, label = old.get("text_field") or (), old.get("label_field")
    names += ["text_field"] if texts and all(name in columns for name in texts) else []
    names += ["label_field"] if label not in (None, "label") and label in columns else []
    return _taken_over(given, before, [*names, *also])


def as_its_own(given: AskConfig, before: Recorded, who: str) -> AskConfig:
    """``given``, and of what it leaves open what is an expert's own, in a comparison: how it cuts
    texts, and from which probability a label holds. It is said in a line that begins with ``who``.
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
