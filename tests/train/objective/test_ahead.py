"""Micro-batches that were sent ahead: the step takes all that was sent, sends next to nothing
itself, and gives the same bits.
"""

import numpy as np
import pytest
import torch

from rekindle.train.order.ahead import made, note_made
from testlib.objective.ahead import Noted, Sends

# By case, what a step still sends by itself in two micro-batches: rows left to the cross-entropy
# alone and which rows have it (language_loss), where an expert's labels are in a union
# (label_union), and what depends on the whole step's groups (ranking).
NOTHING: dict[str, int] = {}
CASES = {
    "masked_world": {
        "plain": NOTHING,
        "prefix": NOTHING,
        "kd alone, dense": NOTHING,
        "two terms": NOTHING,
        "mixture": NOTHING,
        "separate, alone": NOTHING,
        "route, alone": NOTHING,
        "entropy, all": NOTHING,
        "one domain": {"language_loss": 2},
        "classifier, masked": NOTHING,
        "classifier, logits": NOTHING,
        "multi-label": NOTHING,
        "tokens": NOTHING,
        "tokens, masked": NOTHING,
        "experts": NOTHING,
        "pairs": NOTHING,
        "ranking, points alone": {"ranking": 7},
        "pseudo-labels of tokens at masks": NOTHING,
    },
    "experts_world": {
        "route, tokens at masks": NOTHING,
        "mixture, one domain": {"label_union": 4},
        "muki": {"label_union": 6},
        "muki, pairs": {"label_union": 4},
    },
    "causal_world": {
        "separate": {"language_loss": 2},
        "entropy": NOTHING,
        "expert": NOTHING,
        "two terms and an expert": {"language_loss": 2},
    },
}


@pytest.mark.parametrize(
    ("world", "name", "late"),
    [(world, name, late) for world, cases in CASES.items() for name, late in cases.items()],
)
def test_a_step_takes_what_was_sent_ahead(setting_of, monkeypatch, world, name, late):
    setting, copies = setting_of(world, name), Noted()
    loss, terms, gradients = setting.run(micro=9)
    sends = Sends(monkeypatch)
    found = setting.run_ahead(copies, micro=9)
    assert found[:2] == (loss, terms)
    assert all(torch.equal(found[2][key], value) for key, value in gradients.items())
    assert dict(sends.late) == late
    assert copies.sent
    assert not sends.unused(copies)


def test_what_is_cut_out_of_a_batch_is_made_anew(setting_of):
    """Arrays noted of a batch are not those of its parts."""
    batch = setting_of("masked_world", "plain").batch(0)
    note_made(batch, {"mask": np.ones(3)})
    for other, expected in ((batch, 3), (batch.take(slice(0, 2)), 1)):
        assert len(made(other, "mask", lambda: np.ones(1))) == expected
