"""A row that is wrong is refused by one message that names it, and nothing of it is kept."""

from datetime import date

import numpy as np
import pytest

from rekindle.data.cache import Cache
from rekindle.data.errors import InputError
from rekindle.data.exchange.logprobs import fields_of_prompt
from rekindle.data.exchange.rows import log_masses
from testlib.caches import committed
from testlib.elsewhere import PROVENANCE, row_of, with_gold


@pytest.fixture(scope="module")
def cache(bare):
    """No test writes into it: what is refused leaves nothing."""
    yield Cache.open(bare)
    assert committed(bare, "targets") == {}


def changed(row, name, place, value):
    """``row`` with another value at one place of a field."""
    found = [list(one) if isinstance(one, list) else one for one in row[name]]
    if isinstance(place, tuple):
        found[place[0]][place[1]] = value
    else:
        found[place] = value
    return row | {name: found}


WRONG = {
    "no index": (lambda row: row | {"index": None}, "index must be a whole number"),
    "index as text": (lambda row: row | {"index": "2"}, "index must be a whole number"),
    "index beyond": (lambda row: row | {"index": 12}, "index is 12, but the cache has 0 to 11"),
    "no proof": (lambda row: row | {"input_ids": None}, "neither input_ids nor digest"),
    "another digest": (lambda row: row | {"digest": "0" * 32}, "its digest is '000"),
    "another sequence": (lambda row: row | {"index": 3}, "input_ids: .* sequence 3 has"),
    "another token": (lambda row: changed(row, "input_ids", 1, 7), "input_ids: at place 1 token 7"),
    "a replica": (lambda row: row | {"replica": 0}, "sees no masks.*--task masked_lm"),
    "an unknown field": (lambda row: row | {"logprobs": []}, "did you mean 'log_probs'"),
    "no ids": (lambda row: row | {"ids": None}, "ids: must be a list of lists of whole numbers"),
    "ids as numbers": (
        lambda row: changed(row, "ids", (1, 0), 1.5),
        "ids: must be a list of lists",
    ),
    "no log_probs": (lambda row: row | {"log_probs": None}, "log_probs: must be a list of lists"),
    "texts": (lambda row: changed(row, "log_probs", (1, 0), "x"), "log_probs: must be a list"),
    "fewer log_probs": (
        lambda row: row | {"log_probs": row["log_probs"][1:]},
        "log_probs must have a number for each of ids",
    ),
    "an id beyond": (
        lambda row: changed(row, "ids", (1, 2), 99999),
        "position 1: 99999 is not a token",
    ),
    "an id below": (lambda row: changed(row, "ids", (1, 2), -1), "position 1: -1 is not a token"),
    "an id twice": (
        lambda row: changed(row, "ids", (1, 2), row["ids"][1][0]),
        "position 1: token .* is there twice",
    ),
    "NaN": (lambda row: changed(row, "log_probs", (1, 1), np.nan), "position 1: .* is nan"),
    "infinity": (lambda row: changed(row, "log_probs", (1, 1), -np.inf), "position 1: .* is -inf"),
    "above 0": (lambda row: changed(row, "log_probs", (1, 1), 0.3), "position 1: .* 0.3, above 0"),
    "probabilities": (
        lambda row: row | {"log_probs": [[0.5, 0.2, 0.1, 0.1]] * len(row["ids"])},
        "these look like probabilities",
    ),
    "another base": (
        lambda row: row | {"log_probs": [[-0.3] * 4] * len(row["ids"])},
        "position 0: the probabilities sum to 2.96",
    ),
    "positions twice": (
        lambda row: row | {"positions": [0, *range(len(row["ids"]) - 1)]},
        "positions: 0 comes after 0",
    ),
    "the last position": (
        lambda row: row | {"positions": [*range(1, len(row["ids"]) + 1)]},
        "has no target: .*the last token predicts none",
    ),
    "fewer positions": (
        lambda row: row | {"ids": row["ids"][1:], "log_probs": row["log_probs"][1:]},
        "ids has .*, but its sequence has",
    ),
    "candidates of one": (
        lambda row: changed(changed(row, "ids", 2, [5]), "log_probs", 2, [-1.0]),
        "position 2 has 1 candidate, but 4 are kept",
    ),
    "half of gold": (lambda row: row | {"gold_ranks": [0]}, "gold_log_probs and gold_ranks"),
    "a tail too large": (
        lambda row: row | {"log_tail": [-0.01] * len(row["ids"])},
        "log_tail: position 0: candidates and tail sum to",
    ),
    "a tail above 0": (lambda row: row | {"log_tail": [0.1] * len(row["ids"])}, "none above 0"),
    "entropy below 0": (
        lambda row: row | {"entropy": [-1.0] * len(row["ids"])},
        "entropy: must lie between 0 and",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_row_is_refused(cache, name):
    change, words = WRONG[name]
    row = change(row_of(cache, 2))
    with pytest.raises(InputError, match=rf"^answers.jsonl, row 1: .*{words}") as error:
        cache.import_targets("t", [row], PROVENANCE, k=4, where="answers.jsonl")
    assert "\n" not in str(error.value)


def test_targets_that_are_a_place_off_are_seen_by_the_true_tokens(cache):
    """Their own tokens' log-probabilities do not fit those among the candidates."""
    row = with_gold(cache, row_of(cache, 2, k=cache.corpus.info["tokenizer"]["size"]))
    row["gold_log_probs"] = row["gold_log_probs"][1:] + row["gold_log_probs"][:1]
    with pytest.raises(InputError, match=r"row 1: gold_log_probs: entry 0 is .* another position"):
        cache.import_targets("t", [row], PROVENANCE)


def test_rows_are_alike_and_each_sequence_has_one(cache):
    first, second = row_of(cache, 2), with_gold(cache, row_of(cache, 3))
    with pytest.raises(InputError, match=r"row 2: entropy: the first rows have none"):
        cache.import_targets("t", [first, second], PROVENANCE)
    with pytest.raises(InputError, match=r"row 2: entropy: missing"):
        cache.import_targets("t", [second, first], PROVENANCE)
    with pytest.raises(InputError, match=r"row 3: sequence 2 already had a row"):
        cache.import_targets("t", [first, row_of(cache, 3), first], PROVENANCE)
    with pytest.raises(InputError, match="there are no rows"):
        cache.import_targets("t", [], PROVENANCE)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"provenance": {"engine": "x"}}, "must name the model"),
        ({"provenance": {"model": "x", "date": date(2026, 11, 29)}}, "provenance.* valid JSON"),
        ({"name": "../x"}, "name"),
        ({"task": "sequence_classification"}, "needs the names of its labels"),
        ({"labels": ("a", "b")}, "labels and problem are for classifiers"),
        ({"task": "regression", "codec": "compact"}, "codec is for language models"),
        ({"task": "masked_lm", "view": "masked-0"}, "view 'masked-0' cannot be shown"),
        ({"taks": "causal_lm"}, "did you mean 'task'"),
    ],
)
def test_wrong_settings_are_refused_before_a_row_is_read(cache, settings, words):
    def rows():
        raise AssertionError("a row was read")
        yield

    asked = {"name": "t", "provenance": PROVENANCE} | settings
    with pytest.raises(InputError, match=words):
        cache.import_targets(asked.pop("name"), rows(), asked.pop("provenance"), **asked)


def test_arrays_of_objects_are_lists():
    """As pandas and datasets hand rows on."""
    entry = {"9": {"logprob": -0.5, "rank": 1}}
    found = fields_of_prompt(np.array([None, entry], object), np.array([4, 9], np.int32))
    assert found["ids"] == [[9]]
    assert found["gold_ranks"] == [0]
    assert log_masses(np.array([None, -2.0], object), 2).tolist() == [-np.inf, -2.0]
    for text in ("ab", b"ab"):
        with pytest.raises(InputError, match="must be one entry for each"):
            fields_of_prompt(text, np.array([4, 9], np.int32))
