"""The configuration of fine-tuning and scoring. Does not import torch."""

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import AliasChoices, Field, field_validator, model_validator

from rekindle.data.errors import InputError
from rekindle.data.former import FormerDefault
from rekindle.data.settings import Place, Settings
from rekindle.data.settings_schema import one_or_many
from rekindle.train.ranking.kinds import Loss
from rekindle.train.schedules import Positive, Seed
from rekindle.train.step_config import Memory

FORMER_FIELDS = ("text_columns", "label_column")  # former names of text_field and label_field
Label = bool | int | float | str | None  # as YAML writes one; null: missing
Problem = Literal[
    "classification",
    "multi_label_classification",
    "token_classification",
    "regression",
    "ranking",
]
_PROBLEMS = {  # other names for them
    "single_label_classification": "classification",
    "multi_label": "multi_label_classification",
}
Written = Problem | Literal["single_label_classification", "multi_label"] | None


class MergeConfig(Settings):
    """Which experts are merged for comparison, and how."""

    experts: tuple[Place, ...] = Field(min_length=1, description="directories of classifiers")
    oracle: Place | None = Field(
        None, description="a classifier that was fine-tuned on true labels of all kinds"
    )
    labels: Literal["merge", "apart"] = Field(
        "merge", description="label names that several experts share: one label, or one each"
    )
    passes: int = Field(16, ge=0, description="Monte-Carlo passes; 0: without MUKI's merges")
    sharpness: float = Field(0.2, gt=0, description="temperature of MUKI's soft selection")
    seed: Seed = Field(0, description="seed of the Monte-Carlo passes")


class TaskSettings(Settings):
    """What the files of a labelled task mean, if they do not say it themselves."""

    problem: Problem | None = Field(
        None,
        description="null: words, booleans and whole numbers are classes, other numbers (also "
        "lists of them) are scores, lists of names are labels of which several may hold, tokens "
        "with tags are tagged, and ambiguous labels are refused; classification, "
        "multi_label_classification, token_classification: every label is a class as it is "
        "written; regression: labels are numbers, or lists of numbers; ranking: labels are grades "
        "from 0 on, or clicks (true, false), of documents in groups (null: of files with the "
        "columns query and document, or where group_field is given)",
    )
    text_field: tuple[str, ...] = Field(
        (),
        max_length=2,
        json_schema_extra=one_or_many,
        validation_alias=AliasChoices("text_field", FORMER_FIELDS[0]),
        description="field of the text, or the two of a pair, or that of the tokens; empty: "
        "text, or sentence1 and perhaps sentence2, or query and document, or tokens",
    )
    group_field: str | None = Field(
        None,
        description="for ranking: field with the id of a document's query; null: group, or "
        "without such a column, rows with the same query text are a group",
    )
    label_field: str = Field(
        "label",
        validation_alias=AliasChoices("label_field", FORMER_FIELDS[1]),
        description="field of the label; beside tokens also tags, if there is no label",
    )
    label_separator: str | None = Field(
        None,
        min_length=1,
        description="separator between the labels of a row if several are written as one "
        'text, as in "a;b"; null: they are a list, in csv and tsv one as JSON writes it',
    )
    label_names: tuple[str, ...] = Field(
        (),
        json_schema_extra=one_or_many,
        description="names of the labels 0, 1, … where tags, or lists of labels, are numbers",
    )
    threshold: float = Field(
        0.5,
        gt=0,
        lt=1,
        description="if several labels may hold: the least probability of one that holds",
    )
    drop_labels: tuple[Label, ...] = Field(
        (),
        json_schema_extra=one_or_many,
        description="rows with these labels are left out (with several labels, rows that have one "
        "of them); [null]: rows without a label",
    )
    positive: Label = Field(
        None,
        description="which of two classes F1 is for; null: 1, true, yes, positive, or x "
        "beside not_x",
    )

    @field_validator("problem", mode="before", json_schema_input_type=Written)
    @classmethod
    def _by_other_names(cls, value: object) -> object:
        return _PROBLEMS.get(value, value) if isinstance(value, str) else value

    @field_validator("text_field", "label_names", "drop_labels", mode="before")
    @classmethod
    def _one_or_several(cls, value: object) -> object:
        if isinstance(value, list | tuple):
            return value
        return () if value is None else (value,)


LEAST_STEPS, LEAST_EPOCHS = 300, 3  # for epochs: auto; enough for 300 labels, and for large data
# for patience: auto; this fraction (one in so many) of the epochs, and at least so many epochs
_PATIENCE = 3


class FinetuneConfig(TaskSettings):
    """How to fine-tune a model. The defaults, the same from Python and on the command line, suit a
    BERT-sized encoder with some hundred labels and with many thousand.
    ``ComparisonFinetuneConfig`` has those for comparisons.
    """

    epochs: Annotated[int, Field(ge=0)] | Literal["auto"] = Field(
        "auto",
        description=f"passes over the train split; auto: as many as make {LEAST_STEPS} steps, at "
        f"least {LEAST_EPOCHS}; 0: train nothing, and score the model's own head on "
        "dev (train only says what the labels mean)",
    )
    max_steps: int | None = Field(None, ge=1, description="stop after so many steps, if earlier")
    batch_size: int = Field(16, ge=1, description="examples per step")
    learning_rate: float = Field(5e-5, gt=0, description="peak learning rate of AdamW")
    schedule: Literal["linear", "constant"] = Field(
        "linear", description="after the warm-up: falls to 0 (linear), or stays (constant)"
    )
    warmup: float = Field(0.1, ge=0, lt=1, description="fraction of the steps that warm up")
    weight_decay: float = Field(0.01, ge=0, description="on matrices; never on biases and norms")
    betas: tuple[Memory, Memory] = Field(
        (0.9, 0.999), description="AdamW's: how slowly its means of gradients and squares change"
    )
    eps: Positive = Field(1e-8, description="AdamW's: added to the root of the mean square")
    max_length: Annotated[int | None, FormerDefault(128)] = Field(
        None,
        ge=4,
        description="tokens per example; longer ones are cut, also to what the model takes; null: "
        "512, if the model takes them",
    )
    loss: Loss = Field(
        "listwise",
        description="for ranking: listwise, cross-entropy of the softmax over a group's scores "
        "against that over its grades; pairwise, logistic loss of the difference of every two "
        "scores of different grade; pointwise, squared error of each grade, or cross-entropy where "
        "all are 0 or 1",
    )
    grade_temperature: Positive = Field(
        1.0, description="for the listwise loss: the target is softmax(grades / grade_temperature)"
    )
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="precision of training; auto: bf16 autocast if CUDA has it, else fp32"
    )
    patience: Annotated[int, Field(ge=1)] | Literal["auto"] | None = Field(
        "auto",
        description="stop after so many epochs without a better dev score, and keep the best "
        "epoch; "
        f"auto: a third of the epochs, at least {_PATIENCE}; null: never, and the last epoch is "
        "kept",
    )
    evaluate_every: int = Field(
        1,
        ge=1,
        description="epochs from one scoring of dev to the next, for a large dev; after the last "
        "one it is always scored. More than 1 needs patience: null, as its scores choose nothing",
    )
    head: str | None = Field(
        None,
        description="for a student: the task head to continue from, which must have the same "
        "labels (null: a fresh one); with epochs: 0 the one to score",
    )
    merge: MergeConfig | None = Field(
        None, description="epochs: 0: also score other experts, and all ways to merge them"
    )

    @model_validator(mode="after")
    def _check_patience(self) -> Self:
        if self.evaluate_every > 1 and self.patience is not None:
            raise ValueError(
                f"patience ({self.patience}) chooses the best epoch by dev, which is scored only "
                f"every {self.evaluate_every} epochs (evaluate_every): set patience to null to "
                "keep the last epoch, or leave evaluate_every out"
            )
        return self

    def epochs_of(self, rows: int) -> int:
        """Return the number of passes over ``rows`` examples, if nothing ends them earlier."""
        if self.epochs != "auto":
            return self.epochs
        return max(LEAST_EPOCHS, math.ceil(LEAST_STEPS / math.ceil(rows / self.batch_size)))

    def patience_of(self, epochs: int) -> int | None:
        """Return how many epochs without a better dev score end a run of ``epochs``;
        None: none do.
        """
        if self.patience != "auto":
            return self.patience
        return max(_PATIENCE, math.ceil(epochs / _PATIENCE))


def plan_steps(
    examples: int, config: FinetuneConfig, batches: int | None = None
) -> tuple[int, int]:
    """Return (steps, steps of warm-up): the schedule spans all planned steps (at most
    ``max_steps``); early stopping may end before it.

    ``batches`` in all epochs, if they are not cut from ``examples``.
    """
    total = batches or config.epochs_of(examples) * math.ceil(examples / config.batch_size)
    total = min(total, config.max_steps or total)
    return total, math.ceil(config.warmup * total)


def learning_rate_factor(step: int, total: int, warmup: int, schedule: str) -> float:
    """Return the factor of the peak rate in step 0..total-1: linear warm-up to 1; then linear decay
    to 0 at ``total``, or 1 throughout if ``schedule`` is constant.
    """
    if step < warmup:
        return (step + 1) / warmup
    return 1.0 if schedule == "constant" else (total - step) / (total - warmup)


NOT_DECISIVE = "evaluate_every"  # the setting that no model and no final score depends on

# What older versions trained with.
_FORMER_DEFAULTS = {"betas": [0.9, 0.999], "eps": 1e-8}
_FORMER_DEFAULTS |= {"group_field": None, "loss": "listwise", "grade_temperature": 1.0}
_FORMER_DEFAULTS |= {NOT_DECISIVE: 1}


def fill_former_defaults(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """Return recorded settings, with an older version's fixed values for keys that it lacked."""
    return _FORMER_DEFAULTS | dict(recorded)


def check_loss(settings: TaskSettings, path: str, ranks: bool) -> None:
    """Raise InputError for settings of a ranking's loss that nothing would read; ``ranks``: whether
    the train file at ``path`` has documents in groups.
    """
    if not isinstance(settings, FinetuneConfig):
        return
    fields = FinetuneConfig.model_fields
    for key in ("loss", "grade_temperature"):
        value = getattr(settings, key)
        if not ranks and value != fields[key].default:
            raise InputError(
                f"{key} is for documents in groups, and {path} is not read as a ranking: leave "
                f"{key}: {value} out (in a cycle: give it in the finetune of a task that ranks), "
                "or say problem: ranking"
            )
    tau = settings.grade_temperature
    if settings.loss != "listwise" and tau != fields["grade_temperature"].default:
        raise InputError(
            f"grade_temperature belongs to loss: listwise, but loss is {settings.loss}; leave "
            f"grade_temperature: {tau} out"
        )


class ComparisonFinetuneConfig(FinetuneConfig):
    """Fine-tuning for comparisons, as in a cycle: the same number of epochs for every model,
    keeping the last, so that no score is selected.
    """

    epochs: int = Field(3, ge=0, description="passes over the train split")
    batch_size: int = Field(32, ge=1, description="examples per step")
    patience: Annotated[int, Field(ge=1)] | Literal["auto"] | None = Field(
        None, description=FinetuneConfig.model_fields["patience"].description
    )


NOTHING_KEPT = "Nothing of it is kept"


def less_memory(config: FinetuneConfig, bf16: bool) -> str:
    """Return what takes less memory, with the current values; ``bf16``: whether that would."""
    settings = [f"batch_size (now {config.batch_size})", f"max_length (now {config.max_length})"]
    advice = f"Lower {' or '.join(settings)}"
    advice += f", or train in precision bf16 (now {config.precision})" if bf16 else ""
    return f"{advice}: `--set batch_size={max(1, config.batch_size // 2)}`"
