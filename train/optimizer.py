"""The optimiser of a run: AdamW, decay on matrices only, its rate set anew at each step."""

from typing import Any

import torch

from rekindle.train.config import TrainConfig
from rekindle.train.schedules import learning_rate_factor
from rekindle.train.student import Student


def make_optimizer(
    student: Student, config: TrainConfig, device: torch.device
) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only.

    The fused one: on a CPU the others take twenty times as long, a tenth of a small model's step.
    """
    parameters = [p for p in student.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, fused=device.type in ("cuda", "cpu"))


def set_learning_rate(optimizer: torch.optim.Optimizer, config: TrainConfig, step: int) -> float:
    """Set the rate of ``step`` (0-based); returns it."""
    factor = learning_rate_factor(config.schedule, step, config.steps, config.warmup_steps)
    for group in optimizer.param_groups:
        group["lr"] = config.learning_rate * factor
    return config.learning_rate * factor
