"""Targets as an engine would give them: made-up distributions over a cache's vocabulary."""

import numpy as np

from rekindle.data.cache import Cache

PROVENANCE = {"model": "made-up", "engine": "a test", "revision": 3}


def distributions(cache: Cache, index: int) -> np.ndarray:
    """Return log-probabilities [P,V] in float64 of sequence ``index``, for each token but the
    first.
    """
    size = cache.corpus.info["tokenizer"]["size"]
    count = max(0, len(cache.example(index).input_ids) - 1)
    logits = np.random.default_rng(index).normal(0, 3, (count, size))
    return logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)


def row_of(cache: Cache, index: int, k: int = 4, **more: object) -> dict:
    """Return the row of a causal LM for sequence ``index``: its ``k`` likeliest tokens, in
    order.
    """
    whole = distributions(cache, index)
    ids = np.argsort(-whole, axis=1)[:, :k]
    return {
        "index": index,
        "input_ids": cache.example(index).input_ids.tolist(),
        "ids": ids.tolist(),
        "log_probs": np.take_along_axis(whole, ids, axis=1).tolist(),
    } | more


def rows_of(cache: Cache, k: int = 4) -> list[dict]:
    """Return a row for each sequence."""
    return [row_of(cache, index, k) for index in range(len(cache))]


def with_gold(cache: Cache, row: dict) -> dict:
    """Add the true tokens' log-probabilities and ranks, and the entropies, to the row."""
    whole = distributions(cache, row["index"])
    gold = np.array(row["input_ids"][1:], int)
    values = whole[np.arange(len(gold)), gold]
    return row | {
        "gold_log_probs": values.tolist(),
        "gold_ranks": (whole > values[:, None]).sum(axis=1).tolist(),
        "entropy": (-(np.exp(whole) * whole).sum(axis=1)).tolist(),
    }


def as_prompt_logprobs(cache: Cache, row: dict) -> dict:
    """Return the row as vLLM's server prints it: the likeliest tokens of each position, and the
    prompt's own.
    """
    gold = with_gold(cache, row)
    entries: list[dict | None] = [None]
    for place, (ids, values) in enumerate(zip(row["ids"], row["log_probs"], strict=True)):
        own = row["input_ids"][place + 1]
        ranked = [(n, v, r) for r, (n, v) in enumerate(zip(ids, values, strict=True), start=1)]
        if own not in ids:
            ranked.append((own, gold["gold_log_probs"][place], gold["gold_ranks"][place] + 1))
        entries.append(
            {
                str(n): {"logprob": value, "rank": rank, "decoded_token": "?"}
                for n, value, rank in reversed(ranked)
            }
        )
    kept = {name: row[name] for name in ("index", "input_ids")}
    return kept | {"prompt_logprobs": entries}


def log_softmax(logits: np.ndarray, temperature: float) -> np.ndarray:
    """Return log-probabilities [P,V] at a temperature."""
    cold = logits / temperature
    return cold - np.logaddexp.reduce(cold, axis=1, keepdims=True)


def tempered_row(
    cache: Cache, index: int, own: float, further: tuple[float, ...] = (), k: int = 4
) -> dict:
    """Return the row of an engine run at temperature ``own``, with the mass outside the candidates
    at ``further`` temperatures, too.
    """
    whole = distributions(cache, index)
    ids = np.argsort(-whole, axis=1)[:, :k]
    tails = {}
    for at in (own, *further):
        rest = log_softmax(whole, at)
        np.put_along_axis(rest, ids, -np.inf, axis=1)
        tails[at] = np.logaddexp.reduce(rest, axis=1).tolist()
    log_probs = np.take_along_axis(log_softmax(whole, own), ids, axis=1).tolist()
    row = row_of(cache, index, k) | {"log_probs": log_probs, "temperature": own}
    if further:
        row |= {"log_tail": tails[own], "log_tails": {f"{at:g}": tails[at] for at in further}}
    return row
