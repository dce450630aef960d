"""Targets of other temperatures: what rows state is read as full logits say; nothing else is."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from rekindle.data.cache import Cache
from rekindle.data.errors import InputError
from rekindle.data.exchange.exporting import Export
from rekindle.data.exchange.files import write_export
from rekindle.data.source.rows import read_rows
from testlib.caches import problems
from testlib.elsewhere import (
    PROVENANCE,
    as_prompt_logprobs,
    distributions,
    log_softmax,
    row_of,
    tempered_row,
    with_gold,
)

PAGE = Path(__file__).parents[3] / "docs/targets_elsewhere.md"
STATED = {
    "served at 1, tails at four": (1.0, (0.5, 1.5, 2.0, 4.0)),
    "served at 2": (2.0, ()),
    "served at 2, a tail at 1": (2.0, (1.0,)),
    "served at 0.7, a tail at 3": (0.7, (3.0,)),
}
STEP = {"default": 0.04, "precise": 2e-3}


def stated(cache, own, further, **more):
    return [tempered_row(cache, index, own, further, **more) for index in range(len(cache))]


def assert_as_full_logits(cache, name, temperatures, k, tolerance):
    """Ids, log-probabilities and log-odds of the tail at each temperature."""
    for index in range(len(cache)):
        whole = distributions(cache, index)
        batch = cache.gather(np.array([index]), [name]).targets[name]
        for at in temperatures:
            ids, log_probs, log_tail = batch.decode(at)
            exact = log_softmax(whole, at)
            order = np.argsort(-exact, axis=1)[:, :k]
            np.testing.assert_array_equal(ids, order)
            kept = np.take_along_axis(exact, order, axis=1)
            np.testing.assert_allclose(log_probs, kept, atol=tolerance / min(at, 1))
            inside = np.exp(kept).sum(axis=1)
            found = np.log(-np.expm1(log_tail.astype(float))) - log_tail
            np.testing.assert_allclose(found, np.log(inside) - np.log1p(-inside), atol=2e-3)


@pytest.mark.covering
@pytest.mark.parametrize("codec", STEP)
@pytest.mark.parametrize("case", STATED)
def test_what_is_read_at_each_stated_temperature_is_as_full_logits_say(cache, case, codec):
    own, further = STATED[case]
    done = cache.import_targets("there", stated(cache, own, further), PROVENANCE, codec=codec)
    stored = tuple(sorted({own, *further}))
    assert done.info.temperatures == stored
    listed = ", ".join(f"{at:g}" for at in stored)
    assert f"can be trained at the temperatures {listed}" in done.as_text()
    again = Cache.open(cache.store.location)
    assert_as_full_logits(again, "there", stored, 4, STEP[codec])
    (found,) = again.example(3).targets["there"]  # what people look at is one that there is
    first = 1.0 if 1.0 in stored else stored[0]
    exact = np.sort(log_softmax(distributions(again, 3), first), axis=1)[:, : -4 - 1 : -1]
    np.testing.assert_allclose(found.log_probs, exact, atol=STEP[codec] / min(first, 1))
    assert problems(cache.store.root) == []


def test_at_no_other_temperature_can_it_be_trained(cache):
    """The mass outside the candidates is not known there; at 1 neither, if none states it."""
    cache.import_targets("one", [row_of(cache, n) for n in range(12)], PROVENANCE)
    cache.import_targets("two", stated(cache, 2.0, ()), PROVENANCE)
    batch = cache.gather(np.array([3]), ["one", "two"]).targets
    for name, at in (("one", 2.0), ("two", 1.0)):
        with pytest.raises(InputError, match=rf"only\. Import rows whose log_tails include {at}"):
            batch[name].decode(at)
    batch["two"].decode(2.0)


def test_between_three_stated_ones_it_is_interpolated(cache):
    cache.import_targets("there", stated(cache, 1.0, (2.0, 4.0), k=8), PROVENANCE, codec="precise")
    batch = cache.gather(np.array([3]), ["there"]).targets["there"].interpolating()
    _, log_probs, _ = batch.decode(3.0)
    exact = np.sort(log_softmax(distributions(cache, 3), 3.0), axis=1)[:, : -8 - 1 : -1]
    np.testing.assert_allclose(log_probs, exact, atol=0.01)


def test_candidates_that_are_dropped_join_the_tail_at_every_temperature(cache):
    cache.import_targets("there", stated(cache, 2.0, (1.0, 4.0), k=9), PROVENANCE, k=4)
    assert_as_full_logits(cache, "there", (1.0, 2.0, 4.0), 4, STEP["default"])


def test_all_of_a_vocabulary_has_no_tail_at_any(cache):
    size = cache.corpus.info["tokenizer"]["size"]
    rows = stated(cache, 2.0, (1.0,), k=size)
    for row in rows:
        none = [None] * len(row["ids"])
        row |= {"log_tail": none, "log_tails": {"1": none}}
    cache.import_targets("there", rows, PROVENANCE)
    (found,) = cache.example(1).targets["there"]
    assert np.isneginf(np.stack([*found.log_tail.values()])).all()
    rows[0]["log_tails"] = {"1": [-9.0] * len(rows[0]["ids"])}
    with pytest.raises(InputError, match="fit no distribution"):
        cache.import_targets("other", rows, PROVENANCE)


def test_what_an_engine_prints_of_another_temperature(cache):
    """Its ranks and the true token's log-probability, which are kept of temperature 1, are not."""
    rows = []
    for plain in stated(cache, 2.0, ()):
        printed = as_prompt_logprobs(cache, with_gold(cache, plain))
        rows.append(printed | {"temperature": 2})
    done = cache.import_targets("there", rows, PROVENANCE, k=3)
    assert done.info.temperatures == (2.0,)
    assert done.info.imported.lacks == ("gold_log_prob", "gold_rank", "entropy")


@pytest.mark.parametrize("ending", [".jsonl", ".parquet"])
@pytest.mark.parametrize("case", ["served at 1, tails at four", "served at 2"])
def test_exported_and_imported_again_it_is_of_the_same_temperatures(cache, tmp_path, case, ending):
    own, further = STATED[case]
    cache.import_targets("there", stated(cache, own, further), PROVENANCE)
    path = tmp_path / f"rows{ending}"
    write_export(Export(cache.corpus, cache.teacher("there")), path)
    done = cache.import_targets("again", read_rows(str(path)), PROVENANCE)
    assert done.info.temperatures == cache.teachers["there"].info.temperatures
    for index in range(len(cache)):
        (one,), (two,) = (cache.example(index).targets[name] for name in ("there", "again"))
        np.testing.assert_array_equal(one.ids, two.ids)
        np.testing.assert_allclose(one.log_probs, two.log_probs, atol=2e-6)
        for at, log_tail in one.log_tail.items():
            np.testing.assert_allclose(log_tail, two.log_tail[at], atol=2e-6)


def test_the_temperature_of_a_resumed_import_must_be_the_same(cache):
    rows = stated(cache, 1.0, (2.0,))
    with pytest.raises(InputError, match="6 sequences of the cache"):
        cache.import_targets("there", rows[:6], PROVENANCE)
    with pytest.raises(
        InputError, match=r"row 2: temperature is 2, but that of the first rows is 1"
    ):
        cache.import_targets("there", [rows[6], *stated(cache, 2.0, (1.0,))[7:]], PROVENANCE)
    with pytest.raises(InputError, match=r"row 2: log_tails have the temperatures \[4.0\]"):
        cache.import_targets("there", [rows[6], *stated(cache, 1.0, (4.0,))[7:]], PROVENANCE)
    assert cache.import_targets("there", rows, PROVENANCE).units_present == 1


def test_the_rows_of_a_loop_as_the_page_makes_them(cache):
    (code,) = (c for c in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S) if "cold" in c)
    made, rows = {}, []
    exec(code, made)
    for index in range(len(cache)):
        whole = np.pad(distributions(cache, index), ((0, 1), (0, 0)))
        ids = cache.example(index).input_ids.tolist()
        rows.append(made["row_of"](index, ids, torch.from_numpy(whole).float(), k=4))
    cache.import_targets("there", rows, PROVENANCE, codec="precise")
    assert_as_full_logits(cache, "there", (1.0, 2.0, 4.0), 4, STEP["precise"])


def tails(row, **changed):
    return row | {"log_tails": row["log_tails"] | changed}


WRONG = {
    "no temperature": (
        lambda row: row | {"temperature": 0},
        "temperature: '0' is not a temperature",
    ),
    "a text": (lambda row: row | {"temperature": "hot"}, "temperature: 'hot' is not a temperature"),
    "a list": (lambda row: row | {"log_tails": [[-1.0]]}, "log_tails must be an object"),
    "no log_tail": (lambda row: row | {"log_tail": None}, "log_tails are given without log_tail"),
    "its own twice": (lambda row: tails(row, **{"1.0": row["log_tail"]}), "log_tails: 1 is there"),
    "one twice": (lambda row: tails(row, **{"2.00": row["log_tail"]}), "log_tails: 2 is there"),
    "too short": (lambda row: tails(row, **{"2": [-1.0]}), "log_tails: 2: must be .* logarithms"),
    "all of it": (
        lambda row: tails(row, **{"2": [0.0] * len(row["ids"])}),
        "log_tails: 2: no mass is left",
    ),
    "exchanged": (
        lambda row: tails(row, **{"2": row["log_tails"]["4"], "4": row["log_tails"]["2"]}),
        "fit no distribution",
    ),
    "that of 1 at 2": (lambda row: tails(row, **{"2": row["log_tail"]}), "fit no distribution"),
    "too large": (
        lambda row: tails(row, **{"2": [-1e-4] * len(row["ids"])}),
        "position 0: masses of .* at 1, 0.9999 at 2, .* fit no distribution",
    ),
    "none at 2": (
        lambda row: tails(row, **{"2": [None] * len(row["ids"])}),
        "position 0: masses of .* at 1, 0 at 2",
    ),
    "gold of another": (
        lambda row: row | {"temperature": 3, "gold_ranks": [0], "gold_log_probs": [-1.0]},
        "gold_log_probs: it is stored at temperature 1, but the row's is 3",
    ),
    "far apart": (
        lambda row: (
            row
            | {"temperature": 8, "log_tail": None, "log_tails": None}
            | {"log_probs": [[-0.1, -5.0, -6.0, -7.0]] * len(row["ids"])}
        ),
        "candidates lie 6.9 nats apart at temperature 8, but those of a position may be at most 4",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_row_of_wrong_temperatures_is_refused(cache, name):
    change, words = WRONG[name]
    row = change(tempered_row(cache, 2, 1.0, (2.0, 4.0)))
    with pytest.raises(InputError, match=rf"^rows, row 1: .*{words}") as error:
        cache.import_targets("t", [row], PROVENANCE, k=4)
    assert "\n" not in str(error.value)
