"""What the losses refuse: the row is named, and no argument is left unused."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rekindle.kernels.encoded import EncodedTargets
from rekindle.kernels.hidden import DenseTargets, HiddenTargets
from rekindle.kernels.losses import kd_loss, linear_kd_loss, merge_targets
from rekindle.kernels.targets import DecodedTargets

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
        ({"tail_prob": at_bad(TAIL, -1e-7)}, r"holds -1e-07 in row 4.*add \.clamp\(min=0\)"),
        ({"tail_prob": at_bad(TAIL, 0.5)}, "sum to 1.3 in row 4"),
        ({"labels": at_bad(LABELS, 9), "ce_weight": 1.0}, "labels hold 9 in row 4"),
        ({"target_probs": PROBS.numpy()}, "target_probs is of type ndarray"),
        ({"target_ids": IDS.numpy()}, "target_ids is a numpy.ndarray; it must be a torch tensor"),
        ({"target_ids": (IDS, PROBS, TAIL)}, "target_ids is a tuple.*three arguments, not a tuple"),
        ({"labels": LABELS.numpy(), "ce_weight": 1.0}, "labels is of type ndarray"),
        ({"labels": LABELS}, "labels are given without ce_weight: set ce_weight=1.0"),
        ({"ce_weight": 1.0}, "ce_weight is 1.0 and there are no labels"),
        ({"target_probs": at_bad(PROBS, [0.1, 0.1, 0.1])}, "sum to 0.5 in row 4; they must sum to"),
        ({"tail": "renormalise"}, "tail_prob is given, but tail='renormalise' ignores it"),
        ({"tail": "none"}, "tail_prob is given, but tail='none' ignores it"),
        ({"row_weight": at_bad(torch.ones(ROWS), torch.nan)}, "row_weight holds nan in row 4"),
        ({"kd_weight": torch.ones(2)}, r"kd_weight is tensor\(.*; it must be a number"),
        ({"kd_weight": torch.ones((), requires_grad=True)}, "kd_weight is a tensor that requires"),
        ({"kd_weight": torch.tensor(torch.inf)}, "kd_weight is inf; it must be finite"),
        ({"ce_weight": torch.ones(2)}, r"ce_weight is tensor\(.*; it must be a number"),
        ({"ignore_index": np.float32(0.5)}, "ignore_index is 0.5; it must be an integer"),
        ({"temperature": None}, "temperature is None; it must be a number"),
        ({"softcap": "5"}, "softcap is '5'; it must be a number"),
        ({"skew": "5"}, "skew is '5'; it must be a number"),
        ({"skew": 0.2}, "skew is for divergence: skew_kl, not forward_kl"),
    ],
)
def test_it_is_refused_with_its_row(change: dict, message: str) -> None:
    arguments = {"target_ids": IDS, "target_probs": PROBS, "tail_prob": TAIL} | change
    with pytest.raises(ValueError, match=message):
        kd_loss(LOGITS, **arguments)
    if change.keys() & {"labels", "ce_weight", "row_weight"}:
        return
    spared = torch.ones(ROWS).index_fill_(0, torch.tensor([BAD]), 0)
    if "row" in message and all(isinstance(v, Tensor | None) for v in change.values()):
        kd_loss(LOGITS, **arguments, row_weight=spared)  # a row that is ignored may hold anything


@pytest.mark.parametrize("kind", [torch.tensor, np.float32, np.float64])
def test_numbers_of_other_types_are_numbers(impl: str, kind: Any) -> None:
    """Tensors of no dimension and NumPy's scalars, alone or in a list, on either path."""
    numbers = {"temperature": 2.0, "ce_weight": 0.5, "skew": 0.25, "softcap": 8.0}
    numbers |= {"logit_scale": 0.5, "ignore_index": 0}
    labels = torch.arange(ROWS)
    targets = [DecodedTargets(IDS, PROBS, TAIL)] * 2
    found = []
    for make in (float, kind):
        options: dict[str, Any] = {name: make(number) for name, number in numbers.items()}
        options |= {"labels": labels, "divergence": "skew_kl", "impl": impl}
        if make is float:
            options["ignore_index"] = 0
        z = torch.linspace(-1, 2, LOGITS.numel()).view_as(LOGITS).requires_grad_()
        alone = kd_loss(z, targets[0], kd_weight=make(0.75), **options)
        both = kd_loss(z, [*targets], kd_weight=[make(0.75), make(0.0)], **options)
        gradients = torch.autograd.grad(alone.loss + both.loss, z)
        found.append([*alone, *both, *gradients])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
        assert one.dtype == torch.float32


def test_what_is_less_than_a_distribution_or_is_made_one_is_none_of_these() -> None:
    """A mixture's row where a teacher has nothing; counts that are scaled; weights of a sample;
    probabilities that were rounded.
    """
    nothing = (at_bad(IDS, -1), PROBS, TAIL)
    ids, probs, tail = merge_targets([(IDS, PROBS, TAIL), nothing], [0.5, 0.5])
    assert float(probs[BAD].sum() + tail[BAD]) == pytest.approx(0.5)
    kd_loss(LOGITS, DecodedTargets(ids, probs, tail))
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
    states, weight = torch.ones(ROWS, 2), torch.zeros(SIZE, 2)
    for wrong in (torch.nan, torch.inf, 3e38):
        scale = at_bad(torch.full((ROWS,), 2.0), wrong)
        hidden = HiddenTargets(2 * states, scale, weight)
        with pytest.raises(ValueError, match="states of row 4 hold NaN or inf, before or after"):
            kd_loss(LOGITS, hidden)
    with pytest.raises(ValueError, match="states of row 4 hold NaN"):
        kd_loss(LOGITS, HiddenTargets(at_bad(states, torch.nan), None, weight))
    for missing in (HiddenTargets(states, None, None), HiddenTargets(None, None, weight)):
        with pytest.raises(ValueError, match=r"the teacher's (weight|states) is missing"):
            kd_loss(LOGITS, missing)


def test_a_batch_of_sequences_is_told_to_be_flattened() -> None:
    for call in (
        lambda x: kd_loss(x, IDS, PROBS),
        lambda x: linear_kd_loss(x, torch.zeros(SIZE, SIZE), IDS, PROBS),
    ):
        with pytest.raises(ValueError, match=r"\(2, 3, 9\).*flatten\(0, 1\) joins"):
            call(LOGITS.reshape(2, 3, SIZE))
        with pytest.raises(ValueError, match=r"is a numpy.ndarray; it must be a torch tensor"):
            call(LOGITS.numpy())


SCALARS = [torch.zeros(ROWS, dtype=d) for d in (torch.uint16, torch.uint16, torch.int16)]
VALUES = torch.zeros(ROWS, 3, dtype=torch.uint8)
ENCODED = EncodedTargets(IDS.to(torch.uint16), VALUES, *SCALARS, temperature=2.0)


def test_encoded_targets_are_of_one_temperature() -> None:
    with pytest.raises(ValueError, match=r"temperature is 1.0, but the targets are for 2.0"):
        kd_loss(LOGITS, ENCODED)
    kd_loss(LOGITS, ENCODED, temperature=2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": IDS}, "targets' ids is torch.int64; it must be torch.uint16, as a cache stores N"),
        ({"ids": IDS.numpy()}, "targets' ids is ndarray"),
        ({"values": VALUES.float()}, "values is torch.float32; it must be torch.uint8"),
        ({"log_prob_min": None}, "values is torch.uint8; it must be torch.uint16"),
        ({"values": VALUES[:, :2]}, "3 ids a row and 2 values"),
        ({"log_prob_max": SCALARS[0][:2]}, r"log_prob_max is \(2,\); it must be \(6,\)"),
        ({"tail_log_odds": torch.zeros(ROWS)}, "tail_log_odds is torch.float32"),
        ({"planes": 1}, "ids_high has 0 bits a row and planes is 1; it must have 3 for each"),
        ({"ids_high": VALUES[:, :1]}, "ids_high has 8 bits a row and planes is 0"),
        ({"k": 0}, "k is 0; it must be at least 1"),
        ({"k": -1}, "k is -1"),
        (
            {"log_prob_max": SCALARS[0].to("meta")},
            "log_prob_max is on meta and the student on cpu; all tensors of a call must",
        ),
    ],
)
def test_encoded_targets_are_as_a_cache_stores_them(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kd_loss(LOGITS, replace(ENCODED, **change), temperature=2.0)


@pytest.mark.parametrize(
    ("teacher", "weights", "message"),
    [
        ((IDS, at_bad(PROBS, [0.5, -0.1, 0]), TAIL), [0.5, 0.5], "teacher 1's probs .* in row 4"),
        (
            (IDS, PROBS, at_bad(TAIL, torch.nan)),
            [0.5, 0.5],
            "teacher 1's tail holds nan in row 4",
        ),
        (
            (IDS, PROBS, at_bad(TAIL, -1e-7)),
            [0.5, 0.5],
            r"teacher 1's tail holds -1e-07 in row 4.*add \.clamp\(min=0\)",
        ),
        (
            (at_bad(IDS, -2), PROBS, TAIL),
            [0.5, 0.5],
            "teacher 1's ids hold a value below -1.* in row 4",
        ),
        ((IDS + 0.5, PROBS, TAIL), [0.5, 0.5], "teacher 1's ids is torch.float32"),
        ((IDS, PROBS), [0.5, 0.5], r"teacher 1 is a tuple; it must be \(ids, probs, tail\)"),
        (
            ENCODED,
            [0.5, 0.5],
            "teacher 1 is a EncodedTargets; .* `rekindle.kernels.encoded.decode`",
        ),
        ((IDS, PROBS, TAIL), [0.5, torch.nan], "weights hold a negative value, NaN or inf"),
    ],
)
def test_what_is_mixed_is_probabilities(teacher: object, weights: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        merge_targets([(IDS, PROBS, TAIL), teacher], weights)
    spared = torch.ones(ROWS, 2).index_fill_(0, torch.tensor([BAD]), 0)
    if "row" in message:
        merge_targets([(IDS, PROBS, TAIL), teacher], spared)
