"""The run configuration: one YAML file for both stages. Reading it imports no torch and touches no model."""

import difflib
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, model_validator

from rekindle.data.corpus import CorpusConfig
from rekindle.data.errors import InputError
from rekindle.data.masking import MaskConfig
from rekindle.data.settings import Settings, parse_settings
from rekindle.pipeline.teacher_config import TeacherConfig
from rekindle.train.config import StudentConfig, TrainConfig


class CacheConfig(Settings):
    """Where the cache is and how examples are shown."""

    path: str = Field(description="local path, s3://…, gs://…")
    sequences_per_shard: int = Field(
        4096, gt=0, description="sequences per shard: the unit of work and of what a kill can lose"
    )
    replicas: int = Field(4, gt=0, le=999, description="masked replicas for masked-LM teachers")
    mask: MaskConfig = Field(default_factory=MaskConfig, description="how tokens are masked")
    seed: int = Field(0, description="of masks and pairs")


class RunConfig(Settings):
    """The whole file."""

    corpus: CorpusConfig = Field(description="the text")
    cache: CacheConfig = Field(description="where the cache is")
    teachers: tuple[TeacherConfig, ...] = Field((), description="the experts")
    student: StudentConfig | None = Field(None, description="the model that is trained")
    train: TrainConfig = Field(default_factory=TrainConfig, description="how it is trained")

    @model_validator(mode="after")
    def _names(self) -> "RunConfig":
        names = [t.name for t in self.teachers]
        doubled = sorted({n for n in names if names.count(n) > 1})
        if doubled:
            raise ValueError(f"two teachers are called {doubled[0]!r}; give each its own name")
        return self

    @property
    def needs_masks(self) -> bool:
        """Whether a masked view is needed, by a teacher or by the student."""
        student = self.student is not None and self.student.task == "masked_lm"
        return student or any(t.task == "masked_lm" for t in self.teachers)


def load_config(path: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """Read and validate a run file, with ``key.path=value`` overrides (values are YAML).

    Raises InputError for a missing file, bad YAML, an unknown key (naming the nearest) or a bad value.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot read the configuration {path}: {error.strerror}") from None
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise InputError(f"{path} must be a mapping with the sections corpus, cache, teachers, …")
    for override in overrides or []:
        set_value(values, override)
    return parse_settings(RunConfig, values, str(path))


def set_value(values: dict[str, Any], override: str) -> None:
    """Apply one ``a.b.0.c=value`` to nested dictionaries and lists, in place."""
    path, separator, text = override.partition("=")
    if not separator or not path.strip():
        raise InputError(f"--set takes key.path=value, got {override!r}")
    here: Any = values
    parts = path.strip().split(".")
    for part in parts[:-1]:
        here = _step(here, part, path)
    value = yaml.safe_load(text)
    if isinstance(here, list):
        here[_index(here, parts[-1], path)] = value
    else:
        here[parts[-1]] = value


def _step(here: Any, part: str, path: str) -> Any:
    if isinstance(here, list):
        return here[_index(here, part, path)]
    if not isinstance(here, dict):
        raise InputError(f"--set {path}: {part!r} lies below a plain value")
    if here.get(part) is None:
        here[part] = {}
    return here[part]


def _index(here: list, part: str, path: str) -> int:
    if not part.isdigit() or int(part) >= len(here):
        named = [item.get("name") for item in here if isinstance(item, dict) and "name" in item]
        if part in named:
            return named.index(part)
        near = difflib.get_close_matches(part, [n for n in named if n], n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise InputError(f"--set {path}: {part!r} is no item of a list of {len(here)}{hint}")
    return int(part)


def dump_config(config: RunConfig) -> str:
    """The resolved configuration as YAML, loadable again."""
    values = config.model_dump(mode="json", by_alias=True)
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
