"""Configuration of a server that runs a teacher."""

from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, PositiveInt

from rekindle.data.settings import Changeable, Place, Settings


def _address(url: str) -> str:
    """Return the URL without a final slash. Raise ValueError unless it is http(s) without
    a secret.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("must be an address such as http://host:8000/v1")
    if parts.username is not None or parts.password is not None:
        raise ValueError(
            "must not hold a user or a password: it is written into caches and logs. Put the key "
            "into an environment variable, and name that in api_key_env"
        )
    if parts.query or parts.fragment:
        raise ValueError("must end with the path, as http://host:8000/v1 does")
    return url.rstrip("/")


class ServedConfig(Settings):
    """A language model behind an OpenAI-compatible server that gives ``prompt_logprobs``, like
    vLLM's.
    """

    url: Changeable[Annotated[str, AfterValidator(_address)]] = Field(
        description="the server's address up to /v1: http://host:8000/v1"
    )
    model: str = Field(min_length=1, description="the model's name on the server (GET /v1/models)")
    tokenizer: Place | None = Field(
        None,
        description="a folder or hub id with the served model's tokenizer, compared with the "
        "corpus's; null: the tokens that the server spells out are compared instead, if it does",
    )
    max_concurrency: Changeable[PositiveInt] = Field(
        8, description="requests at the same time, per process (--workers)"
    )
    prompts_per_request: Changeable[PositiveInt] = Field(1, description="sequences in one request")
    timeout_s: Changeable[float] = Field(
        120.0, gt=0, description="seconds without a byte of an answer before asking again"
    )
    patience_s: Changeable[float] = Field(
        300.0,
        gt=0,
        description="seconds to keep asking a server that has answered before, when it is "
        "overloaded or away",
    )
    api_key_env: Changeable[str | None] = Field(
        None,
        min_length=1,
        description="environment variable with the API key; null: no key is sent",
    )
    tolerance: Changeable[float] = Field(
        0.05,
        ge=0,
        description="mean difference in nats (from kernels and batches) allowed between the "
        "server's answers to the probes now and when the cache was begun; more means another model",
    )
