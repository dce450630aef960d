"""Masks: counts, coverage, units, replacement shares, and that every process draws the same."""

import json
import os
import subprocess
import sys
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rekindle.data.errors import InputError
from rekindle.data.settings import parse_settings
from rekindle.data.views.masking import MaskConfig, Masker

SPECIAL = frozenset({0, 1, 2, 3, 4, 250})
MASK_ID = 4
CONTENT = np.setdiff1d(np.arange(300), [*SPECIAL]).astype(np.int32)
UNITS = ("token", "word", "span")


def sequence(size, seed, specials=2):
    """Ids, content and word starts: special tokens at both ends and, from 3 on, in between."""
    draw = np.random.default_rng(seed)
    ids = draw.integers(5, 250, size).astype(np.int32)
    content = np.ones(size, bool)
    places = [0, size - 1, *draw.integers(0, size, max(0, specials - 2)).tolist()]
    content[places[:specials]] = False
    ids[~content] = 1
    starts = content & (draw.random(size) < 0.6)
    starts[np.flatnonzero(content)[:1]] = True
    return ids, content, starts


class Masked(NamedTuple):
    positions: np.ndarray
    input_ids: np.ndarray


def mask(parts, unit="token", policy="random", probability=0.15, replica=0, replicas=1, **other):
    seed, digest = other.pop("seed", 0), other.pop("digest", "d")
    config = MaskConfig(policy=policy, unit=unit, probability=probability, **other)
    masker = Masker(config, seed, replicas, MASK_ID, CONTENT)
    ids, content, starts = parts
    chosen = masker.positions(content, starts, digest, replica)
    return Masked(chosen, masker.replacements(ids, chosen, digest, replica))


def words_of(parts):
    """The positions of each word: a special token or a word start ends the one before."""
    _, content, starts = parts
    words = []
    for position in np.flatnonzero(content):
        if starts[position] or not words or words[-1][-1] != position - 1:
            words.append([])
        words[-1].append(int(position))
    return words


sequences = st.builds(
    sequence, st.integers(3, 200), st.integers(0, 10**6), specials=st.integers(2, 12)
)


@settings(max_examples=80, deadline=None)
@given(parts=sequences, probability=st.floats(0.01, 0.99), replica=st.integers(0, 20))
def test_the_token_unit_masks_exactly_its_share_of_the_content(parts, probability, replica):
    _, content, _ = parts
    found = mask(parts, probability=probability, replica=replica)
    expected = min(max(1, round(probability * content.sum())), content.sum())
    assert len(found.positions) == len(found.input_ids) == expected
    assert content[found.positions].all()
    assert (np.diff(found.positions.astype(int)) > 0).all()
    assert found.input_ids.dtype == np.int32


@settings(max_examples=80, deadline=None)
@given(parts=sequences, probability=st.floats(0.01, 0.99), unit=st.sampled_from(["word", "span"]))
def test_words_are_masked_whole_and_never_more_than_asked_for(parts, probability, unit):
    _, content, _ = parts
    found = set(mask(parts, unit, probability=probability).positions.tolist())
    words = words_of(parts)
    assert content[list(found)].all()
    for word in words:
        assert len(found & set(word)) in (0, len(word))
    budget = max(1, round(probability * content.sum())) if content.any() else 0
    shortest = min((len(word) for word in words), default=0)
    # Where even the shortest word (or run of words) is too long, it alone is masked.
    longest = 10 * max((len(word) for word in words), default=0)
    assert bool(found) == bool(words)
    assert len(found) <= max(budget, shortest if unit == "word" else longest)


def test_words_and_spans_mask_what_tokens_would_at_every_length():
    """A short sequence too: a span of ten words would hide all of it."""
    for unit in ("word", "span"):
        for size in (12, 30, 128, 512):
            found, asked = [], []
            for seed in range(150):
                parts = sequence(size, seed)
                found.append(len(mask(parts, unit, digest=str(seed)).positions))
                asked.append(max(1, round(0.15 * parts[1].sum())))
            assert 0.85 < sum(found) / sum(asked) <= 1, (unit, size)
            assert max(found) <= max(asked) + 3, (unit, size)


def runs_of_words(parts, positions):
    """Lengths of the runs of adjacent masked words, never over a special token."""
    masked = set(positions.tolist())
    runs, before = [], None
    for word in words_of(parts):
        if word[0] in masked:
            adjacent = before is not None and before == word[0] - 1
            runs = [*runs[:-1], runs[-1] + 1] if adjacent else [*runs, 1]
            before = word[-1]
        else:
            before = None
    return runs


def test_spans_are_runs_of_contiguous_words():
    span, word = [], []
    for seed in range(200):
        parts = sequence(256, seed, specials=6)
        span += runs_of_words(parts, mask(parts, "span", digest=str(seed)).positions)
        word += runs_of_words(parts, mask(parts, "word", digest=str(seed)).positions)
    # Geometric with p = 0.2, clipped at 10, has mean 4.46; a budget's end takes the short ones.
    assert 3.0 < np.mean(span) < 5.5
    assert np.mean(word) < 1.4


def test_no_span_reaches_over_a_special_token():
    """Two documents in one sequence: a dealt span has words of one of them only."""
    ids, content, starts = sequence(90, 0)
    for place in range(7, 85, 7):
        content[place] = False
    for seed in range(60):
        # As many replicas as spans are dealt, so that one replica holds one span at most.
        for replica in range(0, 80, 3):
            found = mask(
                (ids, content, starts),
                "span",
                "cover",
                replica=replica,
                replicas=80,
                digest=str(seed),
            )
            places = found.positions.astype(int)
            assert (np.diff(places) == 1).all()


@settings(max_examples=60, deadline=None)
@given(parts=sequences, unit=st.sampled_from(UNITS), replicas=st.integers(1, 12))
def test_cover_masks_each_content_token_in_exactly_one_replica(parts, unit, replicas):
    _, content, _ = parts
    masks = [
        mask(parts, unit, "cover", replica=replica, replicas=replicas)
        for replica in range(replicas)
    ]
    times = np.zeros(len(content), int)
    for found in masks:
        times[found.positions] += 1
    assert np.array_equal(times, content.astype(int))
    if unit == "token":
        sizes = [len(found.positions) for found in masks]
        assert max(sizes) - min(sizes) <= 1
    for word in words_of(parts) if unit != "token" else []:
        owners = {number for number, found in enumerate(masks) if set(word) & set(found.positions)}
        assert len(owners) == 1


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("policy", ["random", "cover"])
def test_a_sequence_without_content_has_no_mask(unit, policy):
    for size in (0, 3):
        nothing = np.ones(size, np.int32), np.zeros(size, bool), np.zeros(size, bool)
        found = mask(nothing, unit, policy, replicas=3)
        assert found.positions.tolist() == []
        assert found.input_ids.tolist() == []


def test_one_content_token_is_always_masked():
    parts = sequence(3, 0)
    for unit in UNITS:
        assert mask(parts, unit).positions.tolist() == [1]


def test_replicas_are_independent():
    """Two replicas share as many positions as two independent draws do."""
    shared, masked = 0, 0
    for seed in range(300):
        parts = sequence(130, seed)
        first, second = (
            set(mask(parts, replica=replica, digest=str(seed)).positions.tolist())
            for replica in (0, 1)
        )
        shared += len(first & second)
        masked += len(first)
    assert shared / masked == pytest.approx(0.15, abs=0.015)


def test_replicas_do_not_depend_on_how_many_there_are():
    """More can be added to those that are cached."""
    parts = sequence(130, 0)
    few, many = (mask(parts, replica=2, replicas=count) for count in (3, 9))
    assert few.positions.tolist() == many.positions.tolist()
    assert few.input_ids.tolist() == many.input_ids.tolist()


def test_another_seed_or_example_has_another_mask():
    parts = sequence(130, 0)
    base = mask(parts).positions.tolist()
    assert mask(parts, seed=1).positions.tolist() != base
    assert mask(parts, digest="e").positions.tolist() != base


def replacement_shares(**shares):
    counts = {"mask": 0, "kept": 0, "other": 0}
    ids_seen = set()
    for seed in range(150):
        parts = sequence(512, seed)
        found = mask(parts, probability=0.3, digest=str(seed), **shares)
        old, new = parts[0][found.positions], found.input_ids
        counts["mask"] += int((new == MASK_ID).sum())
        counts["kept"] += int((new == old).sum())
        counts["other"] += int(((new != old) & (new != MASK_ID)).sum())
        ids_seen |= set(new[(new != old) & (new != MASK_ID)].tolist())
    total = sum(counts.values())
    return {name: count / total for name, count in counts.items()}, ids_seen, total


def test_80_10_10():
    shares, ids, total = replacement_shares()
    three_sigma = 3 * np.sqrt(0.25 / total)
    # A random token may be the one that stood there: 1 in 294 of the random ones.
    assert shares["mask"] == pytest.approx(0.8, abs=three_sigma)
    assert shares["kept"] == pytest.approx(0.1 + 0.1 / 294, abs=three_sigma)
    assert shares["other"] == pytest.approx(0.1 - 0.1 / 294, abs=three_sigma)
    assert not ids & SPECIAL
    assert len(ids) > 280  # of the 294 that are not special: drawn from the whole vocabulary
    assert ids <= set(range(300))


@pytest.mark.parametrize(
    ("given_shares", "expected"),
    [
        ({"mask_token": 1.0, "random_token": 0.0}, "mask"),
        ({"mask_token": 0.0, "random_token": 0.001}, "kept"),
        ({"mask_token": 0.0, "random_token": 1.0}, "other"),
    ],
)
def test_the_shares_of_replacement_at_their_ends(given_shares, expected):
    shares, ids, _ = replacement_shares(**given_shares)
    assert shares[expected] > 0.99
    assert not ids & SPECIAL


def test_shares_above_one_are_refused():
    with pytest.raises(InputError, match="must not exceed 1"):
        parse_settings(MaskConfig, {"mask_token": 0.9, "random_token": 0.2})
    for probability in (0, 1, -0.1):
        with pytest.raises(InputError, match="probability"):
            parse_settings(MaskConfig, {"probability": probability})


SCRIPT = """
import json, sys
sys.path.insert(0, sys.argv[1])
from test_masking import all_masks
print(json.dumps(all_masks()))
"""


def all_masks():
    """Masks of every policy and unit, for a few sequences, as plain numbers."""
    out = []
    for seed in range(4):
        parts = sequence(60, seed, specials=4)
        for policy in ("random", "cover"):
            for unit in UNITS:
                found = mask(parts, unit, policy, replica=1, replicas=3, digest=f"d{seed}")
                out.append([found.positions.tolist(), found.input_ids.tolist()])
    return out


def test_another_process_with_another_hash_seed_draws_the_same():
    """Nothing of Python's randomised hash() is in a mask."""
    here = os.path.dirname(__file__)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, here],
        env=os.environ | {"PYTHONHASHSEED": "12345"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout) == all_masks()


def test_masks_are_those_of_the_first_release():
    """NumPy may change a Generator's stream between versions, and caches outlive versions.

    If this fails, masks come out differently: raise ``views.ALGORITHM``, so that old views keep
    their names, and put the new numbers here.
    """
    parts = sequence(24, 1)
    found = {unit: mask(parts, unit, digest="golden").positions.tolist() for unit in UNITS}
    dealt = {
        unit: mask(parts, unit, "cover", replica=1, replicas=4, digest="golden").positions.tolist()
        for unit in UNITS
    }
    replaced = mask(parts, probability=0.9, digest="golden").input_ids.tolist()
    assert (found, dealt, replaced) == GOLDEN


GOLDEN = (
    {"token": [1, 3, 20], "word": [1, 4, 18], "span": [14, 15]},
    {
        "token": [5, 7, 10, 14, 16, 22],
        "word": [7, 8, 9, 14, 16, 17],
        "span": [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14],
    },
    [4, 277, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 92, 139, 4, 4, 217, 4, 4],
)
