"""AdamW over fp32 trainables, and its learning rate as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from shared.errors import UserError
from train.config import DistillConfig
from train.networks.dtensor import like
from train.objectives import objective_of

POLYNOMIAL_END = 1e-7  # diffusers' lr_end: where a polynomial schedule ends


def build_optimizer(
    config: DistillConfig, parameters: Mapping[str, nn.Parameter]
) -> torch.optim.Optimizer:
    """AdamW, or bitsandbytes' AdamW8bit. Raises UserError where bitsandbytes is not installed."""
    settings: dict[str, Any] = {
        "betas": (config.adam_beta1, config.adam_beta2),
        "weight_decay": config.adam_weight_decay,
        "eps": config.adam_epsilon,
    }
    weights = list(parameters.values())
    if not config.use_8bit_adam:
        return torch.optim.AdamW(weights, **settings, fused=True)  # one pass, no temporaries
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise UserError(
            "--use-8bit-adam wants bitsandbytes; `pip install bitsandbytes`, or leave it out"
        ) from None
    optimizer: torch.optim.Optimizer = AdamW8bit(weights, **settings)
    return optimizer


@dataclass(frozen=True)
class Scaler:
    """What torch's GradScaler keeps."""

    scale: float
    growth_factor: float
    backoff_factor: float
    growth_interval: int
    _growth_tracker: int


def averages_of(optimizer: torch.optim.Optimizer) -> tuple[str, str]:
    """What the optimizer calls its two averages, which have their weight's shape."""
    adamw = isinstance(optimizer, torch.optim.AdamW)
    return ("exp_avg", "exp_avg_sq") if adamw else ("state1", "state2")


def saved(key: str, value: Any) -> Tensor:
    """A value of an optimizer's state as a checkpoint holds it."""
    tensor = torch.as_tensor(value)
    # bitsandbytes shares its tables of 256 numbers between weights; safetensors shares nothing.
    return tensor.clone() if key.startswith("qmap") else tensor


def restored(optimizer: torch.optim.Optimizer, key: str, value: Tensor, weight: Tensor) -> Any:
    """A checkpoint's value of an optimizer's state as the optimizer itself would hold it."""
    if key != "step":  # bitsandbytes' tables have shapes of their own
        # The fused AdamW goes over memory as it lies: averages must lie as their weight.
        return like(weight, value) if value.shape == weight.shape else value.to(weight.device)
    if not isinstance(optimizer, torch.optim.AdamW):
        return int(value)  # bitsandbytes counts in Python
    return value.to(weight.device)


def check_schedule(config: DistillConfig) -> None:
    """Raise UserError for a learning rate that its schedule cannot end below."""
    base = base_learning_rate(config)
    if config.lr_scheduler == "polynomial" and base <= POLYNOMIAL_END:
        raise UserError(
            f"--learning-rate {base:g} is not above {POLYNOMIAL_END:g}, where polynomial ends"
        )


def base_learning_rate(config: DistillConfig, batch_size: int = 1) -> float:
    """The flag, else what the objective uses; with --scale-lr times the samples of a step."""
    rate = config.learning_rate or objective_of(config).learning_rates[config.student]
    return rate * batch_size if config.scale_lr else rate


def partner_learning_rate(config: DistillConfig, batch_size: int = 1) -> float:
    """Likewise that of the network which an objective trains beside the student."""
    partner = objective_of(config).partner
    assert partner is not None
    rate = partner.learning_rate(config)
    return rate * batch_size if config.scale_lr else rate


def set_learning_rate(
    optimizer: torch.optim.Optimizer, base: float, step: int, config: DistillConfig
) -> float:
    """Set and return the rate of optimizer step `step` (1, 2, ...)."""
    rate = base * learning_rate_factor(step, config, base)
    for group in optimizer.param_groups:
        group["lr"] = rate
    return rate


def learning_rate_factor(step: int, config: DistillConfig, base: float) -> float:
    """What optimizer step `step` (1, 2, ...) multiplies the rate `base` by.

    After the warm-up these are the numbers of diffusers.optimization.get_scheduler, which calls
    the first step 0. During it ours is ahead by one step: step s of W has s / W of the rate, where
    diffusers' first step has none at all and does nothing.
    """
    warmup = config.lr_warmup_steps
    if step <= warmup:
        return step / warmup
    done = min((step - 1 - warmup) / max(config.max_train_steps - warmup, 1), 1.0)
    match config.lr_scheduler:
        case "linear":
            return 1 - done
        case "cosine":
            return half_cosine(done)
        case "cosine_with_restarts":
            return half_cosine(config.lr_num_cycles * done % 1.0) if done < 1 else 0.0
        case "polynomial":
            end = POLYNOMIAL_END / base
            return (1 - end) * math.pow(1 - done, config.lr_power) + end
        case _:
            return 1.0


def half_cosine(done: float) -> float:
    """From 1 at 0 to 0 at 1."""
    return 0.5 * (1 + math.cos(math.pi * done))
