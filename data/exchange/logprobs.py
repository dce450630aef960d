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

FIELD = "prompt_logprobs"
GOLD = ("gold_log_probs", "gold_ranks")


def expanded_row(row: Row, tokens: NDArray[np.int32], task: str) -> Row:
    """Return ``row`` with an engine's ``prompt_logprobs`` replaced by the fields they stand for."""
    if row.get(FIELD) is None:
        return row
    if task != "causal_lm":
        raise InputError(f"{FIELD} are for a causal_lm, but the task is {task}")
    more = fields_of_prompt(row[FIELD], tokens)
    if temperature_of(row) != 1:  # values of the true token are stored at 1
        more = {name: value for name, value in more.items() if name not in GOLD}
    if doubled := [name for name in more if row.get(name) is not None]:
        raise InputError(f"it has both {FIELD} and {doubled[0]}; leave one out")
    return {name: value for name, value in row.items() if name != FIELD} | more


def fields_of_prompt(values: Any, input_ids: NDArray[np.int32]) -> dict[str, object]:
    """Return ``ids``, ``log_probs``, ``gold_log_probs`` and ``gold_ranks`` of a prompt whose tokens
    are ``input_ids`` [S]. Raise InputError if the values belong to another prompt.
    """
    entries = [*values] if isinstance(values, Sequence | np.ndarray) else []
    if len(entries) != len(input_ids) or (entries and entries[0] is not None):
        first = "" if not entries or entries[0] is None else ", the first of which is not null"
        raise InputError(
            f"{FIELD} must be one entry for each of the sequence's {len(input_ids)} tokens, null "
            f"for the first (given: {len(entries)} entries{first}). Give the engine the cache's "
            "token ids, not the text, so that it adds nothing before or after them"
        )
    found: dict[str, list[Any]] = {name: [] for name in ("ids", "log_probs", *GOLD)}
    for place, entry in enumerate(entries[1:], start=1):
        ids, log_probs, ranks = _parted(entry, place)
        gold = int(input_ids[place])
        if gold not in ids:
            raise InputError(
                f"{FIELD}: entry {place} lacks the prompt's own token, which is {gold} in the "
                "cache: these belong to another prompt, or to another tokenizer"
            )
        at = ids.index(gold)
        found["ids"].append(ids)
        found["log_probs"].append(log_probs)
        found["gold_log_probs"].append(log_probs[at])
        found["gold_ranks"].append(ranks[at])
    if any(rank is None for rank in found["gold_ranks"]):
        del found["gold_ranks"], found["gold_log_probs"]  # one is meaningless without the other
    return dict(found)


def _parted(entry: Any, place: int) -> tuple[list[int], list[float], list[int | None]]:
    """Return the ids of an entry, their log-probabilities, and their ranks from 0."""
    told = f"{FIELD}: entry {place} must be an object: token id -> {{logprob, rank}}"
    if not isinstance(entry, Mapping):
        raise InputError(told)
    ids, log_probs, ranks = [], [], []
    # Arrow's and parquet's structs have every key of the file, null where an entry lacks it.
    for key, value in entry.items():
        if value is None:
            continue
        get = value.get if isinstance(value, Mapping) else lambda n, of=value: getattr(of, n, None)
        log_prob, rank = (
            (value, None) if isinstance(value, float) else (get("logprob"), get("rank"))
        )
        whole = rank is None or (isinstance(rank, int) and not isinstance(rank, bool))
        if not str(key).isdecimal() or log_prob is None or not whole:
            raise InputError(f"{told} (given: {str(key)[:20]!r}: {str(value)[:40]})")
        ids.append(int(key))
        log_probs.append(log_prob)
        ranks.append(None if rank is None else rank - 1)
    return ids, log_probs, ranks
