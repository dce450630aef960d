"""How long a seed trains by default, which epoch is kept, and what is told of it."""

import json
import logging

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rekindle.train.finetune.best_epoch import DONE, MAX_STEPS, PATIENCE, BestEpoch, describe_end
from rekindle.train.finetune.config import (
    LEAST_EPOCHS,
    LEAST_STEPS,
    ComparisonFinetuneConfig,
    FinetuneConfig,
    plan_steps,
)
from rekindle.train.finetune.run import finetune


@given(st.integers(1, 200_000), st.integers(1, 128))
def test_by_default_there_are_enough_steps_and_no_more_epochs_than_they_need(rows, batch):
    config = FinetuneConfig(batch_size=batch)
    epochs, (steps, _) = config.epochs_of(rows), plan_steps(rows, config)
    assert steps >= LEAST_STEPS
    assert epochs >= LEAST_EPOCHS
    assert epochs == LEAST_EPOCHS or (epochs - 1) * -(-rows // batch) < LEAST_STEPS
    assert 3 <= config.patience_of(epochs) <= max(3, epochs / 3 + 1)


def test_the_budget_of_what_is_compared_is_what_it_was():
    """Cycles, the demo and the built-in experts: whoever changes this changes recorded results."""
    config = ComparisonFinetuneConfig()
    assert (config.epochs, config.patience, config.batch_size) == (3, None, 32)
    rest = ("learning_rate", "schedule", "warmup", "weight_decay", "max_length", "max_steps")
    assert [getattr(config, key) for key in rest] == [5e-5, "linear", 0.1, 0.01, None, None]


@given(st.lists(st.integers(0, 4), min_size=1, max_size=12), st.integers(1, 5) | st.none())
def test_the_first_best_epoch_is_kept_with_its_weights_scores_and_logits(found, patience):
    model = torch.nn.Linear(1, 1, bias=False)
    best = BestEpoch(patience)
    for number, score in enumerate(found, start=1):
        torch.nn.init.constant_(model.weight, number)
        best.update("f1", {"f1": float(score)}, np.full((1, 1), number), model)
        if best.ran_out:
            break
    ran = found[: best.last]
    kept = ran.index(max(ran)) + 1 if patience else len(found)
    assert (best.epoch, best.scores, best.logits.item()) == (kept, {"f1": ran[kept - 1]}, kept)
    assert best.ran_out == (patience is not None and len(ran) - kept >= patience)
    best.restore(model)
    assert model.weight.item() == kept


@pytest.mark.parametrize(
    ("ended", "told"),
    [
        ((3, 3, 3, DONE, True), "epoch 3 of 3, best on dev"),
        (
            (2, 5, 9, PATIENCE, True),
            "epoch 2 of 9, best on dev; ended after 5: 3 in a row were no better",
        ),
        ((4, 4, 9, MAX_STEPS, False), "epoch 4 of 9, the last; ended in 4 by max_steps"),
    ],
)
def test_what_is_kept_is_told_in_a_line(ended, told):
    assert describe_end(*ended) == told


@pytest.mark.parametrize("is_short", [True, False])
def test_a_result_that_learned_nothing_is_a_warning_and_one_that_did_is_none(
    is_short, tmp_path, make_model, wordpiece, caplog, monkeypatch
):
    if not is_short:
        monkeypatch.setattr("rekindle.train.finetune.run.LEAST_STEPS", 1)
    model = str(make_model("bert", "AutoModelForMaskedLM", wordpiece))
    rows = [{"text": "a river", "label": "x"}] * 30 + [{"text": "the model", "label": "y"}] * 10
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = (model, str(path), str(path))
    frozen = FinetuneConfig(max_steps=1, learning_rate=1e-12)
    with caplog.at_level(logging.WARNING, logger="rekindle"):
        result = finetune(*files, str(tmp_path / "weak"), config=frozen)
    line = result.per_seed[0].warning
    assert [r.getMessage() for r in caplog.records if "warning" in r.getMessage()] == [line]
    assert "\n" not in line
    assert "that of always saying 'x'; next to nothing was learned" in line
    longer = "train longer (--set max_steps=null)"  # more epochs would change nothing
    rate = "try another learning_rate (now 1e-12; "
    first, then = (longer, rate) if is_short else (rate, longer)
    assert f"First {first}" in line
    assert f"then {then}" in line
    written = json.loads((tmp_path / "weak" / "metrics.json").read_text())
    assert written["per_seed"][0]["warning"] == line
    quick = FinetuneConfig(epochs=6, learning_rate=1e-2)
    assert finetune(*files, str(tmp_path / "good"), config=quick).per_seed[0].warning is None
