"""How a step is split among micro-batches and processes changes nothing."""

from dataclasses import replace

import numpy as np
import pytest

from rekindle.data.batch import SequenceTargetBatch, TokenLabelBatch
from rekindle.train.device_batch import split_batch
from testlib.objective.cases import OBJECTIVES, SPLIT
from testlib.objective.setting import Setting, same_step


@pytest.mark.parametrize("name", ["everything", "one domain", "kd alone", "a teacher per domain"])
def test_micro_batches_of_every_size_give_the_same_gradient(masked_world, name):
    setting = Setting(masked_world, OBJECTIVES[name])
    masked = setting.batch(0).masked
    assert len(set(np.bincount(masked.rows).tolist())) > 2  # unequal numbers of masked positions
    whole = setting.run()
    for micro in (2, 3, 5, 8, 16):
        same_step(setting.run(micro=micro), whole)


@pytest.mark.parametrize(("world", "name"), SPLIT)
def test_how_a_step_is_split_changes_nothing(setting_of, world, name):
    """Neither micro-batches nor processes, each with every n-th sequence."""
    setting = setting_of(world, name, batch=range(5, 12))
    whole = setting.run()
    for micro in (1, 4):
        same_step(setting.run(micro=micro), whole)
    for processes in (2, 3):
        same_step(setting.run_apart(processes), whole)


@pytest.mark.parametrize(("world", "name"), SPLIT)
def test_all_processes_make_the_same_passes(setting_of, world, name):
    """Whatever a micro-batch lacks: otherwise they would wait for each other's gradients."""
    setting = setting_of(world, name, batch=range(3, 7))
    whole = setting.passes(setting.batch(0))
    assert all(whole)
    for part in [*split_batch(setting.batch(0), 1), without_rows(setting.batch(0))]:
        assert setting.passes(part) == whole


def without_rows(batch):
    """The sequences of a batch cut to their first token: no loss has anything in them."""
    none = np.zeros(0, np.int64)
    masked = batch.masked and replace(batch.masked, rows=none, positions=none, labels=none)
    targets = {}
    for name, target in batch.targets.items():
        if isinstance(target, SequenceTargetBatch):
            targets[name] = replace(target, present=np.zeros_like(target.present))
        elif isinstance(target, TokenLabelBatch):
            targets[name] = replace(target, rows=none, positions=none, logits=target.logits[:0])
        else:
            columns = {key: column[:0] for key, column in target.columns.items()}
            targets[name] = replace(target, rows=none, positions=none, columns=columns)
    pairs = {name: replace(p, lengths=np.zeros_like(p.lengths)) for name, p in batch.pairs.items()}
    lengths = np.ones_like(batch.lengths)
    return replace(batch, lengths=lengths, masked=masked, targets=targets, pairs=pairs)
