"""The sizes and training of the built-in models, from settings.yaml."""

from pathlib import Path
from typing import Any

import yaml

from rekindle.data.settings import Settings, parse_settings
from rekindle.pipeline.builtin.sections import SectionSizes
from rekindle.pipeline.builtin.tasks import TaskSizes

Numbers = dict[str, int | float]  # settings by name


class BuiltInSettings(Settings):
    """Sizes and training of the built-in models."""

    vocabulary: int
    documents: int | None
    sizes: TaskSizes
    sections: SectionSizes
    positions: int
    sequence_length: int
    batch_sequences: int
    replicas: int
    seed: int
    bert: Numbers
    bert_larger: Numbers
    gpt2: Numbers
    gpt2_larger: Numbers
    pretrain: dict[str, Any]
    further: dict[str, Any]
    finetune: dict[str, Any]
    encoder: Numbers


_FILE = Path(__file__).with_suffix(".yaml")
SETTINGS = parse_settings(BuiltInSettings, yaml.safe_load(_FILE.read_text(encoding="utf-8")))
