"""The optimiser of a run: AdamW, decay on matrices only, its rate set at each step."""

from collections.abc import Iterable

import torch
from torch import nn

from rekindle.train.config import TrainConfig
from rekindle.train.schedules import learning_rate_factor


def adamw(
    parameters: Iterable[nn.Parameter],
    learning_rate: float,
    weight_decay: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> torch.optim.AdamW:
    """Return AdamW for the trained parameters, with weight decay on matrices only.

    It is the fused one: on a CPU the others take twenty times as long, a tenth of a small model's
    step.
    """
    trained = [p for p in parameters if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},  # biases and norms
    ]
    fused = all(p.device.type in ("cuda", "cpu") for p in trained)
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, eps=eps, fused=fused)


def configured_adamw(parameters: Iterable[nn.Parameter], config: TrainConfig) -> torch.optim.AdamW:
    """Return the optimiser of a student's run."""
    rate, decay = config.learning_rate, config.weight_decay
    return adamw(parameters, rate, decay, config.betas, config.eps)


def set_learning_rate(optimizer: torch.optim.Optimizer, config: TrainConfig, step: int) -> float:
    """Set the rate of ``step`` (0-based) and return it: the peak while the head alone is trained,
    then a schedule over the remaining steps.
    """
    head_steps = config.warm_head_steps
    factor, remaining = 1.0, config.steps - head_steps
    if step >= head_steps:
        factor = learning_rate_factor(
            config.schedule, step - head_steps, remaining, config.warmup_steps
        )
    for group in optimizer.param_groups:
        group["lr"] = config.learning_rate * factor
    return config.learning_rate * factor
