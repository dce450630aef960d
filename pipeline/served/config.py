"""What the configuration says of a server that runs a teacher."""

from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, PositiveInt

from rekindle.data.settings import Free, Place, Settings


def _address(url: str) -> str:
    """The URL without its last slash; ValueError unless it is http(s), and says no secret."""
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
    """A language model behind an OpenAI-compatible server that gives ``prompt_logprobs``, as
    vLLM's does.
    """

    url: Free[Annotated[str, AfterValidator(_address)]] = Field(
        description="the server's address up to /v1: http://host:8000/v1"
    )
    model: str = Field(min_length=1, description="the model's name there (GET /v1/models)")
    tokenizer: Place | None = Field(
        None,
        description="a folder or hub id with the served model's tokenizer, held against the "
        "corpus's; null: what the server says tokens are is held against it, where it says so",
    )
    max_concurrency: Free[PositiveInt] = Field(
        8, description="requests at a time, of each process (--workers)"
    )
    prompts_per_request: Free[PositiveInt] = Field(1, description="sequences in one request")
    timeout_s: Free[float] = Field(
        120.0, gt=0, description="seconds without a byte of an answer, after which it is asked anew"
    )
    patience_s: Free[float] = Field(
        300.0,
        gt=0,
        description="seconds for which a server that has answered before is asked again when it is "
        "overloaded or away",
    )
    api_key_env: Free[str | None] = Field(
        None,
        min_length=1,
        description="the environment variable that has the API key; null: none is sent",
    )
    tolerance: Free[float] = Field(
        0.05,
        ge=0,
        description="nats, in the mean, by which a server may answer the probes otherwise than "
        "when the cache was begun (kernels and batches move them); more is another model",
    )
