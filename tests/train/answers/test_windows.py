"""What a language model is shown of texts: every token is predicted once, for every length."""

import numpy as np
import pytest

from rekindle.train.answers.windows import (
    causal_windows,
    draw_places,
    masked_pieces,
    masked_windows,
)


@pytest.mark.parametrize(
    ("window", "stride"), [(w, s) for w in (2, 3, 5, 8) for s in (1, 2, 4) if s < w]
)
def test_every_token_but_the_first_is_predicted_once_with_what_stands_before_it(window, stride):
    for length in range(25):
        ids = np.arange(100, 100 + length, dtype=np.int32)
        predicted = []
        for one in causal_windows(ids, window, stride):
            assert len(one.ids) <= window
            assert (one.ids[one.places] + 1 == one.labels).all()  # the token before it
            predicted += one.labels.tolist()
            first = one.places.min()
            assert first + 1 >= min(window - stride, one.labels.min() - 100)  # seen before it
        assert predicted == ids[1:].tolist()


def test_each_place_is_masked_alone_within_its_piece():
    texts = [np.arange(10, 10 + n, dtype=np.int32) for n in range(12)]
    pieces = [*masked_pieces(texts, (1,), (2, 3), window=8)]
    assert {len(ids) for ids, _ in pieces} == {4, 5, 6, 7, 8}
    windows = [*masked_windows(pieces, mask_id=0)]
    assert sorted(int(one.labels[0]) for one in windows) == sorted(np.concatenate(texts).tolist())
    for one in windows:
        assert (one.ids == 0).sum() == 1
        assert one.ids[one.places[0]] == 0
        assert one.ids[0] == 1
        assert one.ids[-2:].tolist() == [2, 3]


def test_a_draw_is_even_and_the_same_again_and_holds_no_more():
    texts = [np.full(1 + n % 7, n, np.int32) for n in range(40)]
    pieces = [*masked_pieces(texts, (), (), window=9)]
    every = {(int(ids[0]), int(p)) for ids, places in pieces for p in places}
    counts = dict.fromkeys(every, 0)
    for seed in range(400):
        chosen = draw_places(pieces, 30, seed)
        found = [(int(ids[0]), int(p)) for ids, places in chosen for p in places]
        assert len({*found}) == len(found) == 30
        assert found == sorted(found)
        for one in found:
            counts[one] += 1
    expected = 400 * 30 / len(every)
    deviations = (np.array([*counts.values()]) - expected) / np.sqrt(expected)
    assert np.abs(deviations).max() < 4.5
    assert (
        draw_places(pieces, 30, 3)[0][1].tolist() == draw_places(iter(pieces), 30, 3)[0][1].tolist()
    )
    assert {(int(i[0]), int(p)) for i, ps in draw_places(pieces, 10**6, 0) for p in ps} == every
