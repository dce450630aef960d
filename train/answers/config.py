"""Settings for asking finished models. Does not import torch."""

from typing import Literal

from pydantic import Field

from rekindle.data.settings import Place, Settings
from rekindle.train.finetune.config import TaskSettings
from rekindle.train.schedules import Seed


class AskConfig(TaskSettings):
    """How an expert or a student's head is asked, and how the files are read.

    Settings left out are those of the expert's fine-tuning (``recorded_settings``).
    """

    batch_size: int = Field(64, ge=1, description="texts at a time")
    max_length: int | None = Field(
        None,
        ge=4,
        description="most tokens per text; longer texts are cut, also to what the model takes; "
        "null: as the expert was fine-tuned or the student trained, else 512, if the "
        "model takes that many",
    )
    pooling: str | None = Field(
        None,
        description="of a plain encoder that is asked for vectors: how its states of tokens become "
        "one: mean, cls, lasttoken, max, mean_sqrt_len_tokens or weightedmean",
    )
    normalise: bool | None = Field(
        None, description="of the same: whether the vectors are made of length 1"
    )
    prompt: str | None = Field(
        None,
        description="of a sentence encoder: what stands before each text; null: its default "
        "prompt, and in a search those of queries and documents",
    )


class GenerateConfig(Settings):
    """How a language model generates answers."""

    max_new_tokens: int = Field(256, ge=1, description="most tokens of an answer")
    temperature: float = Field(
        1.0,
        ge=0,
        description=(
            "1: sample from the model's own distribution; 0: always take the likeliest token"
        ),
    )
    top_p: float = Field(
        1.0,
        gt=0,
        le=1,
        description=("sample only from the likeliest tokens that together have this probability"),
    )
    top_k: int | None = Field(
        None, ge=1, description="sample only from this many of the likeliest tokens"
    )
    samples: int = Field(1, ge=1, description="answers per prompt")
    seed: Seed = Field(0, description="seed of the sampling")
    prompt_field: str = Field(
        "prompt",
        description="column of the text to continue, in rows without messages",
    )
    prompt_tokens: int | None = Field(
        None, ge=1, description="use only this many of a text's first tokens; null: all"
    )
    chat_template: Place | None = Field(
        None,
        description=("a file with the chat template (Jinja), used instead of the tokenizer's own"),
    )
    limit: int | None = Field(
        None, ge=1, description="use only this many of the first prompts; null: all"
    )
    batch_tokens: int = Field(
        8192, ge=1, description="tokens per batch: prompts, answers and padding"
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="precision of the weights; auto: bf16 where CUDA has it"
    )


class PerplexityConfig(Settings):
    """How a language model's perplexity on a text is measured."""

    max_length: int | None = Field(
        None,
        ge=4,
        description=(
            "tokens that the model sees at a time; null: as many as it takes, at most 1024"
        ),
    )
    stride: int | None = Field(
        None,
        ge=1,
        description=(
            "causal: tokens by which the window advances within a longer text; null: half a window"
        ),
    )
    tokens: int | Literal["all"] = Field(
        2000,
        description="masked: how many tokens are masked, each in its own pass, drawn uniformly "
        "from all; all: every token",
    )
    seed: Seed = Field(0, description="masked: seed of the draw")
    batch_tokens: int = Field(4096, ge=1, description="tokens per batch, padding included")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "fp32", description="precision of the weights; auto: bf16 where CUDA has it"
    )
