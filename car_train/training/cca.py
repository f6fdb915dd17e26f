"""Condition Contrastive Alignment (CCA, arXiv 2410.09347): a model that needs no guidance.

Fine-tuning of a trained model φ for about one epoch, on its own data. An image x shall be more probable with its own
condition c, and less probable with another one c⁻, than φ has it:

    L = −log σ(β·r(x, c)) − λ·log σ(−β·r(x, c⁻)),   r(x, c) = log pθ(x|c) − log pφ(x|c)          (eq. 8 there)

log p(x|c) is the sum over the tokens of all scales. β says how far θ may leave φ (published: 0.02), λ how much the
mismatch counts: the larger, the more like strong guidance (published for VAR: 50 at d16 and d20, 100 at d24, 1000 at
d30). As in the published code c⁻ is the condition of the next image of the batch, and the loss is divided by
max(λ, 1).

A condition is the class, or the control image: with the control of another image as c⁻ the same loss makes a branch
follow its control without guidance.

Shapes: B images.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from car_train.config import ConfigError
from car_train.model import Model
from car_train.model.vqvae import join_tokens
from car_train.training.options import CCAOptions
from car_train.training.stages import Batch, TransformerStage


def cca_loss(own_B: Tensor, other_B: Tensor, mismatched_B: Tensor, beta: float, weight: float) -> Tensor:
    """L of the module's docstring, mean over the batch, divided by max(λ, 1): f32 [].

    own, other:  r(x, c) and r(x, c⁻), f32.
    mismatched:  bool; where c⁻ is no other condition, or none at all, it counts as a second c with weight 1: so the
                 distribution without a condition is kept too.
    weight:      λ.
    """
    first = F.logsigmoid(beta * own_B)
    second = torch.where(mismatched_B, weight * F.logsigmoid(-beta * other_B), F.logsigmoid(beta * other_B))
    return -(first + second).mean() / max(weight, 1.0)


class CCAStage(TransformerStage):
    """Aligns a base, a branch, or both with their conditions; the model as it was is the reference φ."""

    name = "cca"

    def __init__(self, model: Model, options: CCAOptions):
        """ConfigError: a part or a condition that the model doesn't have."""
        super().__init__(model, drop_path=0.0)  # as published: r would be the noise of dropped blocks
        branch, self.settings = self.car.branch, options
        if branch is None and (options.part in ("branch", "both") or options.negative == "control"):
            raise ConfigError("the model has no control branch; give a run of `python -m car_train car`")
        self.name = "cca"
        self.negative = options.negative or ("class" if branch is None or options.part == "base" else "control")
        parts: dict[str, nn.Module | None] = {"base": self.car.base, "branch": branch, "both": self.car}
        trainable = parts[options.part] if options.part else branch or self.car.base
        assert trainable is not None
        self.trainable = trainable
        model.requires_grad_(False)
        self.reference = copy.deepcopy(self.car).eval()
        trainable.requires_grad_(True)

    def to(self, device: torch.device) -> None:
        super().to(device)
        self.reference.to(device)

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        label, other = batch["label"], batch["label"]
        if self.trainable.training and len(label) < 2:
            raise ConfigError(
                "a batch of 1 has no other condition; give --batch at least 2 per microbatch and process"
            )
        grids, inputs = self._teacher_forcing(batch)
        target, controls = join_tokens(grids), self._controls(batch)
        both = None if controls is None else [torch.cat([c, c]) for c in controls]
        if self.negative == "class":
            other = label.roll(-1)
            mismatched = other != label
        else:
            assert controls is not None
            both = [torch.cat([c, c.roll(-1, 0)]) for c in controls]
            mismatched = (controls[-1] != controls[-1].roll(-1, 0)).flatten(1).any(1)
        if self.trainable.training:
            dropped, none = batch["drop"] < self.car.base.config.label_dropout, self.car.base.config.classes
            label, other = (torch.where(dropped, none, each) for each in (label, other))
            if self.negative == "class":
                mismatched = mismatched & ~dropped
        labels, inputs = torch.cat([label, other]), torch.cat([inputs, inputs])
        mine = log_likelihood(self.car(labels, inputs, both), target)
        with torch.no_grad():
            theirs = log_likelihood(self.reference(labels, inputs, both), target)
        own, rest = (mine - theirs).chunk(2)
        loss = cca_loss(own, rest, mismatched, self.settings.beta, self.settings.weight)
        nats = -mine.detach().chunk(2)[0].mean() / target.shape[1]
        metrics = {"nats": nats, "margin": (own - rest).mean(), "preferred": (own > rest).float().mean()}
        return loss, metrics


def log_likelihood(logits_RLV: Tensor, target_BL: Tensor) -> Tensor:
    """log p of the tokens under R = 2B rows of logits, two per image, summed over an image's tokens: f32 [2B]."""
    target = torch.cat([target_BL, target_BL])
    each = F.cross_entropy(logits_RLV.float().flatten(0, 1), target.flatten(), reduction="none")
    return -each.view(target.shape).sum(1)
