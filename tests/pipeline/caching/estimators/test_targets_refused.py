"""Targets that make no sense are refused when they are read."""

from typing import Any

import pytest

from rekindle.data.errors import InputError


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (
            {"kind": "threshold", "temperatures": [1.0, 2.0]},
            "teachers.0.targets: threshold targets are a sample of the distribution at one "
            "temperature; list one",
        ),
        (
            {"kind": "random", "temperatures": []},
            "teachers.0.targets: random targets are a sample of the distribution at one "
            "temperature; list one",
        ),
        (
            {"kind": "random", "k": 256},
            "teachers.0.targets: random targets have at most 255 draws, not 256",
        ),
        (
            {"kind": "dense", "codec": "compact"},
            "teachers.0.targets: codec compact is for topk and threshold, not dense",
        ),
        (
            {"kind": "random", "codec": "precise"},
            "teachers.0.targets: codec precise is for topk and threshold, not random",
        ),
        (
            {"kind": "hidden", "codec": "precise"},
            "teachers.0.targets: codec precise is for topk and threshold, not hidden",
        ),
    ],
)
def test_targets_that_make_no_sense(tmp_path, configure, targets, message):
    teacher = {"name": "lm", "model": "x", "task": "masked_lm", "targets": targets}
    with pytest.raises(InputError) as caught:
        configure(tmp_path, [teacher])
    assert str(caught.value) == message


@pytest.mark.parametrize("kind", ["topk", "threshold", "random", "hidden"])
@pytest.mark.parametrize("task", ["sequence_classification", "regression", "token_classification"])
def test_kinds_of_vocabulary_targets_are_not_for_task_heads(tmp_path, configure, kind, task):
    teacher = {"name": "t", "model": "x", "task": task, "targets": {"kind": kind}}
    with pytest.raises(InputError) as caught:
        configure(tmp_path, [teacher])
    assert str(caught.value) == (
        f"teachers.0: {kind} targets are for masked_lm and causal_lm; task heads are kept whole"
    )


def test_a_sample_of_one_given_temperature_is_of_that_one(tmp_path, configure):
    def temperatures(**targets: Any) -> tuple[float, ...]:
        teacher = {"name": "lm", "model": "x", "task": "masked_lm", "targets": targets}
        return configure(tmp_path, [teacher]).teachers[0].targets.temperatures

    assert temperatures(kind="threshold") == (1.0,)
    assert temperatures(kind="random", temperatures=[2.0]) == (2.0,)
    assert temperatures(kind="random", k=255) == (1.0,)
    assert temperatures(kind="topk", temperatures=[4.0, 2.0]) == (1.0, 2.0, 4.0)
