"""The configuration of a teacher. No model is loaded here, and torch is not imported."""

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, PositiveInt, model_validator

from rekindle.data.settings import GGUF_FILE, Changeable, Place, Settings, with_gguf_file
from rekindle.data.targets.kinds.base import VocabularyKind
from rekindle.data.targets.kinds.registry import VOCABULARY_KINDS, vocabulary_kind
from rekindle.data.targets.schema import (
    VOCABULARY_TASKS,
    Codec,
    Task,
    TeacherInfo,
    TeacherName,
    Vectors,
    VocabularyKindName,
)
from rekindle.pipeline.served.config import ServedConfig


class TargetsConfig(Settings):
    """What to keep of a teacher's output."""

    kind: VocabularyKindName | None = Field(
        None,
        description="threshold or random (samples of k, unbiased), topk, dense (for task heads; or "
        "the whole vocabulary), hidden (final hidden states). Default: dense for task heads; for "
        "vocabulary teachers threshold, which taught best at equal bytes (docs/sparse_targets.md), "
        "or topk if temperatures other than 1 are listed, which one sample cannot serve",
    )
    k: int = Field(
        64, gt=0, description="candidates kept per position (topk, threshold), draws (random)"
    )
    temperatures: tuple[Annotated[float, Field(gt=0, lt=1000)], ...] = Field(
        (1.0, 2.0, 4.0),
        description="temperatures a student may train at. topk: 1 is always stored, and 2 and 4 if "
        "none are listed. Samples are drawn at a single one, 1 if none is listed",
    )
    codec: Codec = Field(
        "default",
        description="for topk and threshold: default (8-bit values, memory-mapped), precise "
        "(16-bit values), compact (compressed, for cold storage and transfer)",
    )

    vectors: Vectors | None = Field(
        None,
        description="for embedding teachers: fp16 (the default), or int8 with a scale per vector, "
        "at half the bytes (docs/caching.md has the error of each)",
    )

    @model_validator(mode="after")
    def _check_temperatures(self) -> "TargetsConfig":
        listed = self.temperatures if "temperatures" in self.model_fields_set else None
        kind = None if self.kind is None else VOCABULARY_KINDS[self.kind]
        if kind and kind.is_sample and listed is not None and len(listed) != 1:
            raise ValueError(
                f"{self.kind} targets are a sample of the distribution at one temperature; list one"
            )
        if kind and kind.largest_k is not None and self.k > kind.largest_k:
            raise ValueError(
                f"{self.kind} targets have at most {kind.largest_k} draws, not {self.k}"
            )
        if kind.is_sample if kind else listed in (None, (), (1.0,)):
            temperatures = listed or (1.0,)
        else:
            temperatures = tuple(sorted({1.0, *self.temperatures}))
        if kind and self.codec not in kind.codecs:
            raise ValueError(f"codec {self.codec} is for topk and threshold, not {self.kind}")
        # Frozen: set the same section with its temperatures in order.
        object.__setattr__(self, "temperatures", temperatures)
        return self

    @property
    def vocabulary_kind(self) -> VocabularyKindName:
        """What is kept of distributions over the vocabulary."""
        if self.kind is not None:
            return self.kind
        return "threshold" if self.temperatures == (1.0,) else "topk"


class MonteCarloConfig(Settings):
    """Dropout passes for the uncertainty of a sequence expert (MUKI)."""

    passes: int = Field(0, ge=0, description="forward passes with dropout; 0 for none")


class ResourcesConfig(Settings):
    """What a process that runs a teacher needs of a machine of a Ray cluster."""

    num_cpus: float = Field(1.0, gt=0, description="cores, and threads of a forward pass")
    num_gpus: float | None = Field(
        None,
        ge=0,
        description="GPUs, also a fraction of one; null: one if the cluster has any, else none",
    )
    memory_gb: float | None = Field(None, gt=0, description="main memory")
    custom: dict[str, float] = Field(
        default_factory=dict, description="other resources, by the cluster's names for them"
    )
    load_minutes: float | None = Field(
        None,
        gt=0,
        description="a process that takes longer to load the model is ended, and another tried; "
        "null: no limit",
    )
    unit_minutes: float | None = Field(
        None,
        gt=0,
        description="a process that takes longer for a unit is ended, and the unit tried "
        "elsewhere; null: no limit",
    )

    def time_limits(self) -> dict[str, float]:
        """Return the limits in seconds, as ``Work`` has them."""
        minutes = {"load": self.load_minutes, "unit": self.unit_minutes}
        return {key: 60 * value for key, value in minutes.items() if value is not None}

    def ray_resources(self) -> dict[str, float]:
        """Return the resources under Ray's names."""
        resources = {"num_cpus": self.num_cpus, **self.custom}
        if self.num_gpus is not None:
            resources["num_gpus"] = self.num_gpus
        if self.memory_gb is not None:
            resources["memory"] = self.memory_gb * 1e9
        return resources


def _require_files_or_server(schema: dict[str, Any]) -> None:
    """Let a server's entry leave out the model and the task."""
    schema["anyOf"] = [{"required": schema.pop("required")}, {"required": ["name", "served"]}]


class TeacherConfig(Settings):
    """One expert."""

    model_config = ConfigDict(json_schema_extra=_require_files_or_server)

    name: TeacherName = Field(description="its name in the cache")
    model: Place = Field(
        description="a model directory or a hub id; none if a server runs the model"
    )
    gguf_file: str | None = Field(None, exclude=True, description=GGUF_FILE)
    task: Task = Field(description="what the model does; causal_lm if a server runs it")
    served: ServedConfig | None = Field(
        None, description="a server that runs the model, in place of its files (docs/served.md)"
    )
    targets: TargetsConfig = Field(default_factory=TargetsConfig, description="what is kept")
    domains: tuple[str, ...] | None = Field(
        None, min_length=1, description="only sequences of these domains; null for all"
    )
    monte_carlo: MonteCarloConfig = Field(
        default_factory=MonteCarloConfig, description="dropout passes"
    )
    pairs: Literal["adjacent", "same-document", "random", "record"] | None = Field(
        None,
        description="how text pairs are made, for an expert on pairs; null for single texts. With "
        "corpus.pair_field it is record (the two texts of a record), and may be left out",
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="auto: bf16 on a GPU that has it, fp32 on a CPU"
    )
    batch_tokens: Changeable[Literal["auto"] | PositiveInt] = Field(
        "auto", description="tokens per forward pass, padding included; halved on out-of-memory"
    )
    device_map: Changeable[Literal["auto"] | None] = Field(
        None, description="auto: spread over this machine's devices, if one has no room for it"
    )
    tp_plan: Changeable[Literal["auto"] | None] = Field(
        None,
        description="auto: split among the processes that torchrun starts (tensor parallel)",
    )
    resources: Changeable[ResourcesConfig] = Field(
        default_factory=ResourcesConfig,
        description="what it needs of a cluster (cache-teachers --executor ray)",
    )
    view: Literal["masked", "clean"] | None = Field(
        None,
        description="for a masked_lm teacher. masked (the default): it sees the masked replicas "
        "and has targets at the masked tokens; clean: it sees the text as it is, once, and has a "
        "target for every token (self-evolution)",
    )

    pooling: str | None = Field(
        None,
        description="for an embedding teacher that is a plain encoder: how its token states "
        "become one vector: mean, cls, lasttoken, max, mean_sqrt_len_tokens or weightedmean. A "
        "folder of sentence-transformers states it itself",
    )
    normalise: bool | None = Field(
        None,
        description="for the same: whether its vectors are scaled to length 1; must be stated",
    )
    prompt: str | None = Field(
        None,
        description="for an embedding teacher: text put before each text that it reads; null: "
        "the default prompt of its folder, if it has one",
    )

    _with_file = model_validator(mode="before")(with_gguf_file)

    mapping: Literal["same", "map"] = Field(
        "same",
        alias="vocabulary",
        description="same: its tokenizer has the same token under every id that occurs in the "
        "corpus. map: for a causal_lm teacher with a tokenizer of its own: it reads the text, and "
        "teaches where tokens of both begin at the same byte; ids are mapped by their bytes",
    )
    map_coverage: float = Field(
        0.5,
        ge=0,
        le=1,
        description="vocabulary: map is refused if it keeps a smaller share of the positions, "
        "or of the probability there",
    )

    @model_validator(mode="after")
    def _check_mapping(self) -> "TeacherConfig":
        if self.mapping == "map" and self.task != "causal_lm":
            raise ValueError("vocabulary: map is for causal_lm teachers")
        if self.mapping == "map" and self.targets.vocabulary_kind not in ("topk", "dense"):
            raise ValueError(
                "vocabulary: map is for the kinds topk and dense, not "
                f"{self.targets.vocabulary_kind}: add targets: {{kind: topk}}"
            )
        if self.mapping == "map" and self.served is not None:
            raise ValueError("vocabulary: map needs the teacher's files; a server gives none")
        return self

    @model_validator(mode="before")
    @classmethod
    def _with_name_of_server(cls, values: object) -> object:
        """Give a server's model its one name, and the task of a language model."""
        served = values.get("served") if isinstance(values, dict) else None
        if not isinstance(values, dict) or not served:
            return values
        name = served.get("model") if isinstance(served, dict) else getattr(served, "model", None)
        return {"model": name, "task": "causal_lm"} | values if name else values

    @model_validator(mode="after")
    def _check_served(self) -> "TeacherConfig":
        if self.served is None:
            return self
        if self.model != self.served.model:
            raise ValueError(
                f"model is {self.model!r}, but served.model {self.served.model!r}; a served "
                "teacher has no files here: leave model out"
            )
        if self.task != "causal_lm":
            raise ValueError(
                f"a server gives the answers of causal_lm teachers, not of {self.task}"
            )
        kind, temperatures = self.targets.kind, self.targets.temperatures
        if kind not in (None, "topk"):
            raise ValueError(
                "a server gives only the likeliest ids of a position: targets.kind topk, not "
                f"{kind}"
            )
        if "temperatures" in self.targets.model_fields_set and temperatures != (1.0,):
            raise ValueError(
                "a server gives probabilities only at temperature 1, and the mass outside its "
                f"top {self.targets.k} is unknown at any other (targets.temperatures: "
                f"{list(temperatures)}); leave targets.temperatures out"
            )
        server_settings = ("precision", "batch_tokens", "device_map", "tp_plan", "pairs")
        for name in server_settings:
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} is up to the server; leave it out of a served teacher")
        # Frozen: set the same section as it is meant.
        targets = {"kind": "topk", "temperatures": (1.0,)}
        object.__setattr__(self, "targets", self.targets.model_copy(update=targets))
        if self.resources.num_gpus is None:  # of a cluster: the model is elsewhere
            resources = self.resources.model_copy(update={"num_gpus": 0.0})
            object.__setattr__(self, "resources", resources)
        return self

    @model_validator(mode="after")
    def _check_vectors(self) -> "TeacherConfig":
        vector_settings = ("pooling", "normalise", "prompt")
        if self.task != "embedding":
            misplaced = [name for name in vector_settings if getattr(self, name) is not None]
            misplaced += ["targets.vectors"] if self.targets.vectors is not None else []
            if misplaced:
                raise ValueError(f"{misplaced[0]} is for embedding teachers, not for {self.task}")
            return self
        if self.targets.kind is not None:
            raise ValueError(
                f"{self.targets.kind} targets are for other tasks; vectors are kept whole, as "
                "targets.vectors says (fp16 or int8)"
            )
        if self.pairs is not None:
            raise ValueError(
                "pairs is for experts that judge two texts; an embedding teacher makes a vector of "
                "each sequence: leave it out"
            )
        # Frozen: set the same section as it is meant.
        targets = self.targets.model_copy(update={"vectors": self.targets.vectors or "fp16"})
        object.__setattr__(self, "targets", targets)
        return self

    @model_validator(mode="after")
    def _check_task(self) -> "TeacherConfig":
        if self.view is not None and self.task != "masked_lm":
            raise ValueError(
                f"view is for masked_lm teachers; a {self.task} teacher sees the text as it is"
            )
        if self.task not in VOCABULARY_TASKS and self.targets.kind not in (None, "dense"):
            raise ValueError(
                f"{self.targets.kind} targets are for masked_lm and causal_lm; task heads are kept "
                "whole"
            )
        if self.device_map is not None and self.tp_plan is not None:
            raise ValueError("device_map and tp_plan are two ways to spread a model; give one")
        if self.monte_carlo.passes and self.task != "sequence_classification":
            raise ValueError(
                "monte_carlo passes give class probabilities: they are for sequence_classification"
            )
        return self

    @property
    def vocabulary(self) -> bool:
        """Whether it predicts tokens."""
        return self.task in VOCABULARY_TASKS

    @property
    def described_kind(self) -> VocabularyKind | None:
        """The kind of its targets as far as known before caching; None for task experts."""
        if not self.vocabulary:
            return None
        targets, kind = self.targets, self.targets.vocabulary_kind
        settings = {"k": targets.k, "temperatures": targets.temperatures}
        return vocabulary_kind(
            TeacherInfo(name=self.name, task=self.task, kind=kind, view="clean", **settings)
        )

    @property
    def sees_masks(self) -> bool:
        """Whether it is shown masked replicas."""
        return self.task == "masked_lm" and self.view != "clean"

    @property
    def pair_expert(self) -> bool:
        """Whether it is shown text pairs."""
        return self.pairs is not None and self.task in ("sequence_classification", "regression")
