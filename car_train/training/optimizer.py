"""Learning rates, what decays, and the layout of an optimizer's moments."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from car_train.model import decays
from car_train.training.options import TrainOptions

WARMUP_START, PEAK = 0.005, 0.05
"""Of lin0, as published: the share of the peak that its warm-up starts at, and of the steps that stay at the peak."""


def learning_rate(step: int, options: TrainOptions) -> float:
    """Of optimizer step `step`, from 0: linear warm-up, then the schedule."""
    final = options.final_lr
    if options.schedule == "lin0":
        return options.lr * lin0(step, options.steps, options.warmup, final)
    if step < options.warmup:
        return options.lr * (step + 1) / options.warmup
    done = min((step - options.warmup) / max(1, options.steps - options.warmup), 1.0)
    if options.schedule == "constant":
        share = 1.0
    elif options.schedule == "linear":
        share = min(1.0, (1 - done) / 0.95)
    else:
        share = 0.5 * (1 + math.cos(math.pi * done))
    return options.lr * (final + (1 - final) * share)


def lin0(step: int, steps: int, warmup: int, final: float) -> float:
    """Share of the peak at step 0 … steps − 1 in VAR's published training.

    From `WARMUP_START` to 1 over the warm-up, 1 for `PEAK` of what follows, then linearly to `final` at the last.
    """
    if step < warmup:
        return WARMUP_START + (1 - WARMUP_START) * step / warmup
    done = min((step - warmup) / max(1, steps - 1 - warmup), 1.0)
    return 1.0 if done < PEAK else final + (1 - final) * (1 - done) / (1 - PEAK)


def weight_decay(step: int, options: TrainOptions) -> float:
    """Of optimizer step `step`, from 0: constant, or along half a cosine to `weight_decay_end` at the last step."""
    start, end = options.weight_decay, options.weight_decay_end
    if end is None:
        return start
    done = min(step / max(1, options.steps - 1), 1.0)
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * done))


def parameter_groups(module: nn.Module, decay: float) -> list[dict[str, Any]]:
    """What decays as published (`car_train.model.decays`), and what doesn't; of the trainable parameters."""
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    decayed, free = ([p for name, p in named if decays(name, p) == wanted] for wanted in (True, False))
    return [{"params": decayed, "weight_decay": decay}, {"params": free, "weight_decay": 0.0}]


def match_layout(optimizer: torch.optim.Optimizer) -> None:
    """Lay the moments out as their parameters are: the fused step goes by memory, and a run may change its layout."""
    for p, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == p.shape:
                state[name] = torch.empty_like(p).copy_(value)
