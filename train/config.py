"""Settings of a student and its training. Does not import torch."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import BeforeValidator, ConfigDict, Field, field_validator, model_validator

from rekindle.data.former import FormerDefault
from rekindle.data.settings import Changeable, MayChange, Names, Settings, as_list, parse_settings
from rekindle.data.settings_schema import one_or_many
from rekindle.kernels.divergences import skew_of
from rekindle.train.method_names import unknown_method
from rekindle.train.model.student_config import GrowConfig as GrowConfig
from rekindle.train.model.student_config import StudentConfig as StudentConfig
from rekindle.train.objective.embedding.config import VectorConfig
from rekindle.train.ranking.config import RankingConfig
from rekindle.train.schedules import Amount, Count, Interval, Positive, Schedule, Seed, Share
from rekindle.train.step_config import StepConfig

WeightField = Amount | Schedule
# A student's task that implies a method: the objective has it without naming it.
METHOD_OF_TASK = {"replaced_token_detection": "replaced_tokens"}
STEPS_ONCE = 200  # the former default of checkpoint_every, in steps
Batching = Literal["shuffled", "similar_lengths"]  # into batches of one size
# ways to combine several teachers into one target
MIXED = ("mixture", "uncertainty", "concatenate")


TrackerNames = Annotated[
    tuple[Literal["tensorboard", "wandb", "mlflow"], ...], BeforeValidator(as_list)
]
SomeNames = Annotated[Names, Field(min_length=1)]


class HardConfig(Settings):
    """The cross-entropy on the text itself."""

    weight: WeightField = Field(1.0, description="a number or a schedule; 0: none")


class UncertaintyConfig(Settings):
    """MUKI: how experts with different label sets are weighted against each other."""

    selection: Literal["soft", "hard"] = Field(
        "soft", description="soft: softmax(certainty / sharpness); hard: the most certain expert"
    )
    sharpness: Positive = Field(0.2, description="temperature of the soft selection")
    margin: bool = Field(
        True, description="also weight examples by the margin between the two best classes"
    )


class DistillTerm(Settings):
    """One distillation term of the loss."""

    teachers: tuple[str, ...] = Field(min_length=1, description="names of cached teachers")
    weight: WeightField = Field(1.0, description="a number or a schedule")
    temperature: Positive = Field(1.0, description="τ of teacher and student; the loss carries τ²")
    temperature_between: Literal["refuse", "interpolate"] = Field(
        "refuse",
        description="topk targets at a temperature between three or more stored ones. refuse: an "
        "error; interpolate: the mass outside the kept ids is interpolated "
        "quadratically in 1/τ, and the error is logged at the start",
    )
    divergence: Literal[
        "forward_kl", "reverse_kl", "jsd", "tvd", "skew_kl", "mse", "pseudo_label"
    ] = Field(
        "forward_kl",
        description="targets that are samples (targets.kind threshold, the default, and random) "
        "can only teach forward_kl, see docs/targets.md; mse is for task logits; "
        "pseudo_label, for classifiers, is the cross-entropy on the class the expert "
        "finds most likely, where it is confident enough (see confidence)",
    )
    skew: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="for skew_kl: α in KL(q ‖ αq + (1−α)p), with q the teacher's and p the "
        "student's distribution; no token then costs more than −log α. null: 0.1",
    )
    tail: Literal["bucket", "renormalise", "none"] = Field(
        "bucket",
        description=(
            "how the mass outside the kept ids is treated: bucket, as one more "
            "outcome; renormalise, spread over the kept ids; none, left out"
        ),
    )
    k: Count | None = Field(None, description="train at a smaller k than cached")
    combine: Literal["separate", "mixture", "uncertainty", "route", "concatenate"] = Field(
        "separate",
        description="separate: one loss per teacher; mixture: the target is their average; "
        "uncertainty: classifiers weighted by their certainty (MUKI); route: each "
        "sequence is taught by the first teacher that has targets for it; "
        "concatenate: softmax over the concatenated logits of all classifiers",
    )
    uncertainty: UncertaintyConfig = Field(
        default_factory=UncertaintyConfig, description="settings of combine: uncertainty"
    )
    labels: Literal["merge", "apart"] = Field(
        "merge",
        description="label names that several classifiers of a mixture share: merge, as one "
        "label; apart, as one label each",
    )
    positions: Literal["all", "masked"] = Field(
        "all",
        description=(
            "all: every cached position; masked: only positions that the masked view selected"
        ),
    )
    entropy_fraction: Share | None = Field(
        None,
        description="use only this fraction of each sequence's positions: those where the "
        "student is least certain",
    )
    view: Literal["clean", "masked"] = Field(
        "clean", description="what the student sees when it imitates task logits"
    )
    ranking: RankingConfig | None = Field(
        None, description="for regression experts: also imitate the order of their scores"
    )
    confidence: float | None = Field(
        None,
        ge=0,
        le=1,
        description="for pseudo_label: the least probability of the expert's class (of each "
        "label's answer, if several labels may hold); answers below it add no loss. "
        "null: 0.9",
    )

    embedding: VectorConfig | None = Field(
        None,
        description="of sentence encoders (task: embedding): how their vectors are learnt, a sum "
        "of losses. null: 1 − cos",
    )

    @model_validator(mode="after")
    def _skew_is_of_its_divergence(self) -> "DistillTerm":
        skew_of(self.divergence, self.skew)
        return self

    @property
    def of_vectors(self) -> VectorConfig:
        """How vectors are learnt: as it is given, or by default."""
        return self.embedding or VectorConfig()

    @property
    def interpolates(self) -> bool:
        """Return whether temperatures between stored ones are interpolated."""
        return self.temperature_between == "interpolate"


class MethodSettings(Settings):
    """Settings that every method has; a method's own settings are fields of a subclass, in its
    file.
    """

    method: str = Field(description="its name")
    weight: WeightField = Field(1.0, description="a number or a schedule")


class MethodTerm(Settings):
    """A term that is not built in: ``train/methods/NAME.py``, or an installed entry point.

    All its other keys are that file's settings, which are checked when the method is loaded.
    """

    model_config = ConfigDict(extra="allow")

    method: str = Field(description="its name; the other keys are weight and its own settings")

    @field_validator("method")
    @classmethod
    def _is_known(cls, value: str) -> str:
        if (problem := unknown_method(value)) is not None:
            raise ValueError(problem)
        return value


class ObjectiveConfig(Settings):
    """The loss: hard · CE + Σ weight · τ² · divergence + Σ weight · method."""

    hard: HardConfig = Field(default_factory=HardConfig, description="cross-entropy on the text")
    distill: tuple[DistillTerm, ...] = Field((), description="distillation terms")
    methods: tuple[MethodTerm, ...] = Field((), description="terms in files of their own")

    def schedules(self) -> Iterator[tuple[str, Schedule]]:
        """Yield each weight that changes over the steps, with the name of its term."""
        weights: list[tuple[str, object]] = [("hard", self.hard.weight)]
        weights += [(f"distill.{n}", term.weight) for n, term in enumerate(self.distill)]
        for number, term in enumerate(self.methods):
            weight_setting = (term.model_extra or {}).get("weight")
            weights.append((f"methods.{number}", weight_setting))
        for term_name, weight in weights:
            if isinstance(weight, dict):
                weight = parse_settings(Schedule, weight, f"train.objective.{term_name}.weight")
            if isinstance(weight, Schedule):
                yield term_name, weight

    def methods_for(self, task: str) -> tuple[MethodTerm, ...]:
        """Return the methods, including the one implied by the student's task."""
        implied = METHOD_OF_TASK.get(task)
        if implied is None or implied in {term.method for term in self.methods}:
            return self.methods
        return (*self.methods, MethodTerm(method=implied))


class ReplayConfig(Settings):
    """Replay of earlier domains beside the new ones (ELLE)."""

    domains: Names = Field(min_length=1, description="the earlier domains")
    fraction: float = Field(0.1, gt=0, lt=1, description="share of all batches' sequences")
    choose: Literal["uniform", "loss_change"] = Field(
        "loss_change",
        description="how replay is divided among the domains: equally, or by how much a domain's "
        "held-out loss has fallen recently per replayed token; a domain whose loss "
        "does not fall gets the largest share in the first half of the steps and "
        "none in the second",
    )

    @property
    def follows_loss(self) -> bool:
        """Return whether replay depends on evaluations."""
        return self.choose == "loss_change"


class CurriculumConfig(Settings):
    """The sequences trained on first, chosen by a cached teacher's stored scalars (SALT)."""

    teacher: str = Field(description="a cached vocabulary teacher with complete targets")
    score: Literal["median_loss", "mean_loss", "mean_entropy", "hard_share"] = Field(
        "median_loss",
        description=("median_loss: SALT's score, over tokens among the teacher's ten likeliest"),
    )
    keep: Share = Field(0.5, description="share of the training sequences")
    until: Share = Field(
        0.17, description="fraction of the steps after which all sequences are used"
    )
    highest: bool = Field(
        True, description="true: keep those with the highest score; false: with the lowest"
    )


class TrainConfig(StepConfig):
    """How the student is trained."""

    micro_batch_sequences: Changeable[Count | None] = Field(
        None, description="sequences per forward pass, the longest first; null: the whole batch"
    )
    batching: Batching | Literal["groups"] = Field(
        "shuffled",
        description="similar_lengths: texts of similar length share a batch, which is then "
        "hardly padded: the sequences of up to 64 steps are sorted into batches by "
        "length, and the order of the batches is drawn at random. `pipeline plan` "
        "reports the saving. A step's loss is a mean over its own rows, so a row in "
        "a batch of short texts counts for more. groups: a step reads whole groups "
        "(corpus.group_field), batch_sequences sequences on average",
    )
    max_grad_norm: Positive | None = Field(1.0, description="gradient clipping; null: none")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="auto: bf16 autocast on a GPU that has it, fp32 on a CPU"
    )
    parallel: Changeable[Literal["ddp", "fsdp"]] = Field(
        "ddp",
        description=(
            "under torchrun: a whole student per process (ddp), or one in shards (fsdp, FSDP2)"
        ),
    )
    compile: Changeable[bool] = Field(False, description="torch.compile each block of the student")
    gradient_checkpointing: Changeable[bool] = Field(
        False, description="recompute activations in the backward pass: less memory, slower"
    )
    prefetch_threads: Changeable[int] = Field(1, gt=0, le=64, description="threads that read ahead")
    seed: Seed = Field(0, description="seed of weights, data order and dropout")
    checkpoint_every: Annotated[Changeable[Interval], FormerDefault(STEPS_ONCE)] = Field(
        "5 min",
        description=(
            "a time (90 s, 5 min, 1.5 h) or a number of steps; the last step "
            "always has a checkpoint"
        ),
    )
    log_gradients_every: Changeable[Count | None] = Field(
        100,
        description="log the norm of each term's weighted gradient at the heads' input, and its "
        "ratio to the cross-entropy's, at the first step and then every so many "
        "steps; null: never",
    )
    report_to: Changeable[TrackerNames] = Field(
        ("tensorboard",),
        json_schema_extra=one_or_many,
        description=(
            "trackers that also receive the numbers of metrics.jsonl (docs/trackers.md); []: none"
        ),
    )
    keep_checkpoints: Changeable[Count] = Field(
        2, description="how many of the latest checkpoints are kept"
    )
    keep_best: Changeable[str | None] = Field(
        "loss",
        description="also keep the checkpoint with the best value of this name on held-out "
        "sequences (loss: the objective, with the last step's weights of the terms; "
        "ce: the cross-entropy on the text; kl/…, mse/…: lowest; agreement/…: "
        "highest; a teacher's only while its weight is above 0); null: none",
    )
    explosion_factor: Changeable[float | None] = Field(
        10.0,
        gt=1,
        description="stop when a loss exceeds the median of the last 100 steps by this factor "
        "and by 1 (in the first 20 steps, the first loss counts instead of the "
        "median); null: never",
    )
    evaluate_every: Annotated[Count, MayChange(unless="reads_evaluations")] = Field(
        200, description="steps between evaluations; there is always one at the end"
    )
    held_out: float = Field(
        0.02,
        ge=0,
        lt=1,
        description=(
            "fraction of the sequences that is held out for evaluation, in whole documents"
        ),
    )
    evaluate_sequences: Count = Field(
        256, description="evaluate at most this many of the held-out sequences"
    )
    allow_missing: Names = Field(
        (),
        description=(
            "teachers whose targets may be incomplete; sequences without them train without KD"
        ),
    )
    objective: ObjectiveConfig = Field(default_factory=ObjectiveConfig, description="the loss")
    domains: SomeNames | None = Field(
        None,
        description="train and evaluate only on sequences of these domains; null: all",
    )
    replay: ReplayConfig | None = Field(None, description="replay of earlier domains")
    evaluate_domains: bool = Field(
        False,
        description="also report the held-out ce/DOMAIN of every domain of the corpus "
        "(loss/DOMAIN if nothing trains the language model's head)",
    )
    curriculum: CurriculumConfig | None = Field(
        None, description="begin with a part of the sequences"
    )

    @model_validator(mode="after")
    def _groups_stay_whole(self) -> "TrainConfig":
        for name in ("replay", "curriculum") if self.batching == "groups" else ():
            if getattr(self, name) is not None:
                raise ValueError(
                    f"batching: groups reads whole groups, and {name} chooses single sequences; "
                    "leave one of the two out"
                )
        return self

    def length_problem(self) -> str | None:
        """Return what cannot be done in this many steps; None if all can."""
        sequences = self.steps * self.batch_sequences
        if self.replay is not None and self.replay.fraction * sequences < 1:
            return (
                f"replay.fraction {self.replay.fraction:g} of {self.steps} steps of "
                f"{self.batch_sequences} sequences is less than one sequence. Give at least "
                f"{1 / sequences:.2g}, or leave replay out"
            )
        return super().length_problem()

    @property
    def key_of_groups(self) -> str | None:
        """The key by which the run is of the corpus's groups; None where none is."""
        for number, term in enumerate(self.objective.distill):
            if term.ranking is not None and term.ranking.group == "group":
                return f"train.objective.distill.{number}.ranking.group"
        return "train.batching" if self.batching == "groups" else None

    @property
    def reads_evaluations(self) -> bool:
        """Return whether evaluations decide what is kept or trained on."""
        return self.keep_best is not None or (self.replay is not None and self.replay.follows_loss)
