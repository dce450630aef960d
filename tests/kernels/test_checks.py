"""What the losses refuse: the row is named, and no argument is left unused."""

import numpy as np
import pytest
import torch
from torch import Tensor

from rekindle.kernels.encoded import EncodedTargets
from rekindle.kernels.hidden import DenseTargets, HiddenTargets
from rekindle.kernels.losses import kd_loss, linear_kd_loss, merge_targets

ROWS, SIZE, BAD = 6, 9, 4
LOGITS = torch.zeros(ROWS, SIZE)
IDS = torch.arange(3).repeat(ROWS, 1)
PROBS = torch.tensor([0.5, 0.2, 0.1]).repeat(ROWS, 1)
TAIL = torch.full((ROWS,), 0.2)
LABELS = torch.zeros(ROWS, dtype=torch.long)


def at_bad(tensor: Tensor, value: object) -> Tensor:
    """The tensor with another value at the row that is to be named."""
    out = tensor.clone()
    out[BAD] = torch.as_tensor(value, dtype=out.dtype)
    return out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target_ids": at_bad(IDS, [1, 9, 2])}, "target_ids hold 9 in row 4"),
        ({"target_ids": at_bad(IDS, [1, 2, 1])}, "target_ids hold 1 twice in row 4"),
        ({"target_probs": at_bad(PROBS, [0.5, torch.inf, 0])}, "in row 4 .0.5, inf, 0 "),
        ({"target_probs": at_bad(PROBS, [1, torch.nan, 0])}, "NaN or inf in row 4"),
        ({"target_probs": at_bad(PROBS, [1, 1, 1])}, "tail_prob sum to 3.2 in row 4"),
        ({"target_probs": at_bad(PROBS, [1, 1, 1]), "tail_prob": None}, "sum to 3 in row 4"),
        ({"target_probs": at_bad(PROBS, [-0.7, -1.6, -2.3])}, "negative value, NaN or inf in row"),
        ({"tail_prob": at_bad(TAIL, torch.inf)}, "tail_prob holds inf in row 4"),
        ({"tail_prob": at_bad(TAIL, 0.5)}, "sum to 1.3 in row 4"),
        ({"labels": at_bad(LABELS, 9), "ce_weight": 1.0}, "labels hold 9 in row 4"),
        ({"target_probs": PROBS.numpy()}, "target_probs is of type ndarray"),
        ({"target_ids": IDS.numpy()}, "target_ids is a numpy.ndarray; it must be a torch tensor"),
        ({"target_ids": (IDS, PROBS, TAIL)}, "target_ids is a tuple.*three tensors are given"),
        ({"labels": LABELS.numpy(), "ce_weight": 1.0}, "labels is of type ndarray"),
        ({"labels": LABELS}, "labels are given and no ce_weight: say ce_weight=1.0"),
        ({"ce_weight": 1.0}, "ce_weight is 1.0 and there are no labels"),
    ],
)
def test_it_is_refused_with_its_row(change: dict, message: str) -> None:
    arguments = {"target_ids": IDS, "target_probs": PROBS, "tail_prob": TAIL} | change
    with pytest.raises(ValueError, match=message):
        kd_loss(LOGITS, **arguments)
    if change.keys() & {"labels", "ce_weight"}:
        return
    spared = torch.ones(ROWS).index_fill_(0, torch.tensor([BAD]), 0)
    if "row" in message and all(isinstance(v, Tensor | None) for v in change.values()):
        kd_loss(LOGITS, **arguments, row_weight=spared)  # a row that is ignored may hold anything


def test_what_is_less_than_a_distribution_or_is_made_one_is_none_of_these() -> None:
    """A mixture's row where a teacher has nothing; counts that are scaled; weights of a sample;
    probabilities that were rounded.
    """
    nothing = (at_bad(IDS, -1), PROBS, TAIL)
    ids, probs, tail = merge_targets([(IDS, PROBS, TAIL), nothing], [0.5, 0.5])
    assert float(probs[BAD].sum() + tail[BAD]) == pytest.approx(0.5)
    kd_loss(LOGITS, ids, probs, tail_prob=tail)
    kd_loss(LOGITS, IDS, PROBS * 30, tail="renormalise")
    kd_loss(LOGITS, IDS, PROBS * 3, tail="none")
    half = torch.softmax(torch.randn(ROWS, SIZE), 1).bfloat16()
    kd_loss(LOGITS, torch.arange(SIZE).repeat(ROWS, 1), half, tail_prob=torch.zeros(ROWS))
    told = kd_loss(LOGITS, IDS, PROBS, labels=LABELS, ce_weight=0.0)
    assert float(told.ce) == pytest.approx(np.log(SIZE))


def test_whole_distributions_that_are_none_are_named() -> None:
    for wrong in (torch.nan, torch.inf, -torch.inf):
        with pytest.raises(ValueError, match="log_probs of row 4"):
            kd_loss(LOGITS, DenseTargets(at_bad(torch.zeros(ROWS, SIZE), wrong)))
    states = at_bad(torch.zeros(ROWS, 2), torch.nan)
    with pytest.raises(ValueError, match="states of row 4 hold NaN"):
        kd_loss(LOGITS, HiddenTargets(states, None, torch.zeros(SIZE, 2)))


def test_a_batch_of_sequences_is_told_to_be_flattened() -> None:
    for call in (
        lambda x: kd_loss(x, IDS, PROBS),
        lambda x: linear_kd_loss(x, torch.zeros(SIZE, SIZE), IDS, PROBS),
    ):
        with pytest.raises(ValueError, match=r"\(2, 3, 9\).*flatten\(0, 1\) joins"):
            call(LOGITS.reshape(2, 3, SIZE))
        with pytest.raises(ValueError, match=r"is a numpy.ndarray; it must be a torch tensor"):
            call(LOGITS.numpy())


def test_encoded_targets_are_of_one_temperature() -> None:
    scalars = [torch.zeros(ROWS, dtype=d) for d in (torch.uint16, torch.uint16, torch.int16)]
    values = torch.zeros(ROWS, 3, dtype=torch.uint8)
    targets = EncodedTargets(IDS.to(torch.uint16), values, *scalars, temperature=2.0)
    with pytest.raises(ValueError, match=r"temperature is 1.0, and the targets are of 2.0"):
        kd_loss(LOGITS, targets)
    kd_loss(LOGITS, targets, temperature=2)
