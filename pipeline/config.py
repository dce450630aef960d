"""The run configuration: one YAML file for both stages. Reading it imports no torch and touches no
model.
"""

import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field, field_validator, model_validator

from rekindle.data.corpus.config import CorpusConfig
from rekindle.data.corpus.packing import MAX_SHARD_SIZE
from rekindle.data.errors import InputError, did_you_mean
from rekindle.data.former import FormerDefault
from rekindle.data.settings import Changeable, Place, Settings, parse_settings
from rekindle.data.targets.schema import TeacherName
from rekindle.data.views.masking import MaskConfig
from rekindle.data.views.pairs import RECORD
from rekindle.pipeline.builtin.names import resolve_values
from rekindle.pipeline.overrides import put_value, set_value
from rekindle.pipeline.plain_values import strings_in, values_in, with_strings
from rekindle.pipeline.teacher_config import TeacherConfig
from rekindle.pipeline.yaml_text import dump_yaml, parse_yaml
from rekindle.train.config import StudentConfig, TrainConfig
from rekindle.train.model.student_config import lora_excludes
from rekindle.train.objective.estimates import check_estimates
from rekindle.train.ranking.config import missing_groups_message
from rekindle.train.schedules import is_used

_REFERENCE = re.compile(r"\{([^{}]*)\}")
_PLACEHOLDERS = ("text", "label")


class CacheConfig(Settings):
    """Where the cache is and how examples are shown."""

    path: Changeable[Place] = Field(
        description="local path, s3://…, gs://…; hf://datasets/OWNER/NAME to read one from a hub"
    )
    sequences_per_shard: Annotated[int | None, FormerDefault(MAX_SHARD_SIZE)] = Field(
        None,
        gt=0,
        description="sequences per shard, the unit of work and of what a kill can lose; null: as "
        "in the cache, and in a new one 64 to 4,096, so that there are at least 16 shards",
    )
    replicas: int = Field(
        4,
        gt=0,
        le=999,
        description="masked replicas for masked-LM teachers; mask.policy hard has one",
    )
    mask: MaskConfig = Field(default_factory=MaskConfig, description="how tokens are masked")
    seed: int = Field(0, description="seed of masks and pairs")

    @model_validator(mode="after")
    def _check_something_unmasked(self) -> "CacheConfig":
        if self.mask.policy == "cover" and self.replicas == 1:
            raise ValueError(
                "replicas 1 with mask.policy cover: each token is masked in one of the replicas, "
                "so all of them would be. Give more (7 mask about 15 % in each)"
            )
        return self

    @property
    def masked_replicas(self) -> int:
        """Number of masked replicas; policy hard has only one."""
        return 1 if self.mask.policy == "hard" else self.replicas


def check_template(template: str) -> str:
    """Return the template. Raise ValueError unless it has {text} and {label} and no other
    placeholder.
    """
    names = _REFERENCE.findall(template)
    missing = [name for name in _PLACEHOLDERS if name not in names]
    unknown = [name for name in names if name not in _PLACEHOLDERS]
    if missing or unknown:
        problem = f"has no {{{missing[0]}}}" if missing else f"has {{{unknown[0]}}}"
        raise ValueError(
            f"the template {template!r} {problem}; it needs {{text}} and {{label}}, and takes "
            "nothing else in braces"
        )
    return template


class PromptsConfig(Settings):
    """Text made of cached predictions before a stage begins (prompted continued pre-training)."""

    teacher: str = Field(description="a cached classifier; its most probable label is written")
    template: Annotated[str, AfterValidator(check_template)] = Field(
        "{text} This is about {label}.",
        description="the line: {text} is the sequence, {label} the word of its label",
    )
    words: dict[str, str] | None = Field(
        None, description="label name -> word, for every label; null: the names themselves"
    )
    to: Place = Field(
        pattern=r"\.jsonl$", description="path of the new corpus: lines with id, text and domain"
    )
    confidence: float = Field(
        0.0, ge=0, le=1, description="keep only sequences whose label has at least this probability"
    )
    cache: Place | None = Field(
        None, description="the cache that holds the teacher; null: the file's own cache.path"
    )

    @property
    def places(self) -> list[str]:
        """The paths it writes and reads, which may be in directories of stages."""
        return [self.to, self.cache or ""]


class StageConfig(Settings):
    """One run: the file with some values changed."""

    name: TeacherName = Field(description="its folder in the output directory")
    set: dict[str, object] = Field(
        default_factory=dict,
        description="key.path: value, overriding the file; '{first}' stands for the directory of "
        "the earlier stage of that name",
    )
    write_prompts: PromptsConfig | None = Field(
        None, description="text to make from cached predictions before the stage begins"
    )

    @field_validator("set")
    @classmethod
    def _check_each_key_once(cls, value: dict[str, object]) -> dict[str, object]:
        for key in value:
            if key.split(".")[0] == "stages":
                raise ValueError(f"{key}: a stage has no stages of its own")
            parent = next((other for other in value if key.startswith(f"{other}.")), None)
            if parent:
                raise ValueError(f"{parent!r} and {key!r} set the same value; give one of them")
        return value


class RunConfig(Settings):
    """The whole file."""

    corpus: CorpusConfig = Field(description="the text")
    cache: CacheConfig = Field(description="where the cache is")
    teachers: tuple[TeacherConfig, ...] = Field((), description="the experts")
    student: StudentConfig | None = Field(None, description="the model to train")
    train: TrainConfig = Field(default_factory=TrainConfig, description="how to train it")
    stages: tuple[StageConfig, ...] = Field(
        (), description="runs one after another, each with some values of this file changed"
    )

    @model_validator(mode="after")
    def _check_names_and_stages(self) -> "RunConfig":
        # Teachers named in train.objective are checked against the cache: Cache.teacher.
        names = [t.name for t in self.teachers]
        repeated = sorted({n for n in names if names.count(n) > 1})
        if repeated:
            raise ValueError(f"two teachers are called {repeated[0]!r}; give each its own name")
        teachers = tuple(map(self._with_record_pairs, self.teachers))
        # frozen: the same teachers with resolved values
        object.__setattr__(self, "teachers", teachers)
        if self.student is not None and (reason := lora_excludes(self.student, self.train)):
            raise ValueError(reason)
        if self.corpus.group_field is None and (key := self.train.key_of_groups):
            raise ValueError(missing_groups_message(key, "the corpus"))
        check_stages(self.stages)
        for stage in self.stages:
            configure_stage(self, stage)
        return self

    def _with_record_pairs(self, teacher: TeacherConfig) -> TeacherConfig:
        """Return the teacher as it reads a corpus of pairs. Raise ValueError for one that
        cannot.
        """
        subject, field = f"teacher {teacher.name!r}", self.corpus.pair_field
        if "tokens" in self.corpus.contents and not teacher.vocabulary:
            raise ValueError(
                f"{subject} ({teacher.task}) reads texts, and rows of the format tokens have none; "
                "cache it over a corpus of texts or dialogues"
            )
        if field is None:
            if teacher.pairs == RECORD:
                raise ValueError(
                    f"{subject}: pairs: record uses the two texts of a record, but "
                    "corpus.pair_field, which names the second, is missing"
                )
            return teacher
        if teacher.pairs not in (None, RECORD):
            raise ValueError(
                f"{subject}: pairs is {teacher.pairs}, but with corpus.pair_field the records are "
                "the pairs; leave pairs out"
            )
        single_text_tasks = {"token_classification": "tags the words", "embedding": "makes vectors"}
        if (action := single_text_tasks.get(teacher.task)) is not None:
            raise ValueError(
                f"{subject} {action} of single texts, but with corpus.pair_field each record has "
                "two; cache it over a corpus of single texts"
            )
        if teacher.vocabulary or teacher.pairs == RECORD:
            return teacher
        return teacher.model_copy(update={"pairs": RECORD})

    def check_single(self) -> None:
        """Raise InputError for a file of several stages: the caller handles only one."""
        if self.stages:
            raise InputError(
                f"the configuration has stages ({', '.join(s.name for s in self.stages)}); this "
                "takes one configuration. Give it the run.yaml of a stage, which `pipeline "
                "train-student` leaves in the stage's folder, or a file without `stages`"
            )

    def teachers_named(self, names: Sequence[str]) -> list[TeacherConfig]:
        """Return the teachers of these names (no names: all). Raise InputError for an
        unknown name.
        """
        by_name = {t.name: t for t in self.teachers}
        if unknown := [name for name in names if name not in by_name]:
            raise InputError(
                f"no teacher {unknown[0]!r} in the configuration (it has: "
                f"{', '.join(by_name) or 'none'}){did_you_mean(unknown[0], by_name)}"
            )
        return [by_name[name] for name in dict.fromkeys(names)] if names else list(by_name.values())

    def check_samples(self) -> None:
        """Raise InputError if a term needs something of a teacher here that a sample
        cannot give.
        """
        kinds = {t.name: t.described_kind for t in self.teachers}
        check_estimates(self.train.objective.distill, {n: k for n, k in kinds.items() if k})

    def needed_student(self) -> StudentConfig:
        """Return the student; raise InputError if there is none."""
        if self.student is None:
            raise InputError("the configuration has no `student` section; add student.model")
        return self.student

    @property
    def evaluates_domains(self) -> bool:
        """Whether the run, or one of its stages, evaluates the domains one by one."""
        key = "train.evaluate_domains"
        return self.train.evaluate_domains or any(stage.set.get(key) for stage in self.stages)

    @property
    def uses_masks(self) -> bool:
        """Whether masks are made, for a teacher or for the student, if the tokenizer can."""
        student = self.student is not None and self.student.language_task == "masked_lm"
        return student or self.needs_masks is not None

    @property
    def needs_masks(self) -> str | None:
        """What cannot do without masked text. None if the tokenizer needs no mask token, for
        instance for a student that learns from classifiers alone.
        """
        if self.cache.mask.policy == "hard":
            return "cache.mask.policy: hard"
        if masked_teachers := [t.name for t in self.teachers if t.sees_masks]:
            return f"the masked_lm teacher {masked_teachers[0]!r}"
        if self.student is None or self.student.language_task != "masked_lm":
            return None
        objective = self.train.objective
        if is_used(objective.hard.weight):
            return "a masked_lm student (train.objective.hard.weight is above 0)"
        if methods := objective.methods_for(self.student.task):
            return f"the method {methods[0].method!r}"
        vocabulary = {t.name for t in self.teachers if t.vocabulary}
        for number, term in enumerate(objective.distill):
            if vocabulary & {*term.teachers} or "masked" in (term.view, term.positions):
                return f"train.objective.distill.{number} of a masked_lm student"
        return None


def load_config(path: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """Read and validate a run file, with ``key.path=value`` overrides (values are YAML).

    Names that begin with ``python-docs/`` become the paths of built-in models, whether they are
    made yet or not (``builtin.missing`` makes them). Raise InputError for a missing file, bad YAML,
    an unknown key or built-in name (naming the nearest) or a bad value.
    """
    values = read_values(path, overrides)
    if "tasks" in values:
        raise InputError(
            f"{path} describes a whole cycle (it has tasks): use `pipeline rekindle {path}`"
        )
    return parse_settings(RunConfig, resolve_values(values), str(path))


def read_values(path: str | Path, overrides: list[str] | None = None) -> dict[str, object]:
    """Read the plain values of a configuration file, with ``key.path=value`` overrides."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(
            f"cannot read the configuration {path}: {error.strerror}; give a YAML file, for "
            "instance one written by `pipeline init RECIPE` (`pipeline init --list` names the "
            "recipes)"
        ) from None
    except UnicodeDecodeError as error:
        raise InputError(
            f"the configuration {path} is not UTF-8 text ({error.reason} at byte "
            f"{error.start + 1}); save it as UTF-8"
        ) from None
    values = parse_yaml(text, str(path))
    if not isinstance(values, dict):
        raise InputError(
            f"{path} must be a mapping with the sections corpus, cache, teachers, …; `pipeline "
            "init RECIPE` writes one to start from"
        )
    for override in overrides or []:
        set_value(values, override)
    return values


def configure_stage(
    config: RunConfig, stage: StageConfig, directories: Mapping[str, str] | None = None
) -> RunConfig:
    """Return the whole configuration of one stage. ``directories``: by stage name, for references.

    Raise InputError, naming the stage, for an unknown key or a bad value.
    """
    # Only the given values: a default may differ beside what the stage sets.
    values = config.model_dump(
        mode="json", by_alias=True, exclude_unset=True, exclude={"stages": True}
    )
    label = f"stage {stage.name!r}"
    try:
        for path, value in with_directories(stage.set, directories or {}).items():
            put_value(values, path, value)
    except InputError as error:
        raise InputError(f"{label}: {str(error).removeprefix('--')}") from None
    return parse_settings(RunConfig, values, label)


def dump_config(config: Settings) -> str:
    """Return the resolved configuration of a run or a cycle as YAML that can be loaded again."""
    values = config.model_dump(mode="json", by_alias=True)
    return dump_yaml(values)


# --- stages: allowed names, and what "{first}" in them stands for -------------------------------


def check_stages(stages: Sequence[StageConfig]) -> None:
    """Raise InputError for two stages of one name, and for a reference to no earlier stage."""
    earlier: list[str] = []
    for stage in stages:
        name = stage.name.casefold()  # some file systems do not distinguish upper and lower case
        if name == "stages.json":
            raise InputError(f"a stage cannot be called {stage.name!r}: a file has that name")
        if name in (other.casefold() for other in earlier):
            raise InputError(f"two stages are called {stage.name!r}; give each its own name")
        values = [stage.set, *(stage.write_prompts.places if stage.write_prompts else ())]
        for other in references(values):
            if other not in earlier:
                hint = did_you_mean(f"{{{other}}}", [f"{{{stage_name}}}" for stage_name in earlier])
                raise InputError(
                    f"stage {stage.name!r}: '{{{other}}}' is no earlier stage (there are: "
                    f"{', '.join(earlier) or 'none'}){hint}"
                )
        for other in earlier:
            if {other: None} in values_in(values):
                raise InputError(
                    f"stage {stage.name!r}: {{{other}}} without quotes is a mapping in YAML; write "
                    f'"{{{other}}}" for the directory of that stage'
                )
        earlier.append(stage.name)


def references(value: object) -> list[str]:
    """Return the names in braces in ``value``'s strings, each once, in order."""
    return list(dict.fromkeys(n for text in strings_in(value) for n in _REFERENCE.findall(text)))


def with_directories(value: Any, directories: Mapping[str, str]) -> Any:
    """Return ``value`` with references in its strings replaced by directories; unknown
    ones stay.
    """
    return with_strings(value, partial(_REFERENCE.sub, lambda m: directories.get(m[1], m[0])))


def fill_template(template: str, text: str, label: str) -> str:
    """Fill in the template's placeholders; braces in ``text`` stay unchanged."""
    return _REFERENCE.sub(lambda match: {"text": text, "label": label}[match[1]], template)
