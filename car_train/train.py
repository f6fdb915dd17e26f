"""One training loop, three stages: tokenizer (VQVAE), base (VAR), control branch (CAR).

A stage says what is trained and what its loss is. Everything random follows from the seed: order of pictures,
augmentation, dropout. A run continues from its newest checkpoint.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from . import checkpoint
from .config import CARConfig, ConfigError, ModelConfig, VARConfig, VQVAEConfig
from .data import ControlledImages
from .model import Model
from .sample import control_pyramid, sample
from .vqvae import join_tokens

REVIVE_EVERY = 100
"""Steps between revivals of unused codes, in the first two thirds of the tokenizer's training."""


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """How to train; what to train is the stage's."""

    data: Path
    output: Path
    steps: int = 5000
    batch: int = 32
    lr: float = 1e-4
    """Peak learning rate, as is (the papers' is per 256 pictures)."""
    warmup: int = 200
    weight_decay: float = 0.05
    clip: float = 2.0
    seed: int = 0
    bf16: bool = False
    """Autocast to bfloat16."""
    channels_last: bool = True
    workers: int = 1
    threads: int = 0
    """CPU threads, 0 = all."""
    device: str = "cpu"
    augment: bool = True
    preload: bool = True
    """Keep all pictures decoded in memory: 64 KB each at 64 pixels, 1 MB at 256."""
    control_root: Path | None = None
    validate_every: int = 500
    save_every: int = 500
    keep: int = 2
    """Checkpoints kept of one run."""

    def __post_init__(self) -> None:
        for field in ("steps", "batch", "validate_every", "save_every", "keep"):
            if getattr(self, field) < 1:
                raise ConfigError(f"{field} is {getattr(self, field)}; it must be at least 1")
        for field in ("warmup", "weight_decay", "seed", "workers", "threads"):
            if not getattr(self, field) >= 0:
                raise ConfigError(f"{field} is {getattr(self, field)}; it must be at least 0")
        if not 0 < self.lr < math.inf:
            raise ConfigError(f"lr is {self.lr}; it must be positive")
        try:
            torch.empty(0, device=self.device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(
                f"device {self.device!r} can't be used ({reason}); give cpu, or cuda with a GPU"
            ) from error


class Stage:
    """What one stage trains: subclasses give `loss` and `picture`."""

    control_type: str | None = None

    def __init__(self, model: Model, trainable: nn.Module):
        self.model, self.trainable = model, trainable
        model.requires_grad_(False).eval()
        trainable.requires_grad_(True)

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss to minimise and what else to log, of one batch on the device."""
        raise NotImplementedError

    def picture(self, batch: dict[str, Tensor]) -> list[Tensor]:
        """Rows of a sample sheet, each f32 [B, 3, H, W] in [-1, 1]."""
        raise NotImplementedError

    def after_step(self, step: int, steps: int) -> dict[str, float]:
        """Upkeep after an optimizer step; returns what to log."""
        return {}

    def state(self) -> dict[str, Tensor]:
        """What else a resumed run needs, besides weights and optimizer."""
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take up the `state` of an earlier run."""


class VQVAEStage(Stage):
    """Tokenizer (VAR eq. 5 without its perceptual and adversarial terms): L1 + L2 + codebook + β·commitment."""

    def __init__(self, model: Model):
        super().__init__(model, model.vqvae)
        self.used_V = torch.zeros(model.config.vqvae.vocab, dtype=torch.bool)
        self.last_images: Tensor | None = None

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        images = batch["image"]
        recon, quantisation, grids = self.model.vqvae(images)
        recon = recon.float()
        l1, l2 = F.l1_loss(recon, images), F.mse_loss(recon, images)
        if self.trainable.training:
            self.used_V[join_tokens(grids).unique().cpu()] = True
            self.last_images = images
        psnr = 10 * torch.log10(4 / F.mse_loss(recon.clamp(-1, 1), images))
        return l1 + l2 + quantisation, {"l1": l1, "l2": l2, "quantisation": quantisation, "psnr": psnr}

    def after_step(self, step: int, steps: int) -> dict[str, float]:
        if step != 1 and step % REVIVE_EVERY:
            return {}
        usage = self.used_V.float().mean().item()
        if step < steps * 2 / 3 and self.last_images is not None:
            latent = self.model.vqvae.latent(self.last_images).detach()
            self.model.vqvae.quantizer.revive(latent, self.used_V.to(latent.device))
        self.used_V.zero_()
        return {"codes_used": usage}

    def state(self) -> dict[str, Tensor]:
        return {"used_V": self.used_V}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.used_V = state["used_V"]

    def picture(self, batch: dict[str, Tensor]) -> list[Tensor]:
        return [batch["image"], self.model.vqvae(batch["image"])[0].float().clamp(-1, 1)]


class TransformerStage(Stage):
    """Next-scale cross-entropy (VAR eq. 6) averaged over all L tokens.

    With a branch, that of CAR (eq. 7) on a frozen base.
    """

    def __init__(self, model: Model):
        assert model.car is not None, "config.var"
        super().__init__(model, model.car.branch or model.car.base)
        self.car = model.car
        self.control_type = model.config.car.control_type if model.config.car else None

    def _controls(self, batch: dict[str, Tensor]) -> list[Tensor] | None:
        if "control" not in batch:
            return None
        config, device = self.model.config.vqvae, batch["image"].device
        pyramids = [
            control_pyramid(Image.fromarray(c.numpy()), [s * config.patch for s in config.sides])
            for c in batch["control"].cpu()
        ]
        return [torch.cat(scale).to(device) for scale in zip(*pyramids, strict=True)]

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.no_grad():
            grids = self.model.vqvae.encode(batch["image"])
            with torch.autocast(batch["image"].device.type, enabled=False):
                inputs = self.model.vqvae.quantizer.decode(grids)[1]
        label = batch["label"]
        if self.trainable.training:
            drop = torch.rand(label.shape, device=label.device) < self.car.base.config.label_dropout
            label = torch.where(drop, self.car.base.config.classes, label)
        logits, target = self.car(label, inputs, self._controls(batch)), join_tokens(grids)
        loss = F.cross_entropy(logits.flatten(0, 1), target.flatten())
        last = self.model.config.vqvae.sides[-1] ** 2
        hit = (logits.argmax(-1) == target).float()
        return loss, {"accuracy": hit.mean(), "accuracy_last": hit[:, -last:].mean()}

    def picture(self, batch: dict[str, Tensor]) -> list[Tensor]:
        config, B = self.model.config.vqvae, len(batch["image"])
        uniforms = torch.rand(B, config.tokens, generator=torch.Generator().manual_seed(0)).to(batch["image"].device)
        controls = self._controls(batch)
        _, drawn = sample(
            self.model.vqvae,
            self.car,
            batch["label"],
            uniforms,
            controls,
            cfg=2.0,
            top_k=config.vocab // 4,
            top_p=0.9,
        )
        return ([controls[-1]] if controls else []) + [drawn, batch["image"]]


def new_vqvae(config: VQVAEConfig) -> Model:
    return Model(ModelConfig(vqvae=config))


def add_var(model: Model, config: VARConfig, class_names: tuple[str, ...]) -> Model:
    """A model with a trained tokenizer and a new base."""
    grown = Model(ModelConfig(vqvae=model.config.vqvae, var=config, class_names=class_names))
    grown.vqvae = model.vqvae
    return grown


def add_branch(model: Model, config: CARConfig) -> Model:
    """A model with a trained base and a new branch, initialised from it. A branch that was there is left out."""
    assert model.car is not None, "add_branch needs a base"
    grown = Model(
        ModelConfig(vqvae=model.config.vqvae, var=model.config.var, car=config, class_names=model.config.class_names)
    )
    assert grown.car is not None
    assert grown.car.branch is not None
    grown.vqvae, grown.car.base = model.vqvae, model.car.base
    grown.car.branch.initialise(model.car.base)
    return grown


def learning_rate(step: int, options: TrainOptions) -> float:
    """Linear warm-up, then a cosine down to 1 % of the peak."""
    if step < options.warmup:
        return options.lr * (step + 1) / options.warmup
    done = (step - options.warmup) / max(1, options.steps - options.warmup)
    return options.lr * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(done, 1))))


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices and kernels decay; biases, norms, embeddings, positions, temperatures and the codebook don't."""
    exempt = ("embedding", "pos_", "level_", "log_scale", "ada_offset")
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, p in module.named_parameters():
        (free if p.ndim < 2 or any(word in name for word in exempt) else decayed).append(p)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]


class Trainer:
    """The loop around a stage: order, optimizer, precision, logs, checkpoints."""

    def __init__(self, stage: Stage, options: TrainOptions):
        self.stage, self.options, self.device = stage, options, torch.device(options.device)
        if options.threads:
            torch.set_num_threads(options.threads)
        size = stage.model.config.vqvae.image_size
        common: dict[str, Any] = {
            "control_type": stage.control_type,
            "control_root": options.control_root,
            "seed": options.seed,
            "preload": options.preload,
        }
        options.output.mkdir(parents=True, exist_ok=True)  # a folder that can't be made is better known at once
        self.data = ControlledImages(options.data, size, split="train", augment=options.augment, **common)
        self.val = ControlledImages(options.data, size, split="val", **common)
        self._check_classes()
        stage.model.to(self.device)
        if options.channels_last:
            # torch's stubs leave out the overload with a memory format alone.
            stage.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.optimizer = torch.optim.AdamW(
            parameter_groups(stage.trainable, options.weight_decay), lr=options.lr, betas=(0.9, 0.95)
        )
        self.step = 0

    def _check_classes(self) -> None:
        names, config = self.data.class_names, self.stage.model.config
        if config.var is not None and len(names) != config.var.classes:
            raise ConfigError(
                f"{self.options.data} has {len(names)} classes, the model {config.var.classes}; "
                "give a folder whose sorted class folders are the model's classes"
            )
        if config.class_names is not None and tuple(names) != config.class_names:
            raise ConfigError(
                f"{self.options.data} has classes {names[:3]}…, the model {list(config.class_names[:3])}…; "
                "train on the data set of the base"
            )

    def resume(self) -> None:
        """Continue from the newest checkpoint of the run; CheckpointError if its config is another one."""
        path = checkpoint.locate(self.options.output)
        loaded, state = checkpoint.load(path), checkpoint.load_trainer(path)
        if loaded.config != self.stage.model.config:
            raise checkpoint.CheckpointError(
                f"{path}: was trained with another config; give the same model options, or another output folder"
            )
        mine = checkpoint.parts(self.stage.model)
        for name, module in checkpoint.parts(loaded).items():
            mine[name].load_state_dict(module.state_dict())
        self.optimizer.load_state_dict(state["optimizer"])
        self.stage.load_state(state["stage"])
        torch.set_rng_state(state["rng"])
        if "cuda_rng" in state and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_rng"], self.device)
        self.step = state["step"]

    def save(self) -> Path:
        state = {"step": self.step, "optimizer": self.optimizer.state_dict(), "rng": torch.get_rng_state()}
        state["stage"] = self.stage.state()
        if self.device.type == "cuda":
            state["cuda_rng"] = torch.cuda.get_rng_state(self.device)
        path = checkpoint.save(self.stage.model, self.options.output / f"step-{self.step:07d}", state)
        for old in sorted(self.options.output.glob("step-*"))[: -self.options.keep]:
            checkpoint.remove(old)
        return path

    def batches(self) -> Iterator[dict[str, Tensor]]:
        """Batches from the current step on: epoch after epoch in an order that (seed, epoch) decides."""
        per_epoch = len(self.data) // self.options.batch
        if per_epoch == 0:
            raise ConfigError(
                f"batch is {self.options.batch}, but there are {len(self.data)} training pictures; make it smaller"
            )
        epoch, skip = divmod(self.step, per_epoch)
        while True:
            order = torch.randperm(
                len(self.data), generator=torch.Generator().manual_seed(self.options.seed * 100_003 + epoch)
            ).tolist()
            self.data.set_epoch(epoch)
            groups = [order[i * self.options.batch : (i + 1) * self.options.batch] for i in range(skip, per_epoch)]
            # A generator of its own: a loader draws from the global one, which a resumed run must find as it was.
            generator = torch.Generator().manual_seed(self.step)
            yield from DataLoader(
                self.data, batch_sampler=groups, num_workers=self.options.workers, generator=generator
            )
            epoch, skip = epoch + 1, 0

    def _to_device(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        image = batch["image"].to(self.device)
        if self.options.channels_last:
            image = image.contiguous(memory_format=torch.channels_last)
        return {**{k: v.to(self.device) for k, v in batch.items() if k != "image"}, "image": image}

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.options.bf16)

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Mean loss and metrics over the validation split; writes a sample sheet."""
        sums: dict[str, float] = {}
        count, first = 0, None
        for batch in DataLoader(self.val, batch_size=self.options.batch, generator=torch.Generator()):
            batch = self._to_device(batch)
            first = first or batch
            with self._autocast():
                loss, metrics = self.stage.loss(batch)
            for name, value in {"loss": loss, **metrics}.items():
                sums[name] = sums.get(name, 0.0) + value.item() * len(batch["image"])
            count += len(batch["image"])
        assert first is not None
        with self._autocast():
            rows = self.stage.picture({k: v[:16] for k, v in first.items()})
        sheet(rows).save(self.options.output / f"samples-{self.step:07d}.png")
        return {f"val_{name}": value / count for name, value in sums.items()}

    def run(self) -> Path:
        """Train to the last step; returns the last checkpoint."""
        options, stage = self.options, self.stage
        log = (options.output / "log.jsonl").open("a", encoding="utf-8")
        bar = tqdm(total=options.steps, initial=self.step, unit="step", dynamic_ncols=True, disable=None)
        began, path = time.monotonic(), self.options.output
        with log, bar:
            stage.trainable.train()
            for batch in self.batches():
                if self.step >= options.steps:
                    break
                record = self._train_step(self._to_device(batch))
                bar.update()
                bar.set_postfix({k: f"{v:.3g}" for k, v in record.items() if k != "lr"}, refresh=False)
                done = self.step == options.steps
                if done or self.step % options.validate_every == 0:
                    stage.trainable.eval()
                    record |= self.validate()
                    stage.trainable.train()
                    tqdm.write(
                        f"step {self.step}: " + "  ".join(f"{k} {v:.4g}" for k, v in record.items()), file=sys.stderr
                    )
                if done or self.step % options.save_every == 0:
                    path = self.save()
                log.write(
                    json.dumps({"step": self.step, "seconds": round(time.monotonic() - began, 2), **record}) + "\n"
                )
                log.flush()
        return path

    def _train_step(self, batch: dict[str, Tensor]) -> dict[str, float]:
        lr = learning_rate(self.step, self.options)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        with self._autocast():
            loss, metrics = self.stage.loss(batch)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.stage.trainable.parameters(), self.options.clip)
        self.optimizer.step()
        self.step += 1
        extra = self.stage.after_step(self.step, self.options.steps)
        return {"loss": loss.item(), **{k: v.item() for k, v in metrics.items()}, **extra, "lr": lr}


def sheet(rows: list[Tensor]) -> Image.Image:
    """A contact sheet: one picture per column, one tensor f32 [B, 3, H, W] in [-1, 1] per row."""
    grid = torch.cat([torch.cat(list(row.detach().float().cpu()), 2) for row in rows], 1)
    return Image.fromarray(((grid.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy())


def seed_everything(seed: int) -> None:
    """Before a model is made: its initial weights follow from the seed too."""
    torch.manual_seed(seed)
