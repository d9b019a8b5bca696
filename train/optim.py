"""AdamW over fp32 trainables, and its learning rate as a pure function of the step."""

from __future__ import annotations

import torch
from torch import nn

from train.config import DistillConfig
from train.objectives import OBJECTIVES


def base_learning_rate(config: DistillConfig) -> float:
    """The flag, else what the objective uses for this kind of student."""
    return config.learning_rate or OBJECTIVES[config.objective].learning_rates[config.student]


def build_optimizer(
    config: DistillConfig, parameters: dict[str, nn.Parameter]
) -> torch.optim.Optimizer:
    """AdamW over fp32 trainables."""
    return torch.optim.AdamW(
        parameters.values(),
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.adam_weight_decay,
        eps=config.adam_epsilon,
    )


def set_learning_rate(
    optimizer: torch.optim.Optimizer, base: float, step: int, config: DistillConfig
) -> float:
    """Set and return the rate of optimizer step `step` (1, 2, ...)."""
    rate = base * learning_rate_factor(step, config)
    for group in optimizer.param_groups:
        group["lr"] = rate
    return rate


def learning_rate_factor(step: int, config: DistillConfig) -> float:
    """A pure function of the step: linear warm-up, then constant, linear or cosine to zero."""
    warmup, total = config.lr_warmup_steps, config.max_train_steps
    if step <= warmup:
        return step / warmup
    done = (step - warmup) / max(total - warmup, 1)
    if config.lr_scheduler == "linear":
        return 1 - done + 1 / max(total - warmup, 1)
    if config.lr_scheduler == "cosine":
        return float(0.5 * (1 + torch.cos(torch.tensor(done * torch.pi))))
    return 1.0
