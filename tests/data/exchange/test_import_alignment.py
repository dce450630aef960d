"""Rows that are a place off, and nothing in them that proves it but the text."""

import numpy as np
import pytest

from rekindle.data.cache import Cache
from rekindle.data.errors import InputError
from rekindle.data.exchange.alignment import MIN_POSITIONS, Alignment


def counted(candidates: np.ndarray, tokens: np.ndarray) -> Alignment:
    found = Alignment()
    gold = np.arange(1, len(tokens) - 1)
    found.add(candidates[gold], tokens, gold)
    return found


@pytest.mark.parametrize(("offset", "said"), [(-1, "the token before"), (1, "the token after")])
def test_candidates_of_the_neighbour_are_found_out(offset, said):
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 1000, 500).astype(np.int32)
    candidates = rng.integers(0, 1000, (500, 8))
    knows = rng.random(500) < 0.4  # a model is right now and then
    candidates[knows, 3] = tokens[knows]
    counted(candidates, tokens).check()
    with pytest.raises(InputError, match=f"and {said} it in 4"):
        counted(np.roll(candidates, -offset, axis=0), tokens).check()


def test_chance_and_few_positions_say_nothing():
    for seed in range(200):
        rng = np.random.default_rng(seed)
        tokens = rng.integers(0, 50, 400).astype(np.int32)
        counted(rng.integers(0, 50, (400, 8)), tokens).check()
    tokens = rng.integers(0, 1000, MIN_POSITIONS).astype(np.int32)  # two have no neighbour
    counted(np.roll(tokens, 1)[:, None].astype(np.int64), tokens).check()


def test_an_import_that_is_a_place_off_ends_with_the_first_unit_that_shows_it(empty):
    """Here the second: the first has fewer positions than anything can be said of."""
    cache = Cache.open(empty)
    rows = {}
    for index in range(len(cache)):
        tokens = cache.example(index).input_ids
        ids = np.stack([tokens[:-1], tokens[:-1] ^ 1], axis=1)  # each of its own token
        rows[index] = {
            "index": index,
            "input_ids": tokens.tolist(),
            "ids": ids.tolist(),
            "log_probs": np.log([[0.6, 0.3]] * len(ids)).tolist(),
        }
    about = {"task": "causal_lm", "k": 2, "provenance": {"model": "mine"}}
    with pytest.raises(InputError, match="the rows look shifted by one"):
        cache.import_targets("shifted", rows.values(), **about)
    assert len([*empty.glob("targets/shifted/**/*.arrow")]) == 1
