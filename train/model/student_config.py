"""The configuration of a student: its model, how it grows, its adapter. Does not import torch."""

from typing import Annotated, Literal, Protocol

from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)

from rekindle.data.settings import GGUF_FILE, Names, Place, Settings, with_gguf_file
from rekindle.train.model.parts.head_config import Pooling
from rekindle.train.schedules import Amount, Count, Positive, Seed

ALL_LINEAR = "all-linear"
OWN = "own"  # vectors of the student's own size


class GrowConfig(Settings):
    """ELLE: a larger student that begins as a copy of ``model``. A null size stays, or grows in
    proportion to the others.
    """

    layers: Count | None = Field(None, description="layers after growth")
    hidden_size: Count | None = Field(None, description="hidden size after growth")
    heads: Count | None = Field(
        None, description="attention heads after growth; the size of a head stays"
    )
    intermediate_size: Count | None = Field(
        None,
        description="neurons of each feed-forward layer; null: in proportion to the hidden size",
    )
    preserve: Literal["approximate", "exact"] = Field(
        "approximate",
        description="exact: the logits stay, up to rounding, or an error says why they cannot",
    )
    copies: Literal["spread", "last", "first"] = Field(
        "spread", alias="copy", description="which layers are copied when layers are added"
    )
    noise_std: Amount = Field(
        0.0,
        description="standard deviation of the noise on the divided columns of every copy but "
        "the first (0.01 in ELLE's own scripts). Without noise, copies learn the same and stay "
        "equal unless dropout separates them. preserve: exact stays exact: the first gets the "
        "opposite",
    )
    seed: Seed = Field(0, description="seed of the copies and of the noise")
    measure_sequences: Count = Field(
        64, description="held-out sequences on which growth.json compares before and after"
    )

    @model_validator(mode="before")
    @classmethod
    def _without_former_noise(cls, value: object) -> object:
        """Accept the former key ``noise`` if it is 0; it had another meaning."""
        if not isinstance(value, dict) or "noise" not in value:
            return value
        if value["noise"] != 0:
            raise ValueError(
                f"noise: {value['noise']} was a multiple of each matrix's own standard deviation; "
                "now noise_std is the standard deviation itself, 0.01 in ELLE's scripts. Set "
                "noise_std, and leave noise out"
            )
        return {"noise_std": 0.0} | {key: one for key, one in value.items() if key != "noise"}


class LoraConfig(Settings):
    """LoRA (arXiv 2106.09685): the model stays as it is; to chosen matrices W a product scale · B·A
    of rank r is added, and only that is trained. Needs the extra peft.
    """

    r: Count = Field(8, description="rank of B·A")
    alpha: Positive | None = Field(
        None, description="scale = alpha / r (with rslora alpha / √r); null: r, a scale of 1"
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the input of A, in training")
    target_modules: Annotated[Names, Field(min_length=1)] = Field(
        (ALL_LINEAR,),
        description="layers to adapt, by the ends of their names (query, value); "
        "all-linear: every linear layer but the output matrix",
    )
    bias: Literal["none", "all", "lora_only"] = Field(
        "none", description="biases to train too: of every layer, or of adapted ones"
    )
    rslora: bool = Field(False, description="divide alpha by √r instead of r (arXiv 2312.03732)")
    dora: bool = Field(
        False, description="DoRA: train the lengths of W's rows separately (arXiv 2402.09353)"
    )
    modules_to_save: Names = Field(
        (), description="layers to train whole and save with the adapter, by name"
    )
    quantize: Literal["nf4"] | None = Field(
        None,
        description="nf4: hold the weights of adapted layers in four bits (QLoRA) in the "
        "run's memory; the adapter belongs to these rounded weights, wherever Rekindle loads it. "
        "Needs the extra quantized",
    )
    merge: bool = Field(
        False,
        description="true: the finished run's folder holds base and adapter merged as a whole "
        "model, which needs neither peft nor the base; its checkpoints are still adapters",
    )

    @field_validator("target_modules")
    @classmethod
    def _all_or_named(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if ALL_LINEAR in value and len(value) > 1:
            raise ValueError(f"{ALL_LINEAR} must stand alone: it means every linear layer")
        return value

    @model_validator(mode="after")
    def _rounds_what_it_reads(self) -> "LoraConfig":
        if self.quantize is not None and self.dora:
            raise ValueError(
                "quantize and dora exclude each other: DoRA reads the unrounded weights at each "
                "step. Leave one of them out"
            )
        return self


class StudentEmbedding(Settings):
    """The vector that a student learning from sentence encoders makes of a text."""

    pooling: Pooling | None = Field(
        None,
        description="how the states of a text's tokens become one vector, in "
        "sentence-transformers' words: mean of all; cls: the first token's; lasttoken: the last "
        "one's; max; weightedmean: later tokens weigh more; mean_sqrt_len_tokens. null: mean; a "
        "causal_lm student, whose early tokens have not read the text, must set it: lasttoken, "
        "or another",
    )
    normalise: bool | None = Field(
        None, description="scale vectors to length 1; null: if the teacher's have it"
    )
    output: str | None = Field(
        None,
        description="which vectors the saved student gives, in the folder that "
        "sentence-transformers loads: those of the head for this teacher, with the projection to "
        "its size if there is one (a module Dense); own: the student's own, without a "
        "projection. null: those for its only embedding teacher; with several, the student's own",
    )


class StudentConfig(Settings):
    """The model to train."""

    model: Place = Field(
        description="a model directory or a hub id: weights, or only a config.json"
    )
    gguf_file: str | None = Field(None, exclude=True, description=GGUF_FILE)
    from_scratch: bool = Field(False, description="start from random weights of that configuration")
    task: Literal["masked_lm", "causal_lm", "replaced_token_detection"] = Field(
        "masked_lm",
        description="its own objective. replaced_token_detection: a masked_lm student whose "
        "objective also has the method replaced_tokens, with its defaults unless it is set in "
        "train.objective.methods; hard.weight is then the weight of the masked-LM loss beside "
        "it, "
        "0 for none",
    )
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = Field(
        "auto", description="auto: SDPA if the model has it; what is used is printed"
    )
    head: Literal["ours", "family"] = Field(
        "ours",
        description="the form of its task heads. ours: dense, tanh, linear, on the first token "
        "(for a "
        "causal LM the last), the same for every family; `pipeline export` writes it for BERT, "
        "RoBERTa and similar ones. family: the classifier that transformers has for its family, "
        "with its own choice of tokens; every such head can be exported",
    )
    grow: GrowConfig | None = Field(
        None, description="ELLE: make it larger before training; null: as it is"
    )
    domain_prompts: bool = Field(
        False, description="ELLE: a learned vector per corpus domain after the first token"
    )
    lora: LoraConfig | None = Field(
        None,
        description="train an adapter of the model instead of the model; null: train all of it",
    )

    embedding: StudentEmbedding | None = Field(
        None, description="its vectors, if it learns from sentence encoders (task: embedding)"
    )

    _with_file = model_validator(mode="before")(with_gguf_file)

    @model_validator(mode="after")
    def _adapts_what_stays(self) -> "StudentConfig":
        if reason := lora_excludes(self):
            raise ValueError(reason)
        return self

    @model_serializer(mode="wrap")
    def _as_before_there_were_adapters(
        self, dump: SerializerFunctionWrapHandler
    ) -> dict[str, object]:
        """Leave unused newer keys out: earlier versions refuse unknown keys, and can continue runs
        without them.
        """
        values: dict[str, object] = dump(self)
        for younger in ("lora", "embedding"):
            if getattr(self, younger) is None:
                values.pop(younger, None)
        return values

    @field_validator("embedding")
    @classmethod
    def _first_token_of_a_causal_lm(
        cls, value: "StudentEmbedding | None", info: ValidationInfo
    ) -> "StudentEmbedding | None":
        if value is not None and value.pooling == "cls" and info.data.get("task") == "causal_lm":
            raise ValueError(
                "pooling: cls is the first token's state, which in a causal_lm student has read "
                "no other token. Give lasttoken, or mean"
            )
        return value

    @property
    def language_task(self) -> Literal["masked_lm", "causal_lm"]:
        """Return which kind of language model it is, whatever else it learns."""
        return "causal_lm" if self.task == "causal_lm" else "masked_lm"

    @property
    def chosen_attention(self) -> str | None:
        """Return the implementation asked for; None: the model's own."""
        return None if self.attention == "auto" else self.attention


class _Trained(Protocol):
    """The part of ``train`` needed here."""

    @property
    def warm_head_steps(self) -> int:
        """Steps in which only the head is trained."""

    @property
    def parallel(self) -> str:
        """How several processes train."""


def lora_excludes(student: StudentConfig, train: _Trained | None = None) -> str | None:
    """Return what excludes an adapter of the configured student; None if nothing does.

    The one table, about the configuration only.
    """
    if student.lora is None:
        return None
    table = {
        "student.from_scratch": (
            student.from_scratch,
            "its base would be random weights that no file holds: train a whole student first",
        ),
        "student.head: family": (
            student.head == "family" and student.lora.quantize is not None,
            "with lora.quantize the body is not that of the family's classifier",
        ),
        "student.grow": (
            student.grow is not None,
            "the base stays as it is on the disk: grow a whole student first, and adapt that",
        ),
    }
    if train is not None:
        table |= {
            "train.warm_head_steps": (
                train.warm_head_steps > 0,
                "they train the language model's own head, which stays as it is",
            ),
            "train.parallel: fsdp": (
                train.parallel == "fsdp",
                "an adapter is small, and each process holds its base whole: use ddp",
            ),
        }
    for key, (is_set, reason) in table.items():
        if is_set:
            return f"student.lora and {key} exclude each other ({reason}). Leave one of them out"
    return None
