"""AdamW on fp32 master weights, and the learning rate as a function of the step."""

from __future__ import annotations

import math

import torch
from torch import nn

from eagle_offline.train_settings import TrainSettings


def build_optimizer(draft_model: nn.Module, settings: TrainSettings) -> torch.optim.AdamW:
    """Return AdamW over the draft's trainable parameters; weight decay spares vectors (norms).

    It is fused: one kernel a step, which changes nothing where the optimizer's ``found_inf`` is 1.
    """
    trainable = [parameter for parameter in draft_model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(settings.beta1, settings.beta2), fused=True)


def learning_rate(step: int, total_steps: int, settings: TrainSettings) -> float:
    """Return the rate of step ``step`` (0-based): linear warm-up, then a cosine down to the final share."""
    warmup = max(1, round(total_steps * settings.warmup_ratio))
    if step < warmup:
        return settings.learning_rate * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    floor = settings.min_learning_rate_ratio
    return settings.learning_rate * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))
