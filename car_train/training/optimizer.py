"""Learning rates, what decays, and the layout of an optimizer's moments."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from car_train.training.options import TrainOptions

NOT_DECAYED = ("embedding", "pos_", "level_", "log_scale", "ada_offset")
"""Parts of the names of parameters with two axes or more that don't decay."""


def learning_rate(step: int, options: TrainOptions) -> float:
    """Of optimizer step `step`, from 0: linear warm-up, then the schedule."""
    if step < options.warmup:
        return options.lr * (step + 1) / options.warmup
    done = min((step - options.warmup) / max(1, options.steps - options.warmup), 1.0)
    if options.schedule == "constant":
        share = 1.0
    elif options.schedule == "linear":
        share = min(1.0, (1 - done) / 0.95)
    else:
        share = 0.5 * (1 + math.cos(math.pi * done))
    return options.lr * (0.01 + 0.99 * share)


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices and kernels decay; biases, norms, embeddings, positions, temperatures and the codebook don't."""
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, p in module.named_parameters():
        if p.requires_grad:
            (free if p.ndim < 2 or any(word in name for word in NOT_DECAYED) else decayed).append(p)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]


def match_layout(optimizer: torch.optim.Optimizer) -> None:
    """Lay the moments out as their parameters are: the fused step goes by memory, and a run may change its layout."""
    for p, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == p.shape:
                state[name] = torch.empty_like(p).copy_(value)
