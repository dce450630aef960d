"""How finished models are asked. Torch is not imported here."""

from typing import Literal

from pydantic import Field

from rekindle.data.settings import Place, Settings
from rekindle.train.finetune.config import TaskSettings
from rekindle.train.schedules import Seed


class AskConfig(TaskSettings):
    """How an expert or a student's head is asked, and what the files mean.

    What is not given is as the expert was fine-tuned (``recorded_settings``).
    """

    batch_size: int = Field(64, ge=1, description="texts at a time")
    max_length: int | None = Field(
        None,
        ge=4,
        description="tokens per text; longer ones are cut, also to what the model takes; null: as "
        "the expert was fine-tuned or the student trained, else 512, if the model takes them",
    )


class GenerateConfig(Settings):
    """How a language model writes on."""

    max_new_tokens: int = Field(256, ge=1, description="tokens of an answer, at most")
    temperature: float = Field(
        1.0,
        ge=0,
        description="1: as the model itself draws; 0: the likeliest token each time",
    )
    top_p: float = Field(
        1.0, gt=0, le=1, description="only the likeliest tokens that have this much together"
    )
    top_k: int | None = Field(None, ge=1, description="only so many of the likeliest tokens")
    samples: int = Field(1, ge=1, description="answers to each prompt")
    seed: Seed = Field(0, description="of the draws")
    prompt_field: str = Field(
        "prompt", description="the text to go on from, in rows without messages"
    )
    prompt_tokens: int | None = Field(
        None, ge=1, description="go on from so many of a text's first tokens; null: from all"
    )
    chat_template: Place | None = Field(
        None, description="a file with the chat template (Jinja), instead of the tokenizer's own"
    )
    limit: int | None = Field(None, ge=1, description="so many of the first prompts; null: all")
    batch_tokens: int = Field(
        8192, ge=1, description="tokens at a time: prompts, answers and padding"
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="of the weights; auto: bf16 where CUDA has it"
    )


class PerplexityConfig(Settings):
    """How a language model is asked how likely a text is."""

    max_length: int | None = Field(
        None,
        ge=4,
        description="tokens that the model sees at a time; null: as many as it takes, at most 1024",
    )
    stride: int | None = Field(
        None,
        ge=1,
        description="causal: tokens by which the window moves on within a longer text; null: half",
    )
    tokens: int | Literal["all"] = Field(
        2000,
        description="masked: how many tokens are masked, each in a pass of its own, drawn evenly "
        "from all; all: every one",
    )
    seed: Seed = Field(0, description="masked: of the draw")
    batch_tokens: int = Field(4096, ge=1, description="tokens at a time, padding included")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "fp32", description="of the weights; auto: bf16 where CUDA has it"
    )
