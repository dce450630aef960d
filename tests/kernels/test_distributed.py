"""The fused loss under DistributedDataParallel and FSDP2: two processes give one's gradient."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from rekindle.kernels.hidden import HiddenTargets
from rekindle.kernels.losses import linear_kd_loss
from testlib.several.forked import PROCESSES, end_well, forked_world

KINDS = ("ddp", "fsdp", "hidden-ddp", "hidden-fsdp")
ROWS, HIDDEN, VOCABULARY, KEPT, TEACHER_HIDDEN = 8, 16, 40, 5, 6


class Head(nn.Module):
    """A body and an output matrix whose logits are never made."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(HIDDEN, HIDDEN)
        self.out = nn.Linear(HIDDEN, VOCABULARY)

    def forward(self, x: Tensor, ids: Tensor, probs: Tensor, labels: Tensor) -> Tensor:
        hidden = torch.tanh(self.body(x))
        return linear_kd_loss(
            hidden, self.out.weight, ids, probs, bias=self.out.bias, labels=labels,
            temperature=2.0, ce_weight=0.5,
        ).loss  # fmt: skip


class Sharded(Head):
    """FSDP2 gathers a module's parameters around its forward: the head is a module of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.out = OutputLoss()

    def forward(self, x: Tensor, ids: Tensor, probs: Tensor, labels: Tensor) -> Tensor:
        return self.out(torch.tanh(self.body(x)), ids, probs, labels)


class OutputLoss(nn.Linear):
    def __init__(self) -> None:
        super().__init__(HIDDEN, VOCABULARY)

    def forward(self, hidden: Tensor, ids: Tensor, probs: Tensor, labels: Tensor) -> Tensor:
        return linear_kd_loss(
            hidden, self.weight, ids, probs, bias=self.bias, labels=labels,
            temperature=2.0, ce_weight=0.5,
        ).loss  # fmt: skip


class OutputLossOfHidden(nn.Linear):
    """Against a teacher's hidden states, under autocast."""

    def __init__(self) -> None:
        super().__init__(HIDDEN, VOCABULARY)

    def forward(self, hidden: Tensor, targets: HiddenTargets, labels: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return linear_kd_loss(
                hidden, self.weight, targets, bias=self.bias, labels=labels,
                temperature=2.0, ce_weight=0.5,
            ).loss  # fmt: skip


class OfHidden(nn.Module):
    """The same body; its targets are hidden states."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(HIDDEN, HIDDEN)
        self.out = OutputLossOfHidden()

    def forward(self, x: Tensor, targets: HiddenTargets, labels: Tensor) -> Tensor:
        return self.out(torch.tanh(self.body(x)), targets, labels)


def batch(kind: str, share: slice = slice(None)) -> tuple[object, ...]:
    """The arguments of the model's forward, or the share of one process."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, HIDDEN, generator=g)
    labels = torch.randint(VOCABULARY, (ROWS,), generator=g)[share]
    if kind.startswith("hidden"):
        states = torch.randint(-127, 128, (ROWS, TEACHER_HIDDEN), generator=g).to(torch.int8)
        scale = torch.rand(ROWS, generator=g) / 50
        weight = torch.randn(VOCABULARY, TEACHER_HIDDEN, generator=g)
        return x[share], HiddenTargets(states[share], scale[share], weight), labels
    ids = torch.rand(ROWS, VOCABULARY, generator=g).argsort(1)[:, :KEPT]
    probs = torch.rand(ROWS, KEPT, generator=g) / KEPT
    return x[share], ids[share], probs[share], labels


def model(kind: str) -> nn.Module:
    torch.manual_seed(1)
    return {"ddp": Head, "fsdp": Sharded}.get(kind, OfHidden)()


def gradients_of(kind: str, rank: int) -> dict[str, Tensor]:
    """Those of all processes, from the share of this one."""
    net: nn.Module = model(kind)
    if kind.endswith("ddp"):
        net = nn.parallel.DistributedDataParallel(net)
    else:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (PROCESSES,))
        for part in (net.body, net.out, net):
            fully_shard(part, mesh=mesh)
    net(*batch(kind, slice(rank, None, PROCESSES))).backward()
    return {
        name.removeprefix("module."): p.grad.full_tensor() if kind.endswith("fsdp") else p.grad
        for name, p in net.named_parameters()
    }


def worker(out: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    try:
        for kind in KINDS:
            gradients = gradients_of(kind, dist.get_rank())
            if dist.get_rank() == 0:
                torch.save(gradients, out / kind)
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def gradients(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with those of every kind, by its name."""
    out = tmp_path_factory.mktemp("gradients")
    end_well(forked_world(lambda: worker(out)))
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_give_the_gradient_of_one(kind: str, gradients: Path) -> None:
    alone = model(kind)
    alone(*batch(kind)).backward()
    found = torch.load(gradients / kind, weights_only=True)
    for name, parameter in alone.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-5, atol=1e-7)
