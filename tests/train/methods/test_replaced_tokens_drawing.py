"""Replaced-token detection: what is sampled, and what is judged."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2

from rekindle.kernels.targets import DecodedTargets
from rekindle.train.device_batch import split_batch
from rekindle.train.methods.replaced_tokens import sample
from testlib.replaced_tokens import CPU, KINDS, gather, method_of, replacements


def distribution(target, row, temperature, special):
    """Probabilities [V] of a position, by hand: kept ids; the tail over all others alike."""
    ids, log_probs, log_tail = target.decode(temperature)
    out = np.zeros(len(special))
    tail = float(np.exp(np.float64(log_tail[row])))
    kept = ids[row][ids[row] >= 0]
    out[kept] = np.exp(log_probs[row][ids[row] >= 0].astype(np.float64))
    others = [i for i in range(len(special)) if not special[i] and i not in set(kept.tolist())]
    out[others] += tail / max(len(others), 1)
    return out / out.sum()


def fits(counts, expected):
    """Pearson's chi-squared at 1 in 100,000; outcomes that are rare are one outcome."""
    assert not counts[expected == 0].any()
    rare = expected < 5
    cells = [(c, e) for c, e in zip(counts[~rare], expected[~rare], strict=True)]
    if expected[rare].sum() > 5:
        cells.append((counts[rare].sum(), expected[rare].sum()))
    statistic = sum((c - e) ** 2 / e for c, e in cells)
    return statistic < chi2.ppf(1 - 1e-5, max(len(cells) - 1, 1))


DRAWS = 700
CASES = [(kind, 1.0) for kind in KINDS] + [("topk", 3.0), ("dense", 2.0), ("hidden", 0.5)]


@pytest.mark.parametrize(("kind", "temperature"), CASES)
def test_replacements_follow_the_teachers_distribution(kinds, kind, temperature):
    """Over many epochs, at positions of one sequence: kept ids, and the tail over all others."""
    cache, method = method_of(kinds, kind, temperature=temperature)
    batch = gather(cache, method, [3])
    target = batch.targets[kind]
    assert len(target.rows) > 1
    drawn = torch.stack(
        [method._sample(replace(batch, epoch=n), target, CPU) for n in range(DRAWS)]
    ).numpy()
    for row in range(len(target.rows)):
        expected = DRAWS * distribution(target, row, temperature, method.special)
        counts = np.bincount(drawn[:, row], minlength=len(expected))
        assert fits(counts, expected), row


def test_the_distribution_of_another_temperature_is_told_apart(kinds):
    """The test above can fail."""
    cache, method = method_of(kinds, "topk")
    batch = gather(cache, method, [3])
    target = batch.targets["topk"]
    drawn = torch.stack(
        [method._sample(replace(batch, epoch=n), target, CPU) for n in range(DRAWS)]
    ).numpy()
    wrong = 0
    for row in range(len(target.rows)):
        expected = DRAWS * distribution(target, row, 3.0, method.special)
        wrong += not fits(np.bincount(drawn[:, row], minlength=len(expected)), expected)
    assert wrong == len(target.rows)


@st.composite
def sparse_rows(draw):
    """(V, special ids, kept ids, probabilities, tail, two numbers) of one position."""
    size = draw(st.integers(2, 12))
    kept = draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=size, unique=True))
    special = draw(st.sets(st.integers(0, size - 1), max_size=size - 1))
    mass = draw(st.lists(st.integers(0, 5), min_size=len(kept), max_size=len(kept)))
    tail = draw(st.integers(0, 5))
    padding = draw(st.integers(0, 3))
    return size, special, kept, mass, tail, padding


@settings(max_examples=150, deadline=None)
@given(sparse_rows())
def test_every_outcome_has_exactly_its_share_of_the_random_numbers(row):
    """Over a grid of both numbers: the inverse of the cumulative sum, outcome by outcome."""
    size, special, kept, mass, tail, padding = row
    content = [i for i in range(size) if i not in special]
    others = [i for i in content if i not in kept]
    total = sum(mass) + (tail if others else 0)
    if total == 0:
        return
    probs = [m / total for m in mass] + [0.0] * padding
    ids = [*kept, *[-1] * padding]
    fine = max(len(others), 1)
    first, second = np.meshgrid((np.arange(total) + 0.5) / total, (np.arange(fine) + 0.5) / fine)
    uniforms = torch.tensor(np.stack([first.ravel(), second.ravel()], 1))
    targets = DecodedTargets(
        torch.tensor([ids] * len(uniforms)),
        torch.tensor([probs] * len(uniforms)),
        torch.full((len(uniforms),), tail / total),
    )
    found = sample(targets, uniforms, torch.tensor(content)).tolist()
    for token in range(size):
        share = fine * mass[kept.index(token)] if token in kept else tail * (token in others)
        assert found.count(token) == share, token


@pytest.mark.parametrize("edge", [0.0, math.nextafter(1.0, 0.0)])
def test_the_ends_of_the_random_numbers_choose_what_has_mass(edge):
    """At the first and the last number: no outcome of probability 0, no id past the end."""
    ids = torch.tensor([[4, 2, 7, -1], [4, 2, 7, -1], [1, 3, 5, 6]])
    probs = torch.tensor([[0.0, 0.7, 0.3, 0.0], [0.0, 0.6, 0.0, 0.0], [0.1, 0.2, 0.3, 0.4]])
    tail = torch.tensor([0.0, 0.4, 0.0])
    found = sample(DecodedTargets(ids, probs, tail), torch.full((3, 2), edge), torch.arange(1, 9))
    assert found.tolist() == ([2, 2, 1] if edge == 0 else [7, 8, 6])


@pytest.mark.parametrize("kind", KINDS)
def test_a_replacement_depends_on_no_batch(kinds, kind):
    """Any order, batch size, world and micro-batch gives every position the same token."""
    cache, method = method_of(kinds, kind)
    whole = replacements(method, gather(cache, method))
    view = cache.teacher(kind).info.view
    masked = cache.gather(np.arange(len(cache)), [], masked_view=view).masked
    assert len(whole) == len(masked.positions) > 50
    shuffled = np.random.default_rng(3).permutation(len(cache))
    for size in (1, 5, len(cache)):
        found = {}
        for start in range(0, len(cache), size):
            batch = gather(cache, method, shuffled[start : start + size])
            found |= replacements(method, batch)
        assert found == whole
    ranks = [replacements(method, gather(cache, method, shuffled[rank::3])) for rank in range(3)]
    assert ranks[0] | ranks[1] | ranks[2] == whole
    parts = split_batch(gather(cache, method, shuffled), 7)
    assert {k: v for part in parts for k, v in replacements(method, part).items()} == whole


def test_an_epoch_and_a_seed_draw_anew(kinds):
    cache, method = method_of(kinds)
    first = replacements(method, gather(cache, method, epoch=0))
    again = replacements(method, gather(cache, method, epoch=2))  # the same masks: two replicas
    assert first.keys() == again.keys()
    assert first != again
    assert first.keys() != replacements(method, gather(cache, method, epoch=1)).keys()
    assert first != replacements(method_of(kinds, seed=1)[1], gather(cache, method))
    assert first == replacements(method_of(kinds)[1], gather(cache, method))


# --- what is judged ---


def test_labels_say_which_tokens_are_not_the_original(kinds):
    cache, method = method_of(kinds)
    special = set(cache.corpus.tokenizer.special_ids)
    same = sum(labels_of_an_epoch(cache, method, special, epoch) for epoch in range(12))
    assert same > 0  # a token that was sampled as it was is an original one


def labels_of_an_epoch(cache, method, special, epoch):
    """Checks all labels; how many replacements are the original."""
    batch = gather(cache, method, epoch=epoch)
    text = method.corrupted(batch, CPU)
    drawn = replacements(method, batch)
    expected, same = {}, 0
    for row, index in enumerate(batch.index.tolist()):
        for place, token in enumerate(cache.example(index).input_ids.tolist()):
            if token not in special:
                shown = drawn.get((index, place), token)
                expected[row, place] = (shown != token, shown)
                same += (index, place) in drawn and shown == token
    assert 0 < sum(label for label, _ in expected.values()) == len(drawn) - same
    width = batch.input_ids.shape[1]
    ids = text.inputs["input_ids"].flatten()
    found = {
        divmod(flat, width): (label, int(ids[flat]))
        for flat, label in zip(text.classified.tolist(), text.replaced.tolist(), strict=True)
    }
    assert found == expected
    assert method.count(batch) == {"loss": len(expected)}
    # What is not judged stays as it is, padding included.
    untouched = np.ones(batch.input_ids.size, bool)
    untouched[text.classified.numpy()] = False
    assert (ids.numpy()[untouched] == batch.input_ids.flatten()[untouched]).all()
    return same


def test_sequences_without_targets_are_not_judged(kinds):
    cache, method = method_of(kinds, "odd")
    batch = gather(cache, method)
    domains = np.array([str(d) for d in batch.domains])
    assert {"odd", "even"} == set(domains)
    text = method.corrupted(batch, CPU)
    rows = np.unique(text.classified.numpy() // batch.input_ids.shape[1])
    assert rows.tolist() == np.flatnonzero(domains == "odd").tolist()
    none = gather(cache, method, np.flatnonzero(domains == "even"))
    assert method.count(none) == {"loss": 0}
    assert len(method.corrupted(none, CPU).classified) == 0
