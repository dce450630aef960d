"""Domain prompts: a learned vector for each domain of the corpus, inserted into every sequence."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rekindle.data.errors import InputError

DOMAINS = "domain_numbers"  # the key of [B] in a student's inputs
SEGMENTS = "token_type_ids"
PROMPT_POSITION = 1  # of a domain's prompt in the model's input


class DomainPrompts(nn.Module):
    """Domain prompts (ELLE, ACL 2022): a learned vector [H] per domain after a sequence's first
    token; number 0 is for text without a domain, or with an unknown one.

    Positions keep their meaning: they always count the text without the prompt. The prompt is at
    place 1 of the model's input; its own hidden state is removed again.
    """

    def __init__(self, model: Any, domains: Sequence[str]):
        super().__init__()
        if not domains:
            raise InputError(
                "student.domain_prompts: the corpus has no domains. Make the cache with "
                "corpus.domain_field, or leave domain_prompts out"
            )
        self.domains = tuple(domains)
        size = model.get_input_embeddings().weight.shape[1]
        self.vectors = nn.Embedding(len(self.domains) + 1, size)
        std = getattr(model.config.get_text_config(), "initializer_range", 0.02)
        nn.init.normal_(self.vectors.weight, std=std)

    def numbers(self, domains: Sequence[str | None]) -> list[int]:
        """Return the rows of ``domains`` [B] in the table."""
        numbers_by_name = {name: number for number, name in enumerate(self.domains, 1)}
        return [0 if name is None else numbers_by_name.get(name, 0) for name in domains]

    def insert(self, inputs: Mapping[str, Tensor], words: nn.Module) -> dict[str, Tensor]:
        """Return ``inputs`` of width S as embeddings [B,S+1,H], with a mask (and segments) of that
        width.

        ``inputs[DOMAINS]`` [B], domain number 0 if absent; ``words``: the model's input embeddings.
        The model numbers its positions itself, including the prompt's.
        """
        ids = inputs["input_ids"]
        numbers = inputs.get(DOMAINS)
        if numbers is None:
            numbers = torch.zeros(len(ids), dtype=torch.int64, device=ids.device)
        embedded = words(ids)
        prompt = self.vectors(numbers).to(embedded.dtype)[:, None]
        prompted = {"inputs_embeds": _insert_after_first(embedded, prompt)}
        for name in ("attention_mask", SEGMENTS):
            if (column := inputs.get(name)) is not None:  # a prompt is to the model as the first is
                prompted[name] = _insert_after_first(column, column[:, :1])
        return prompted

    @torch.no_grad()
    def take(self, earlier: Sequence[str], vectors: Tensor) -> None:
        """Take over the ``vectors`` of ``earlier`` domains that are domains here, and number 0."""
        self.vectors.weight[0] = vectors[0]
        for number, name in enumerate(earlier, 1):
            if name in self.domains:
                self.vectors.weight[1 + self.domains.index(name)] = vectors[number]


def _insert_after_first(values: Tensor, one: Tensor) -> Tensor:
    return torch.cat([values[:, :PROMPT_POSITION], one, values[:, PROMPT_POSITION:]], dim=1)


def with_prompt(flat: Tensor, width: int) -> Tensor:
    """Return flat indices into [B·(S+1)], with prompts, from flat indices into [B·S]; S is
    ``width``.
    """
    row, position = flat // width, flat % width
    return row * (width + 1) + position + (position >= PROMPT_POSITION)


def without_prompt(states: Tensor) -> Tensor:
    """Return hidden states [B,S+1,…] of a prompted sequence at the S positions of its text."""
    return torch.cat([states[:, :PROMPT_POSITION], states[:, PROMPT_POSITION + 1 :]], dim=1)
