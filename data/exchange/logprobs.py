"""Convert vLLM's ``prompt_logprobs``, as its server prints them or its Python objects are, to the
fields of a row.

Entry t is for token t given those before it, and the first is null: the cache's position t − 1. An
entry has the likeliest ids, and always the prompt's own token, each with its log-probability and
its rank (from 1).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rekindle.data.errors import InputError
from rekindle.data.exchange.rows import Row
from rekindle.data.exchange.tails import temperature_of

PROMPT_LOGPROBS = "prompt_logprobs"
GOLD_FIELDS = ("gold_log_probs", "gold_ranks")


def expand_row(row: Row, tokens: NDArray[np.int32], task: str) -> Row:
    """Return ``row`` with an engine's ``prompt_logprobs`` replaced by the fields they stand for."""
    if row.get(PROMPT_LOGPROBS) is None:
        return row
    if task != "causal_lm":
        raise InputError(f"{PROMPT_LOGPROBS} are for a causal_lm, but the task is {task}")
    fields = fields_of_prompt(row[PROMPT_LOGPROBS], tokens)
    if temperature_of(row) != 1:  # values of the true token are stored at 1
        fields = {name: value for name, value in fields.items() if name not in GOLD_FIELDS}
    if duplicates := [name for name in fields if row.get(name) is not None]:
        raise InputError(f"it has both {PROMPT_LOGPROBS} and {duplicates[0]}; leave one out")
    return {name: value for name, value in row.items() if name != PROMPT_LOGPROBS} | fields


def fields_of_prompt(values: Any, input_ids: NDArray[np.int32]) -> dict[str, object]:
    """Return ``ids``, ``log_probs``, ``gold_log_probs`` and ``gold_ranks`` of a prompt whose tokens
    are ``input_ids`` [S]. Raise InputError if the values belong to another prompt.
    """
    entries = [*values] if isinstance(values, Sequence | np.ndarray) else []
    if len(entries) != len(input_ids) or (entries and entries[0] is not None):
        hint = "" if not entries or entries[0] is None else ", the first of which is not null"
        raise InputError(
            f"{PROMPT_LOGPROBS} must be one entry for each of the sequence's {len(input_ids)} "
            f"tokens, null for the first (given: {len(entries)} entries{hint}). Give the engine "
            "the cache's token ids, not the text, so that it adds nothing before or after them"
        )
    fields: dict[str, list[Any]] = {name: [] for name in ("ids", "log_probs", *GOLD_FIELDS)}
    for number, entry in enumerate(entries[1:], start=1):
        ids, log_probs, ranks = _entry_values(entry, number)
        gold = int(input_ids[number])
        if gold not in ids:
            raise InputError(
                f"{PROMPT_LOGPROBS}: entry {number} lacks the prompt's own token, which is {gold} "
                "in the cache: these belong to another prompt, or to another tokenizer"
            )
        slot = ids.index(gold)
        fields["ids"].append(ids)
        fields["log_probs"].append(log_probs)
        fields["gold_log_probs"].append(log_probs[slot])
        fields["gold_ranks"].append(ranks[slot])
    if any(rank is None for rank in fields["gold_ranks"]):
        del fields["gold_ranks"], fields["gold_log_probs"]  # one is meaningless without the other
    return dict(fields)


def _entry_values(entry: Any, number: int) -> tuple[list[int], list[float], list[int | None]]:
    """Return the ids of an entry, their log-probabilities, and their ranks from 0."""
    message = f"{PROMPT_LOGPROBS}: entry {number} must be an object: token id -> {{logprob, rank}}"
    if not isinstance(entry, Mapping):
        raise InputError(message)
    ids, log_probs, ranks = [], [], []
    # Arrow's and parquet's structs have every key of the file, null where an entry lacks it.
    for key, value in entry.items():
        if value is None:
            continue
        get = value.get if isinstance(value, Mapping) else lambda n, of=value: getattr(of, n, None)
        log_prob, rank = (
            (value, None) if isinstance(value, float) else (get("logprob"), get("rank"))
        )
        is_rank = rank is None or (isinstance(rank, int) and not isinstance(rank, bool))
        if not str(key).isdecimal() or log_prob is None or not is_rank:
            raise InputError(f"{message} (given: {str(key)[:20]!r}: {str(value)[:40]})")
        ids.append(int(key))
        log_probs.append(log_prob)
        ranks.append(None if rank is None else rank - 1)
    return ids, log_probs, ranks
