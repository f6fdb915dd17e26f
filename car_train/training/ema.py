"""An exponential moving average of weights: what is validated, kept and shipped, while the raw weights train on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class EMA:
    """The average of a module's trainable parameters, f32: average ← d·average + (1 − d)·parameter after every step.

    decay: in (0, 1); at step n it is at most (1 + n)/(10 + n), so that the random beginning is soon forgotten.
    """

    def __init__(self, module: nn.Module, decay: float):
        self.decay = decay
        self.parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.average = {name: p.detach().float().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take up the parameters after optimizer step `step`, from 1."""
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.average.values()), [p.float() for p in self.parameters.values()], weight)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within, the module's parameters are the average."""
        raw = self.raw()
        self._put(self.average)
        try:
            yield
        finally:
            self._put(raw)

    def raw(self) -> dict[str, Tensor]:
        """Copies of the parameters as they are being trained."""
        return {name: p.detach().clone() for name, p in self.parameters.items()}

    def load(self, raw: dict[str, Tensor]) -> None:
        """Resume: take the average from the module, as a checkpoint brought it, and put `raw` in its place."""
        self.average = {name: p.detach().float().clone() for name, p in self.parameters.items()}
        self._put(raw)

    @torch.no_grad()
    def _put(self, values: dict[str, Tensor]) -> None:
        for name, p in self.parameters.items():
            p.copy_(values[name])
