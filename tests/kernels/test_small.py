"""Small calls: the loss and gradient of the closed form, by another way; where that is not sure,
by its own.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from rekindle.kernels import ops, small
from rekindle.kernels.losses import kd_loss, linear_kd_loss

ROWS, VOCABULARY, HIDDEN, KEPT = 5, 17, 6, 4
Found = list[Tensor]  # loss, ce, kd, and gradients
Both = Callable[..., tuple[Found, Found]]


def make(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(7)
    x, w, b = (torch.randn(s, generator=g) for s in ((ROWS, HIDDEN), (VOCABULARY, HIDDEN), (17,)))
    ids = torch.rand(ROWS, VOCABULARY, generator=g).argsort(1)[:, :KEPT]
    probs = torch.rand(ROWS, KEPT, generator=g) / (KEPT + 1)
    labels = torch.randint(VOCABULARY, (ROWS,), generator=g)
    labels[0] = ids[0, 2]  # inside the ids, too
    case = {"hidden": x, "weight": w, "bias": b, "probs": probs, "tail": 1 - probs.sum(1)}
    return {name: t.to(dtype) for name, t in case.items()} | {"ids": ids, "labels": labels}


def run(case: dict[str, Tensor], linear: bool, **options: Any) -> Found:
    given = [case[name] for name in ("hidden", "weight", "bias")]
    if not linear:
        given = [case.get("logits", given[0] @ given[1].t() + given[2])]
    leaves = [t.detach().clone().requires_grad_() for t in given]
    if linear:
        x, w, b = leaves
        out = linear_kd_loss(x, w, case["ids"], case["probs"], bias=b, impl="torch", **options)
    else:
        out = kd_loss(*leaves, case["ids"], case["probs"], impl="torch", **options)
    upstream = torch.tensor(1.3, dtype=out.loss.dtype)
    once = torch.autograd.grad(out.loss, leaves, upstream, retain_graph=True)
    again = torch.autograd.grad(out.loss, leaves, upstream)
    torch.testing.assert_close(once, again)
    return [*(t.detach() for t in out), *once]


@pytest.fixture
def both(monkeypatch: pytest.MonkeyPatch) -> Both:
    """The small way and the closed form's; fails where the former was not taken, or is left out."""

    def of(case: dict[str, Tensor], linear: bool, taken: bool = True, **options: Any) -> Any:
        found: list[object] = []
        with monkeypatch.context() as patch:
            way = small.small_losses
            patch.setattr(ops, "small_losses", lambda call: found.append(way(call)) or found[-1])
            here = run(case, linear, **options)
            assert (bool(found) and all(f is not None for f in found)) == taken
            patch.setattr(small, "MAX_LOGITS", 0)
            return here, run(case, linear, **options)

    return of


@pytest.mark.parametrize("tail", ["bucket", "renormalise", "none"])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd", "tvd", "skew_kl"])
def test_it_is_the_closed_form(both: Both, divergence: str, tail: str) -> None:
    case = make()
    labels = {"labels": case["labels"], "ce_weight": 0.3}
    own = {"tail_prob": case["tail"]} if tail == "bucket" else {}
    plans: list[dict[str, Any]] = [
        {"temperature": 1.0} | labels,
        {"temperature": 2.0} | own | labels,
        {"temperature": 2.0, "reduction": "sum"},
        {"temperature": 1.0, "kd_weight": 0.7} | own,
    ]
    for number, plan in enumerate(plans):
        options = {"divergence": divergence, "tail": tail} | plan
        here, there = both(case, number % 2 == 0, **options)
        for one, other in zip(here, there, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_no_less_exact(both: Both, dtype: torch.dtype) -> None:
    """Peaked rows: what it is off float64 by, beside what the closed form is."""
    case = make(dtype)
    case["weight"] = 4 * case["weight"]
    case["probs"] = case["probs"].float()
    options = {"labels": case["labels"], "ce_weight": 0.5, "temperature": 2.0}
    here, there = both(case, True, **options)
    exact = {n: t.double() if t.is_floating_point() else t for n, t in case.items()}
    truth = run(exact, True, **options)
    for one, other, true in zip(here, there, truth, strict=True):
        assert one.dtype == other.dtype
        spare = 4 * torch.finfo(one.dtype).eps * float(true.norm())
        assert (one.double() - true).norm() <= 2 * (other.double() - true).norm() + spare


@pytest.mark.parametrize(
    "change",
    ["padding", "ignored label", "weights", "near zero", "impossible", "every id", "nothing"],
)
def test_where_it_is_not_sure_the_closed_form_is_taken(both: Both, change: str) -> None:
    """To the bit."""
    case = make(torch.float32)
    logits = case["hidden"] @ case["weight"].t() + case["bias"]
    options: dict[str, Any] = {"labels": case["labels"], "ce_weight": 0.5}
    if change == "padding":
        case["ids"][2, 1] = -1
    elif change == "ignored label":
        case["labels"][3] = -100
    elif change == "weights":
        options["row_weight"] = torch.ones(ROWS)
    elif change == "near zero":
        logits[1, case["ids"][1, 0]] = -90.0
    elif change == "impossible":
        logits[1, case["labels"][1]] = -torch.inf
    elif change == "every id":  # nothing lies outside them
        case["ids"] = torch.arange(VOCABULARY).repeat(ROWS, 1)
        case["probs"] = torch.full((ROWS, VOCABULARY), 1 / VOCABULARY)
    elif change == "nothing":
        options["tail"], case["probs"] = "renormalise", torch.zeros(ROWS, KEPT)
    case["logits"] = logits
    here, there = both(case, False, taken=False, **options)
    assert all(map(torch.equal, here, there))
    assert all(bool(t.isfinite().all()) for t in here)
