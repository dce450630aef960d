"""The configuration of a whole cycle: one YAML file, with the sections of a run and the tasks.

Reading it imports no torch and touches no model. ``cycle.run_files`` makes the ``RunConfig`` of
each single run from it.
"""

import itertools
from collections.abc import Collection, Mapping
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from rekindle.data.corpus.config import CorpusConfig
from rekindle.data.errors import InputError
from rekindle.data.former import FormerDefault
from rekindle.data.places import same_place
from rekindle.data.settings import Settings, parse_settings
from rekindle.pipeline.builtin.names import resolve_values
from rekindle.pipeline.config import CacheConfig, read_values
from rekindle.pipeline.cycle.arms import ARMS, DEFAULT_ARMS, MASKED, TWINS, Arm
from rekindle.pipeline.cycle.sections import (
    CycleCacheConfig,
    CycleCorpusConfig,
    CycleTask,
    ExpertsConfig,
    PartialDistillTerm,
    Point,
    PrimaryConfig,
    Search,
    check_names,
    parse_search,
)
from rekindle.train.config import DistillTerm, StudentConfig, TrainConfig
from rekindle.train.finetune.config import FORMER_FIELDS, ComparisonFinetuneConfig, TaskSettings
from rekindle.train.schedules import Seed, is_used

_ARMS_SET = "is what the arms set"
_OTHER_MODEL = (
    "makes a student that is not the model its expert was fine-tuned from, so the comparison "
    "would be between models"
)
# Keys of a run that a cycle cannot have, with the reason.
_NOT_OF_A_CYCLE = {
    "student.from_scratch": _OTHER_MODEL,
    "student.grow": _OTHER_MODEL,
    "student.lora": "trains other weights than the fine-tunings that it is compared with",
    "student.domain_prompts": "puts a token into every text that fine-tuning does not have",
    "train.objective.distill": f"{_ARMS_SET}; give distill, for all experts, or tasks.….distill",
    "train.objective.methods": _ARMS_SET,
    "train.curriculum": "chooses the text by a teacher, also for the arms that see none",
}
_NOT_OF_ITS_FINE_TUNING = {
    "head": "names a student's head to go on from; a cycle's fine-tunings begin with fresh heads",
    "merge": "is for scoring without training",
}


class CycleConfig(Settings):
    """The whole file."""

    about: str = Field("", description="what is compared on which text, for the report")
    corpus: CycleCorpusConfig = Field(description="the unlabelled text")
    cache: CycleCacheConfig = Field(
        default_factory=lambda: CycleCacheConfig(), description="where the cache is"
    )
    student: StudentConfig = Field(
        description="the model that students start as, and that experts are fine-tuned from"
    )
    experts: ExpertsConfig = Field(
        default_factory=ExpertsConfig,
        description="model of the experts if not student.model; which of their seeds teach",
    )
    train: TrainConfig = Field(
        default_factory=TrainConfig,
        description="how all students are trained; objective.hard.weight weighs the masked-LM loss",
    )
    tasks: tuple[CycleTask, ...] = Field(min_length=1, description="the labelled tasks")
    distill: PartialDistillTerm = Field(
        default_factory=dict,
        description="settings of every expert's term (weight, temperature, view, …); "
        "divergence defaults to mse for regressions",
    )
    pseudo: PartialDistillTerm = Field(
        default_factory=dict,
        description="settings of the term of the arm pseudo (confidence, weight, view); "
        "confidence defaults to 0",
    )
    arms: tuple[Arm, ...] = Field(
        DEFAULT_ARMS,
        validate_default=True,
        description=f"what is compared, of {', '.join(ARMS)}; expert is always included, and "
        "start if experts.model is another one",
    )
    finetune: ComparisonFinetuneConfig = Field(
        default_factory=ComparisonFinetuneConfig, description="how every model is fine-tuned"
    )
    search: Search = Field(
        default_factory=dict,
        description="values of finetune to try for every arm and task; the best on dev is used",
    )
    search_seeds: int = Field(1, gt=0, description="fine-tunings for each point of the search")
    seeds: int = Field(5, gt=0, description="fine-tunings of every arm on every task, scored")
    students: int = Field(
        1,
        gt=0,
        description="students of every kind, each trained with its own seed; the fine-tunings are "
        "divided among them",
    )
    seed: Seed = Field(0, description="seed for what is taken out of train")
    label_draws: int = Field(
        1,
        gt=0,
        description="how often train (and dev, if it is taken out of train) is drawn again; each "
        "draw is a whole cycle in OUT/draws",
    )
    test_texts: Annotated[Literal["remove", "keep"], FormerDefault("keep")] = Field(
        "remove",
        description="records of the text that contain a test text of any task, and rows of train "
        "and dev that are a test row of their task: removed or kept, and counted either way",
    )
    primary: PrimaryConfig | None = Field(
        None, description="the comparison named before anything runs"
    )

    @field_validator("arms")
    @classmethod
    def _add_required_arms(cls, value: tuple[Arm, ...], info: ValidationInfo) -> tuple[Arm, ...]:
        experts, student = info.data.get("experts"), info.data.get("student")
        always = {"expert"}
        if experts and student and _is_other_model(experts.model, student.model):
            always.add("start")
        return tuple(arm for arm in ARMS if arm in always or arm in value)

    @field_validator("search")
    @classmethod
    def _parse_search(cls, value: Search) -> Search:
        return parse_search(value)

    @model_validator(mode="after")
    def _check_consistency(self) -> "CycleConfig":
        check_names([task.name for task in self.tasks])
        _refuse_keys(self, _NOT_OF_A_CYCLE)
        if self.student.task != "masked_lm":
            raise ValueError(f"the cycle is for masked_lm students, not {self.student.task}")
        if self.train.keep_best not in ("loss", None):
            raise ValueError(
                f"train.keep_best is {self.train.keep_best!r}, which not all students have; use "
                "loss, or null for none"
            )
        if not is_used(self.train.objective.hard.weight) and {*MASKED} & {*self.arms}:
            raise ValueError(
                "train.objective.hard.weight is 0: the arm 'mlm' would learn nothing, and the arms "
                "'both' and 'mixture' no masked LM. Leave them out of arms; 'kd' needs no masked LM"
            )
        if self.students > self.seeds:
            raise ValueError(
                f"students is {self.students} and seeds {self.seeds}: each student is fine-tuned "
                "with its own seeds, so there must be at least as many seeds"
            )
        for task, arm in itertools.product(self.tasks, self.arms):
            for point in self.search_points():
                config = self.finetune_of(task, point, arm)
                _refuse_keys(config, _NOT_OF_ITS_FINE_TUNING, "finetune.")
                if config.epochs == 0:
                    raise ValueError("finetune.epochs is 0: nothing would be fine-tuned")
        if self.primary is not None:
            self._check_primary(self.primary)
        return self

    @model_validator(mode="after")
    def _check_teaching(self) -> "CycleConfig":
        if self.experts.finetune and not self.has_other_experts:
            raise ValueError(
                "experts.finetune is for experts of another model (experts.model); experts of the "
                "same model are an arm like the others, with the same budget. Use finetune"
            )
        for key in {*self.experts.finetune} & {*TaskSettings.model_fields, *FORMER_FIELDS}:
            raise ValueError(f"experts.finetune.{key} says what the files mean, for all arms alike")
        if any("teachers" in given for given in (self.distill, *(t.distill for t in self.tasks))):
            raise ValueError(f"distill.teachers {_ARMS_SET}; leave it out")
        if self.pseudo and "pseudo" not in self.arms:
            raise ValueError("pseudo is for the arm pseudo, which is not among the arms; add it")
        for key in {*self.pseudo} & {"teachers", "divergence", "combine", "temperature"}:
            raise ValueError(f"pseudo.{key} {_ARMS_SET}; leave it out")
        for task, arm in itertools.product(self.tasks, ("kd", "pseudo")):
            if not is_used(self.term_of(task, False, arm).weight):
                raise ValueError(
                    f"distill.weight of task {task.name!r} is 0, so its expert would teach "
                    "nothing; the arm mlm has no experts"
                )
        return self

    @model_validator(mode="after")
    def _check_texts(self) -> "CycleConfig":
        own = [task.name for task in self.tasks if task.corpus]
        if not own and not self.corpus.source:
            raise ValueError("corpus.source is missing: name the unlabelled text")
        for task in self.tasks if own else ():
            if not task.corpus:
                raise ValueError(
                    f"task {own[0]!r} has a corpus of its own, and task {task.name!r} has none; "
                    "give every task one, or none"
                )
            if "tokenizer" in task.corpus:
                raise ValueError(
                    f"the corpus of task {task.name!r} names a tokenizer, but students always use "
                    "that of student.model; set only corpus.tokenizer"
                )
            self.corpus_of(task.name)
        corpora = map(self.corpus_of, self.text_names)
        if self.test_texts == "remove" and any(corpus.without_fields for corpus in corpora):
            raise ValueError(
                "corpus.without_fields would also apply to the tasks' test files, which have "
                "their own fields: leave it out, or give test_texts: keep"
            )
        return self

    def _check_primary(self, primary: PrimaryConfig) -> None:
        known = {*self.arms} | {arm for arm, twin in self.twins.items() if twin in self.arms}
        for arm in (primary.arm, *primary.against):
            if arm not in known:
                raise ValueError(
                    f"primary names {arm}, which is not among the arms ({', '.join(self.arms)}); "
                    "add it to them"
                )
        named = [self.twins.get(arm, arm) for arm in (primary.arm, *primary.against)]
        for arm in named:
            if named.count(arm) > 1:
                same = [f"{one} is {arm}" for one in self.twins if self.twins[one] == arm]
                raise ValueError(f"primary names {arm} twice{f' ({same[0]} here)' if same else ''}")

    # --- arms -------------------------------------------------------------------------------------

    @property
    def has_other_experts(self) -> bool:
        """Whether experts are fine-tuned from another model than students start from."""
        return _is_other_model(self.experts.model, self.student.model)

    @property
    def all_teach(self) -> bool:
        """Whether all seeds of an expert teach kd, both and mixture, not only the best."""
        return self.experts.teacher == "all" and self.expert_seeds > 1

    @property
    def expert_seeds(self) -> int:
        """Number of fine-tunings of each expert."""
        return self.experts.seeds or self.seeds

    @property
    def needs_every_seed(self) -> bool:
        """Whether the model of every seed of an expert teaches a student."""
        return self.all_teach or "committee" in self.arms

    @property
    def twins(self) -> dict[Arm, Arm]:
        """The arms that coincide with another one, and which."""
        same = {
            "mixture": len(self.tasks) == 1,
            "start": not self.has_other_experts,
            "committee": self.all_teach or self.expert_seeds == 1,
        }
        return {arm: twin for arm, (twin, _) in TWINS.items() if same[arm]}

    def without_twins(self, recorded_arms: Collection[str] = ()) -> "CycleConfig":
        """Leave out each arm that coincides with another one, and use that one instead. Those
        of ``recorded_arms``, with which the cycle was begun, stay.
        """
        twins = {arm: twin for arm, twin in self.twins.items() if arm not in recorded_arms}
        arms = {twins.get(arm, arm) for arm in self.arms}
        changed: dict[str, object] = {"arms": tuple(arm for arm in ARMS if arm in arms)}
        if self.primary is not None:
            against = tuple(twins.get(arm, arm) for arm in self.primary.against)
            named = {"arm": twins.get(self.primary.arm, self.primary.arm), "against": against}
            changed["primary"] = self.primary.model_copy(update=named)
        return self.model_copy(update=changed)

    # --- the text ---------------------------------------------------------------------------------

    @property
    def text_names(self) -> tuple[str, ...]:
        """The names of the texts: of the tasks with their own corpus; ("",) if all share one."""
        return tuple(task.name for task in self.tasks if task.corpus) or ("",)

    def corpus_of(self, text_name: str) -> CorpusConfig:
        """Return the corpus of the text of that name (see ``text_names``)."""
        common = self.corpus.model_dump(mode="json", exclude_unset=True)
        own = next((task.corpus for task in self.tasks if task.name == text_name), {})
        label = f"corpus of task {text_name!r}" if own else "corpus"
        corpus = parse_settings(CorpusConfig, common | own, label)
        if corpus.contents != {"text"}:
            raise InputError(f"{label}: a cycle reads texts; its source has dialogues or tokens")
        return corpus

    def with_cache_in(self, home: Path) -> "CycleConfig":
        """Return the same with its cache in the cycle's folder, if it has no path yet."""
        if self.cache.path:
            return self
        cache = self.cache.model_copy(update={"path": str(home / "cache")})
        return self.model_copy(update={"cache": cache})

    def of_draw(self, draw: int) -> "CycleConfig":
        """Return one draw of the labels as a cycle of its own."""
        path = self.cache.path and f"{self.cache.path}/draw-{draw}"
        cache = self.cache.model_copy(update={"path": path})
        changed = {"seed": self.seed + draw, "label_draws": 1, "cache": cache}
        return self.model_copy(update=changed)

    def cache_of(self, name: str) -> CacheConfig:
        """Return the cache of the text of that name."""
        path = f"{self.cache.path}/{name}" if name else self.cache.path
        return self.cache.model_copy(update={"path": path})

    # --- fine-tuning ------------------------------------------------------------------------------

    @property
    def unused_settings(self) -> list[str]:
        """The settings of tasks and experts that are searched, and so would not be used."""
        sections = {f"tasks.{task.name}.finetune": task.finetune for task in self.tasks}
        sections["experts.finetune"] = self.experts.finetune
        return [
            f"{name}.{key}" for name, keys in sections.items() for key in keys if key in self.search
        ]

    @property
    def search_seed_range(self) -> range:
        """Seeds of the search alone: no scored fine-tuning had a part in the choice of settings."""
        first = max(self.seeds, self.expert_seeds)
        return range(first, first + self.search_seeds)

    def search_points(self) -> list[Point]:
        """Return every combination of the searched values; [{}] without a search."""
        keys = list(self.search)
        return [dict(zip(keys, v, strict=True)) for v in itertools.product(*self.search.values())]

    def finetune_of(self, task: CycleTask, point: Point, arm: str) -> ComparisonFinetuneConfig:
        """Return how ``arm``'s model is fine-tuned on ``task``; ``longer``: twice the epochs."""
        config = self.finetune
        experts = self.experts.finetune if arm == "expert" else {}
        for values, label in (
            (task.finetune | point, f"finetune of task {task.name!r}"),
            (experts | point if experts else {}, "experts.finetune"),
        ):
            parsed = parse_settings(ComparisonFinetuneConfig, values, label)
            changed = {key: getattr(parsed, key) for key in parsed.model_fields_set}
            config = config.model_copy(update=changed)
        if arm != "longer":
            return config
        steps = config.max_steps and 2 * config.max_steps
        return config.model_copy(update={"epochs": 2 * config.epochs, "max_steps": steps})

    # --- teaching ---------------------------------------------------------------------------------

    def teachers_of(self, task: str, arm: str) -> list[str]:
        """Return the cached names of an arm's teachers: the best expert on ``task`` by dev, or
        every seed of it.
        """
        all_seeds = arm == "committee" or (self.all_teach and arm != "pseudo")
        return [seed_name(task, seed) for seed in range(self.expert_seeds)] if all_seeds else [task]

    def term_of(self, task: CycleTask, regression: bool, arm: str) -> DistillTerm:
        """Return the distillation term for the expert on ``task`` in an arm."""
        values = ({"divergence": "mse"} if regression else {}) | self.distill | task.distill
        label = f"distill of task {task.name!r}"
        if arm == "pseudo":
            values = {key: values[key] for key in ("weight", "view") if key in values}
            values |= {"divergence": "pseudo_label", "confidence": 0.0} | self.pseudo
            label = "pseudo"
        teachers = self.teachers_of(task.name, arm)
        # the mean of an expert's seeds; not the arm mixture, of all tasks' experts
        combine = {"combine": "mixture"} if len(teachers) > 1 else {}
        return parse_settings(DistillTerm, values | combine | {"teachers": teachers}, label)


def seed_name(task: str, seed: int) -> str:
    """Return the name of one seed of an expert in the cache."""
    return f"{task}.{seed}"


def _is_other_model(model: str | None, student: str) -> bool:
    return model is not None and not same_place(model, student)


def _refuse_keys(section: Settings, keys: Mapping[str, str], prefix: str = "") -> None:
    """Raise ValueError, with the reason, if one of these ``keys`` is set."""
    for key, reason in keys.items():
        if attrgetter(key)(section):
            raise ValueError(f"{prefix}{key} {reason}; leave it out")


def load_cycle(path: str | Path, overrides: list[str] | None = None) -> CycleConfig:
    """Read and validate a cycle's file, as ``config.load_config`` does for a run's."""
    values = read_values(path, overrides)
    if "tasks" not in values:
        raise InputError(
            f"{path} has no tasks, so it does not describe a whole cycle; `pipeline init "
            "rekindle` writes an example. Use `pipeline train-student` for runs of one student"
        )
    return parse_settings(CycleConfig, resolve_values(values), str(path))
