"""What the configuration says of a student: its model, how that grows, its adapter. Torch is not
imported here.
"""

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
OWN = "own"  # vectors of the student's own size


class GrowConfig(Settings):
    """ELLE: a larger student that begins as a copy of ``model``. Null: as it is, or in proportion
    to what else grows.
    """

    layers: Count | None = Field(None, description="layers it grows to")
    hidden_size: Count | None = Field(None, description="hidden size it grows to")
    heads: Count | None = Field(
        None, description="attention heads it grows to; the size of a head stays"
    )
    intermediate_size: Count | None = Field(
        None, description="neurons of each feed-forward layer; null: as the hidden size"
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
        description="standard deviation of the noise on the divided columns of every copy but the "
        "first (0.01 in ELLE's own scripts): without it copies learn the same, and stay equal for "
        "ever where no dropout tells them apart. preserve: exact stays exact: the first takes the "
        "opposite",
    )
    seed: Seed = Field(0, description="of what is copied, and of the noise")
    measure_sequences: Count = Field(
        64, description="held-out sequences on which growth.json compares before and after"
    )

    @model_validator(mode="before")
    @classmethod
    def _without_former_noise(cls, value: object) -> object:
        """``noise`` was another thing; 0 of it is 0 all the same."""
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
    """LoRA (arXiv 2106.09685): the model stays as it is, and to chosen matrices W of it a product
    scale · B·A of rank r is added, which alone is trained. Needs the extra peft.
    """

    r: Count = Field(8, description="the rank of what is added")
    alpha: Positive | None = Field(
        None, description="scale = alpha / r (with rslora alpha / √r); null: r, a scale of 1"
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="of what A reads, in training")
    target_modules: Annotated[Names, Field(min_length=1)] = Field(
        (ALL_LINEAR,),
        description="the layers that are adapted, by the ends of their names (query, value); "
        "all-linear: every linear layer but the output matrix",
    )
    bias: Literal["none", "all", "lora_only"] = Field(
        "none", description="biases that are trained too: of every layer, or of adapted ones"
    )
    rslora: bool = Field(False, description="divide alpha by √r in place of r (arXiv 2312.03732)")
    dora: bool = Field(
        False, description="train the lengths of W's rows too, apart (arXiv 2402.09353)"
    )
    modules_to_save: Names = Field(
        (), description="layers that are trained whole and saved with the adapter, by name"
    )
    quantize: Literal["nf4"] | None = Field(
        None,
        description="nf4: the weights of adapted layers are held in four bits (QLoRA), in the "
        "run's memory; the adapter is one of these rounded weights, wherever Rekindle loads it. "
        "Needs the extra quantized",
    )
    merge: bool = Field(
        False,
        description="true: the folder of the finished run holds the sum as a whole model, which "
        "needs neither peft nor the base; its checkpoints are adapters all the same",
    )

    @field_validator("target_modules")
    @classmethod
    def _all_or_named(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if ALL_LINEAR in value and len(value) > 1:
            raise ValueError(f"{ALL_LINEAR} stands alone: it means every linear layer")
        return value

    @model_validator(mode="after")
    def _rounds_what_it_reads(self) -> "LoraConfig":
        if self.quantize is not None and self.dora:
            raise ValueError(
                "quantize and dora exclude each other: DoRA reads the weights themselves at each "
                "step. Leave one of them out"
            )
        return self


class StudentEmbedding(Settings):
    """What a student that learns from sentence encoders makes of a text: one vector."""

    pooling: Pooling | None = Field(
        None,
        description="how the states of a text's tokens become one vector, as it is called by "
        "sentence-transformers: mean of all; cls: the first token's; lasttoken: the last one's; "
        "max; weightedmean: later tokens weigh more; mean_sqrt_len_tokens. null: mean; of a "
        "causal_lm student, whose early tokens have not read the text, it must be said: lasttoken, "
        "or another",
    )
    normalise: bool | None = Field(
        None, description="vectors of length 1; null: where the teacher's are"
    )
    output: str | None = Field(
        None,
        description="whose vectors the saved student gives, in the folder that "
        "sentence-transformers loads: those of the head for this teacher, with the projection to "
        "its size if there is one (a module Dense); own: the student's own, without a projection. "
        "null: those for its only embedding teacher, of several the student's own",
    )


class StudentConfig(Settings):
    """The model that is trained."""

    model: Place = Field(
        description="a model directory or a hub id: weights, or only a config.json"
    )
    gguf_file: str | None = Field(None, exclude=True, description=GGUF_FILE)
    from_scratch: bool = Field(False, description="start from random weights of that configuration")
    task: Literal["masked_lm", "causal_lm", "replaced_token_detection"] = Field(
        "masked_lm",
        description="its own objective. replaced_token_detection: a masked_lm student whose "
        "objective also has the method replaced_tokens, with its defaults unless it stands in "
        "train.objective.methods; hard.weight is then the weight of the masked-LM loss beside it, "
        "0 for none",
    )
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = Field(
        "auto", description="auto: SDPA where the model has it; what is used is printed"
    )
    head: Literal["ours", "family"] = Field(
        "ours",
        description="what its task heads are. ours: dense, tanh, linear, on the first token (of a "
        "causal LM the last), the same for every family; `pipeline export` writes it for BERT, "
        "RoBERTa and their like. family: what transformers' classifier of its family has, with its "
        "own choice of tokens; every head of it can be exported",
    )
    grow: GrowConfig | None = Field(
        None, description="ELLE: make it larger before training; null: as it is"
    )
    domain_prompts: bool = Field(
        False, description="ELLE: a learned vector per corpus domain after the first token"
    )
    lora: LoraConfig | None = Field(
        None, description="train an adapter of the model in place of the model; null: all of it"
    )

    embedding: StudentEmbedding | None = Field(
        None, description="its vectors, where it learns from sentence encoders (task: embedding)"
    )

    _with_file = model_validator(mode="before")(with_gguf_file)

    @model_validator(mode="after")
    def _adapts_what_stays(self) -> "StudentConfig":
        if why := lora_excludes(self):
            raise ValueError(why)
        return self

    @model_serializer(mode="wrap")
    def _as_before_there_were_adapters(
        self, rest: SerializerFunctionWrapHandler
    ) -> dict[str, object]:
        """Earlier versions refuse a key that they do not know, and go on with runs without it."""
        values: dict[str, object] = rest(self)
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
                "pooling: cls is the first token's state, and of a causal_lm student that has read "
                "no other token. Give lasttoken, or mean"
            )
        return value

    @property
    def language_task(self) -> Literal["masked_lm", "causal_lm"]:
        """Which kind of language model it is, whatever else it learns."""
        return "causal_lm" if self.task == "causal_lm" else "masked_lm"

    @property
    def chosen_attention(self) -> str | None:
        """The implementation that is asked for; None: the model's own."""
        return None if self.attention == "auto" else self.attention


class _Trained(Protocol):
    """What is asked of ``train``."""

    @property
    def warm_head_steps(self) -> int:
        """Steps in which the head is trained alone."""

    @property
    def parallel(self) -> str:
        """How several processes train."""


def lora_excludes(student: StudentConfig, train: _Trained | None = None) -> str | None:
    """Say what excludes an adapter of the configured student; None where nothing does.

    The one table, of what the configuration alone says.
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
            "with lora.quantize the body is another than that of the family's classifier",
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
    for key, (given, why) in table.items():
        if given:
            return f"student.lora and {key} exclude each other ({why}). Leave one of them out"
    return None
