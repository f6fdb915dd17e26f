"""What each stage trains, and its loss: tokenizer (VQVAE), base (VAR), control branch (CAR)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from car_train.config import CARConfig, ModelConfig, VARConfig, VQVAEConfig
from car_train.conventions import ControlConvention
from car_train.model import Model
from car_train.model.car import calibrate_fusion
from car_train.model.sample import control_pyramid, sample
from car_train.model.var import ALNG, initialise
from car_train.model.vqvae import join_tokens, split_tokens
from car_train.sampling import CAR
from car_train.training.distributed import all_batches, any_of_processes, broadcast, mean_over_processes
from car_train.training.losses import PatchDiscriminator, adaptive_weight, generator_loss, hinge_discriminator_loss
from car_train.training.perceptual import Perceptual

REVIVE_EVERY = 100
"""Steps between revivals of unused codes, in the first two thirds of the tokenizer's training. Random codes are
revived after the first step too; trained ones, of which a single batch uses few, are not."""

Batch = dict[str, Tensor]
"""`image` f32 [B, 3, H, W] in [-1, 1] and/or `tokens` int64 [B, L]; `label` int64 [B]; `control` uint8 [B, S, S, 3];
`drop` f32 [B], a uniform number for each image that decides whether its label is dropped."""


class Stage:
    """What one stage trains: subclasses give `loss` and `samples`."""

    name = ""
    """Name of the command that trains it, and of its part of a checkpoint: "vqvae", "var" or "car"."""
    control_type: str | None = None
    convention: ControlConvention | None = None
    """How the control maps are made."""
    takes_tokens = False
    """Whether the loss can do with `tokens` in place of `image`."""

    def __init__(self, model: Model, trainable: nn.Module):
        self.model, self.trainable = model, trainable
        model.requires_grad_(False).eval()
        trainable.requires_grad_(True)

    fresh = False
    """Whether `set_up` is wanted before the first step."""

    def set_up(self, batch: Batch) -> None:
        """Measure what a fresh model has to know of its data, on one batch: the same on every process."""

    def train(self, mode: bool = True) -> None:
        """Training mode, for steps, or eval mode, for all else."""
        self.trainable.train(mode)

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss to minimise and what else to log, of one batch on the device."""
        raise NotImplementedError

    def samples(self, batch: Batch) -> dict[str, Tensor]:
        """What a contact sheet shows of a batch, by name: f32 [B, 3, H, W] in [-1, 1] each."""
        raise NotImplementedError

    def extra_loss(self, step: int) -> tuple[Tensor, dict[str, Tensor]] | None:
        """What an adversary minimises, on the images of the last `loss`; None where there is none (yet)."""
        return None

    adversary: nn.Module | None = None
    """Trained with the model, by `extra_loss` and an optimizer of its own; never part of a checkpoint's model."""
    critic: Any = None
    """The adversary as the trainer wraps it (distributed), for its own update."""

    def to(self, device: torch.device) -> None:
        """Move everything the stage computes with."""
        self.model.to(device)

    def before_step(self, step: int) -> None:
        """Called with the number of the optimizer step to come, from 0."""

    def after_step(self, step: int, steps: int) -> dict[str, float]:
        """Upkeep after an optimizer step; returns what to log."""
        return {}

    def state(self) -> dict[str, Any]:
        """What else a resumed run needs, besides weights and optimizers."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take up the `state` of an earlier run."""


class VQVAEStage(Stage):
    """Tokenizer (VAR eq. 5): L1 + L2 + codebook + β·commitment + λp·perceptual + λg·adversarial.

    perceptual: the network, and its weight λp. adversary: a PatchGAN; its share λg is `adversarial` times the
    adaptive weight, which keeps its gradient at the decoder's last layer as large as that of the other losses, and is
    0 before `adversarial_start`: a critic of noise has nothing to teach.
    """

    name = "vqvae"

    def __init__(
        self,
        model: Model,
        *,
        perceptual: Perceptual | None = None,
        perceptual_weight: float = 1.0,
        adversary: PatchDiscriminator | None = None,
        adversarial_weight: float = 0.5,
        adversarial_start: int = 0,
        untrained: bool = True,
        decoder_only: bool = False,
    ):
        """untrained: the codes are random, and those that the first batch doesn't use are revived at once.

        decoder_only: encoder and codes stay as they are, and with them every image's tokens.
        """
        super().__init__(model, model.vqvae)
        self.untrained, self.decoder_only = untrained, decoder_only
        if decoder_only:
            for part in (model.vqvae.encoder, model.vqvae.quant_conv, model.vqvae.quantizer):
                part.requires_grad_(False)
        self.perceptual, self.perceptual_weight = perceptual, perceptual_weight
        self.adversary, self.adversarial_weight = adversary, adversarial_weight
        self.adversarial_start, self.step = adversarial_start, 0
        config = model.config.vqvae
        self.used_KV = torch.zeros(len(config.sides), config.vocab, dtype=torch.bool)
        self.last_images: Tensor | None = None
        self.last_recon: Tensor | None = None

    def to(self, device: torch.device) -> None:
        super().to(device)
        for module in (self.perceptual, self.adversary):
            if module is not None:
                module.to(device)

    def before_step(self, step: int) -> None:
        self.step = step

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        images, training = batch["image"], self.trainable.training
        recon, quantisation, grids = self.model.vqvae(images)
        recon = recon.float()
        l1, l2 = F.l1_loss(recon, images), F.mse_loss(recon, images)
        metrics = {"l1": l1, "l2": l2, "quantisation": quantisation}
        seen = l1 + l2
        if self.perceptual is not None:
            metrics["perceptual"] = self.perceptual(recon, images)
            seen = seen + self.perceptual_weight * metrics["perceptual"]
        loss = seen if self.decoder_only else seen + quantisation
        if training:
            for used, grid in zip(self.used_KV, grids, strict=True):
                used[grid.unique().cpu()] = True
            self.last_images, self.last_recon = images, recon.detach()
            if self.adversary is not None and self.step >= self.adversarial_start:
                self.adversary.requires_grad_(False)
                fooled = generator_loss(self.adversary(recon))
                last_layer = self.model.vqvae.decoder.conv_out.get_parameter("weight")
                weight = adaptive_weight(seen, fooled, last_layer)
                weight = mean_over_processes(weight)  # one weight for all, as on one process
                loss = loss + self.adversarial_weight * weight * fooled
                metrics |= {"adversarial": fooled, "adaptive": weight}
        mse = F.mse_loss(recon.clamp(-1, 1), images, reduction="none").mean((1, 2, 3))
        metrics["psnr"] = (10 * torch.log10(4 / mse.clamp_min(1e-12))).mean()
        return loss, metrics

    def extra_loss(self, step: int) -> tuple[Tensor, dict[str, Tensor]] | None:
        if self.adversary is None or step < self.adversarial_start:
            return None
        assert self.last_images is not None
        assert self.last_recon is not None
        self.adversary.requires_grad_(True)
        # One pass over both, so that distributed training hooks into a single backward.
        real, fake = self.critic(torch.cat([self.last_images, self.last_recon])).chunk(2)
        loss = hinge_discriminator_loss(real, fake)
        return loss, {"discriminator": loss}

    def after_step(self, step: int, steps: int) -> dict[str, float]:
        if self.decoder_only or (step % REVIVE_EVERY and not (step == 1 and self.untrained)):
            return {}
        quantizer = self.model.vqvae.quantizer
        self.used_KV = any_of_processes(self.used_KV.to(quantizer.embedding.device)).cpu()
        used_V = self.used_KV.any(0)
        log = {"codes_used": used_V.float().mean().item()}
        log |= {f"codes_used_{k}": used.float().mean().item() for k, used in enumerate(self.used_KV)}
        if step < steps * 2 / 3 and self.last_images is not None:
            with torch.no_grad():
                latent = self.model.vqvae.latent(all_batches(self.last_images))
                quantizer.revive(latent, used_V.to(quantizer.embedding.device))
            broadcast(quantizer.embedding.data)  # the first process's draws count
        self.used_KV.zero_()
        return log

    def state(self) -> dict[str, Any]:
        return {"used_KV": self.used_KV}

    def load_state(self, state: dict[str, Any]) -> None:
        self.used_KV = state["used_KV"]

    def samples(self, batch: Batch) -> dict[str, Tensor]:
        return {"reconstruction": self.model.vqvae(batch["image"])[0], "real": batch["image"]}


class TransformerStage(Stage):
    """Next-scale cross-entropy (VAR eq. 6) averaged over all L tokens.

    With a branch, that of CAR (eq. 7) on a frozen base.
    """

    takes_tokens = True

    def __init__(self, model: Model, *, fresh: bool = False, drop_path: float | None = None):
        """fresh: the branch is new, and its fusions are calibrated before the first step (`calibrate_fusion`).

        drop_path: largest rate of stochastic depth, 0 for none; default: the config's.
        """
        assert model.car is not None, "config.var"
        super().__init__(model, model.car.branch or model.car.base)
        self.car = model.car
        self.name = "car" if model.car.branch is not None else "var"
        self.control_type = model.config.car.control_type if model.config.car else None
        self.convention = model.config.car.control_convention if model.config.car else None
        self.fresh = fresh and self.car.branch is not None
        if drop_path is not None:
            self.car.set_drop_path(drop_path)

    def set_up(self, batch: Batch) -> None:
        if (controls := self._controls(batch)) is not None:
            calibrate_fusion(self.car, batch["label"], self._teacher_forcing(batch)[1], controls)

    def train(self, mode: bool = True) -> None:
        """A frozen base drops paths too while its branch trains."""
        self.car.train(mode)

    def _controls(self, batch: Batch) -> list[Tensor] | None:
        if "control" not in batch:
            return None
        controls = list(batch["control"].cpu().numpy())
        return control_pyramids(controls, self.model.config.vqvae, batch["label"].device)

    @torch.no_grad()
    def _teacher_forcing(self, batch: Batch) -> tuple[list[Tensor], Tensor]:
        """Token grids of all scales, and what they make of the transformer's input: f32 [B, L-1, Z]."""
        vqvae = self.model.vqvae
        if "tokens" in batch:
            grids = split_tokens(batch["tokens"], vqvae.config.sides)
        else:
            grids = vqvae.encode(batch["image"])
        with torch.autocast(batch["label"].device.type, enabled=False):
            return grids, vqvae.quantizer.decode(grids)[1]

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        config, label = self.model.config.vqvae, batch["label"]
        grids, inputs = self._teacher_forcing(batch)
        if self.trainable.training:
            dropped = batch["drop"] < self.car.base.config.label_dropout
            label = torch.where(dropped, self.car.base.config.classes, label)
        logits, target = self.car(label, inputs, self._controls(batch)), join_tokens(grids)
        each_BL = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none").view(target.shape)
        hit = (logits.argmax(-1) == target).float()
        last = config.sides[-1] ** 2
        metrics = {"accuracy": hit.mean(), "loss_last": each_BL[:, -last:].mean()}
        return each_BL.mean(), metrics | {"accuracy_last": hit[:, -last:].mean()}

    def samples(self, batch: Batch) -> dict[str, Tensor]:
        config, B = self.model.config.vqvae, len(batch["image"])
        uniforms = torch.rand(B, config.tokens, generator=torch.Generator().manual_seed(0)).to(batch["image"].device)
        controls = self._controls(batch)
        _, drawn = sample(
            self.model.vqvae,
            self.car,
            batch["label"],
            uniforms,
            controls,
            cfg=CAR.cfg,
            top_k=min(CAR.top_k, config.vocab),
            top_p=CAR.top_p,
        )
        given = {"control": controls[-1]} if controls else {}
        return {**given, "drawn": drawn, "real": batch["image"]}


def control_pyramids(
    controls: Sequence[NDArray[np.uint8]], config: VQVAEConfig, device: torch.device | str
) -> list[Tensor]:
    """Control images uint8 [H, W, 3] → what the model takes: for each scale f32 [B, 3, s·f, s·f], s its edge."""
    each = [control_pyramid(Image.fromarray(c), [s * config.patch for s in config.sides]) for c in controls]
    return [torch.cat(scale).to(device) for scale in zip(*each, strict=True)]


class LossModule(nn.Module):
    """A stage's loss as a module's forward: what DistributedDataParallel wraps.

    The parameters are those of the stage's model; an adversary isn't among them.
    """

    def __init__(self, stage: Stage):
        super().__init__()
        self.model, self.stage = stage.model, stage

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        return self.stage.loss(batch)


def new_vqvae(config: VQVAEConfig) -> Model:
    return Model(ModelConfig(vqvae=config))


def add_var(model: Model, config: VARConfig, class_names: tuple[str, ...], alng: float = ALNG) -> Model:
    """A model with a trained tokenizer and a new base, its AdaLN initialised with `alng` (`initialise`)."""
    grown = Model(ModelConfig(vqvae=model.config.vqvae, var=config, class_names=class_names))
    if alng != ALNG:
        assert grown.car is not None
        initialise(grown.car.base, alng)
    grown.vqvae = model.vqvae
    return grown


def add_branch(model: Model, config: CARConfig) -> Model:
    """A model with a trained base and a new branch, initialised from it. A branch that was there is left out.

    Its fusions are to be calibrated on data before training: `TransformerStage(…, fresh=True)`.
    """
    assert model.car is not None, "add_branch needs a base"
    grown = Model(
        ModelConfig(vqvae=model.config.vqvae, var=model.config.var, car=config, class_names=model.config.class_names)
    )
    assert grown.car is not None
    assert grown.car.branch is not None
    grown.vqvae, grown.car.base = model.vqvae, model.car.base
    grown.car.branch.initialise(model.car.base, model.vqvae)
    return grown
