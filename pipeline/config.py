"""The run configuration: one YAML file for both stages. Reading it imports no torch and touches no
model.
"""

from collections.abc import Mapping
from pathlib import Path

import yaml
from pydantic import Field, model_validator

from rekindle.data.corpus.config import CorpusConfig
from rekindle.data.errors import InputError
from rekindle.data.settings import Settings, parse_settings
from rekindle.data.views.masking import MaskConfig
from rekindle.pipeline.builtin.names import resolve_values
from rekindle.pipeline.overrides import put_value, set_value
from rekindle.pipeline.plain_values import parse_yaml
from rekindle.pipeline.stage_config import StageConfig, check_stages, with_directories
from rekindle.pipeline.teacher_config import TeacherConfig
from rekindle.train.config import StudentConfig, TrainConfig


class CacheConfig(Settings):
    """Where the cache is and how examples are shown."""

    path: str = Field(description="local path, s3://…, gs://…")
    sequences_per_shard: int = Field(
        4096, gt=0, description="sequences per shard: the unit of work and of what a kill can lose"
    )
    replicas: int = Field(
        4,
        gt=0,
        le=999,
        description="masked replicas for masked-LM teachers; mask.policy hard has one",
    )
    mask: MaskConfig = Field(default_factory=MaskConfig, description="how tokens are masked")
    seed: int = Field(0, description="of masks and pairs")

    @property
    def masked_replicas(self) -> int:
        """Return how many masked replicas there are: what a teacher finds hard is masked in one."""
        return 1 if self.mask.policy == "hard" else self.replicas


class RunConfig(Settings):
    """The whole file."""

    corpus: CorpusConfig = Field(description="the text")
    cache: CacheConfig = Field(description="where the cache is")
    teachers: tuple[TeacherConfig, ...] = Field((), description="the experts")
    student: StudentConfig | None = Field(None, description="the model that is trained")
    train: TrainConfig = Field(default_factory=TrainConfig, description="how it is trained")
    stages: tuple[StageConfig, ...] = Field(
        (), description="runs one after another, each of them this file with some values changed"
    )

    @model_validator(mode="after")
    def _names_and_stages(self) -> "RunConfig":
        # Teachers named in train.objective are held against the cache: Cache.teacher.
        names = [t.name for t in self.teachers]
        doubled = sorted({n for n in names if names.count(n) > 1})
        if doubled:
            raise ValueError(f"two teachers are called {doubled[0]!r}; give each its own name")
        check_stages(self.stages)
        for stage in self.stages:
            configure_stage(self, stage)
        return self

    def check_single(self) -> None:
        """Raise InputError for a file of several stages: what follows is about one of them."""
        if self.stages:
            raise InputError(
                f"the configuration has stages ({', '.join(s.name for s in self.stages)}); this "
                "takes one configuration. Give it the run.yaml of a stage, which `pipeline "
                "train-student` leaves in the stage's folder, or a file without `stages`"
            )

    @property
    def evaluates_domains(self) -> bool:
        """Tell whether the run, or one of its stages, evaluates the domains one by one."""
        key = "train.evaluate_domains"
        return self.train.evaluate_domains or any(stage.set.get(key) for stage in self.stages)

    @property
    def needs_masks(self) -> bool:
        """Tell whether a masked view is needed, by a teacher or by the student."""
        student = self.student is not None and self.student.language_task == "masked_lm"
        asked_for = self.cache.mask.policy == "hard"
        return student or asked_for or any(t.sees_masks for t in self.teachers)


def load_config(path: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """Read and validate a run file, with ``key.path=value`` overrides (values are YAML).

    Names that begin with ``python-docs/`` become the paths of built-in models, whether these are
    made yet or not (``builtin.missing`` makes them). Raises InputError for a missing file, bad
    YAML, an unknown key or built-in name (naming the nearest) or a bad value.
    """
    values = read_values(path, overrides)
    if "tasks" in values:
        raise InputError(f"{path} is of a whole cycle (it has tasks): `pipeline rekindle {path}`")
    return parse_settings(RunConfig, resolve_values(values), str(path))


def read_values(path: str | Path, overrides: list[str] | None = None) -> dict[str, object]:
    """Read the plain values of a configuration's file, with ``key.path=value`` overrides."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot read the configuration {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"the configuration {path} is not UTF-8 text: {error.reason}") from None
    values = parse_yaml(text, str(path))
    if not isinstance(values, dict):
        raise InputError(f"{path} must be a mapping with the sections corpus, cache, teachers, …")
    for override in overrides or []:
        set_value(values, override)
    return values


def configure_stage(
    config: RunConfig, stage: StageConfig, directories: Mapping[str, str] | None = None
) -> RunConfig:
    """Return the whole configuration of one stage; ``directories`` by stage name for references.

    Raises InputError, naming the stage, for an unknown key or a bad value.
    """
    # Only what was given: a default may be another one beside what the stage sets.
    values = config.model_dump(
        mode="json", by_alias=True, exclude_unset=True, exclude={"stages": True}
    )
    where = f"stage {stage.name!r}"
    try:
        for path, value in with_directories(stage.set, directories or {}).items():
            put_value(values, path, value)
    except InputError as error:
        raise InputError(f"{where}: {str(error).removeprefix('--')}") from None
    return parse_settings(RunConfig, values, where)


def dump_config(config: RunConfig) -> str:
    """Write the resolved configuration as YAML, loadable again."""
    values = config.model_dump(mode="json", by_alias=True)
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
