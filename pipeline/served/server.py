"""A server that speaks vLLM's dialect of OpenAI's API: its models, and its answers to prompts.

Follows vLLM's API models of 0.10 to 0.2x (``CompletionRequest``, ``CompletionResponseChoice``,
``ModelCard``): token ids in, ``prompt_logprobs`` out, one choice per prompt, identified by
``index``; an error is ``{"error": {message, type, param, code}}``. Servers older than
``return_token_ids`` ignore it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from rekindle.data.counted import counted
from rekindle.data.errors import InputError, did_you_mean
from rekindle.pipeline.served.client import Client
from rekindle.pipeline.served.config import ServedConfig

# The plain distribution, whatever the server's or its model's defaults are: these would show in the
# answers of a server that gives processed log-probabilities (--logprobs-mode).
PLAIN_SAMPLING = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": -1,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}
TOO_MANY_MESSAGE = "max allowed"  # part of vLLM's message if k is above its --max-logprobs
GENERATED_TOKENS = 1  # tokens: the server generates at least one, which is ignored


@dataclass(frozen=True)
class Model:
    """What a server says about one of its models."""

    name: str
    root: str | None  # what it was loaded from
    max_length: int | None  # tokens, prompt and answer together


class Server:
    """One model of one server. Threads may share it."""

    def __init__(self, config: ServedConfig):
        self.config, self.client = config, Client(config)

    @cached_property
    def model(self) -> Model:
        """The model as listed. Raises InputError if the server has no model of that name."""
        listed = self.client.get("/models")
        cards = listed.get("data") if isinstance(listed, dict) else None
        if not isinstance(cards, list) or not all(isinstance(card, dict) for card in cards):
            raise InputError(
                f"{self.client.url}/models lists no models; served.url must be that of an "
                "OpenAI-compatible server"
            )
        names = [str(card.get("id")) for card in cards]
        if self.config.model not in names:
            raise InputError(
                f"the server {self.client.url} has no model {self.config.model!r} (it has: "
                f"{', '.join(names) or 'none'}){did_you_mean(self.config.model, names)}"
            )
        card = cards[names.index(self.config.model)]
        max_length, root = card.get("max_model_len"), card.get("root")
        return Model(
            self.config.model,
            root if isinstance(root, str) else None,
            max_length if isinstance(max_length, int) else None,
        )

    @cached_property
    def versions(self) -> dict[str, str]:
        """What is known of the server's software and of what it loaded; informative."""
        answer = self.client.get("/version", optional=True)
        version = answer.get("version") if isinstance(answer, dict) else None
        versions = {"vllm": version, "served_root": self.model.root}
        return {name: value for name, value in versions.items() if isinstance(value, str)}

    def prompt_logprobs(self, prompts: Sequence[Sequence[int]], k: int) -> list[Any]:
        """Return the ``prompt_logprobs`` of each prompt.

        Raise InputError if the server refuses, or its answer does not belong to these prompts.
        """
        body = {
            "model": self.config.model,
            "prompt": [list(prompt) for prompt in prompts],
            "prompt_logprobs": k,
            "max_tokens": GENERATED_TOKENS,
            "return_token_ids": True,
            **PLAIN_SAMPLING,
        }
        try:
            answer = self.client.post("/completions", body)
        except InputError as error:
            if TOO_MANY_MESSAGE not in str(error):
                raise
            raise InputError(
                f"{error}. Serve the model with --max-logprobs {k}, or take a smaller targets.k"
            ) from None
        if not isinstance(answer, Mapping) or not isinstance(answer.get("choices"), list):
            raise InputError("its answer to /completions has no choices")
        answering_model = answer.get("model")
        if answering_model not in (None, self.config.model):
            raise InputError(
                f"its answer is from the model {answering_model!r}, not {self.config.model!r}"
            )
        self._check_count(answer, sum(map(len, prompts)))
        return [
            self._logprobs_of(choice, prompt)
            for choice, prompt in zip(
                _in_index_order(answer["choices"], len(prompts)), prompts, strict=True
            )
        ]

    def _check_count(self, answer: Mapping[str, Any], sent_count: int) -> None:
        usage = answer.get("usage")
        read_count = usage.get("prompt_tokens") if isinstance(usage, Mapping) else None
        if read_count is not None and read_count != sent_count:
            raise InputError(
                f"it read {read_count} tokens where {sent_count} were sent: it adds some, or cuts "
                "prompts off. It must take token ids as they are"
            )

    def _logprobs_of(self, choice: Mapping[str, Any], prompt: Sequence[int]) -> Any:
        read_ids = choice.get("prompt_token_ids")
        if read_ids is not None and list(read_ids) != list(prompt):
            raise InputError(
                f"it read other tokens than those sent ({counted(len(read_ids), 'token')}; "
                f"{len(prompt)} were sent); it must take token ids as they are"
            )
        if choice.get("prompt_logprobs") is None:
            raise InputError(
                "its answer has no prompt_logprobs; vLLM's server gives them (/v1/completions), "
                "others do not"
            )
        return choice["prompt_logprobs"]


def _in_index_order(choices: list[Any], count: int) -> list[Mapping[str, Any]]:
    """Sort the choices by their ``index``; there must be exactly one for each prompt."""
    by_index = {choice.get("index"): choice for choice in choices if isinstance(choice, Mapping)}
    if len(choices) != count or by_index.keys() != {*range(count)}:
        shown = ", ".join(str(choice.get("index")) for choice in by_index.values())
        raise InputError(
            f"it answers {counted(count, 'prompt')} with {counted(len(choices), 'choice')} of "
            f"index {shown or 'none'}; there must be one for each, from 0"
        )
    return [by_index[number] for number in range(count)]
