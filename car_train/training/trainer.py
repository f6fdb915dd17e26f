"""One training loop for all three stages, on one process or, under `torchrun`, on many.

Everything random follows from the seed: order of images, augmentation, dropped labels, dropout. A run continues
from its newest checkpoint; on one process and a CPU, stopped and resumed equals never stopped, bit for bit.

A run's folder:

    run.json              stage, options, config, sizes, versions
    log.jsonl             one object a step; validation figures now and then, as `val_…`
    samples-0000500.png   a contact sheet: control, drawn or reconstructed, real
    step-0000500/         a checkpoint; its weights are the EMA, where there is one
    tensorboard/          with `tensorboard`

`batch` is what one optimizer step sees, over all processes and microbatches: the same command on two processes, or
with `grad_accum`, takes the same steps up to rounding.
"""

from __future__ import annotations

import json
import math
import platform
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from car_train import checkpoint
from car_train.config import ConfigError
from car_train.data.dataset import ControlledImages
from car_train.data.folder import scan, shown
from car_train.errors import UserError
from car_train.files import remove_folder
from car_train.images import contact_sheet, save_png, to_pixels
from car_train.model.car import ConvBlock
from car_train.model.var import Block
from car_train.model.vqvae import Decoder, Encoder, ResBlock
from car_train.training.distributed import World, without_exchange
from car_train.training.ema import EMA
from car_train.training.logger import RunLogger
from car_train.training.optimizer import learning_rate, match_layout, parameter_groups, weight_decay
from car_train.training.options import FREE, RENAMED, TrainOptions
from car_train.training.stages import LossModule, Stage
from car_train.training.token_cache import CachedTokens, open_cache

CHECK_IMAGES = 4
"""Validation images whose loss must be finite before a model is saved."""
SET_UP_IMAGES = 16
"""Images that a fresh stage is set up on; at 256×256 they have 10,880 tokens to measure deviations of."""


FIRST_SCALE, LARGEST_SCALE, SCALE_STEPS = 2.0**11, 2.0**15, 1000
"""Of fp16's gradients, as published: the scale at first, at most, and after how many good steps it doubles."""


class TrainingError(UserError, RuntimeError):
    """Training can't go on; the message says why and ends with the remedy."""


class Trainer:
    """The loop around a stage: order, optimizers, precision, EMA, logs, checkpoints."""

    def __init__(self, stage: Stage, options: TrainOptions):
        self.world, device = World.join(options.device)
        self.stage, self.options, self.device = stage, options, torch.device(device)
        shares = self.world.size * options.grad_accum
        if options.batch % shares:
            raise ConfigError(
                f"batch {options.batch} can't be split over {self.world.size} processes × grad_accum "
                f"{options.grad_accum}; give a multiple of {shares}"
            )
        if options.threads:
            torch.set_num_threads(options.threads)
        options.output.mkdir(parents=True, exist_ok=True)  # a folder that can't be made is better known at once
        size = stage.model.config.vqvae.image_size
        self.images, self.val_images = self._images(size)
        self._check_classes()
        if len(self.val_images) < self.world.size:
            raise ConfigError(
                f"{len(self.val_images)} validation images for {self.world.size} processes; use fewer processes"
            )
        stage.to(self.device)
        if options.channels_last:
            # torch's stubs leave out the overload with a memory format alone.
            stage.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._set_up_blocks()
        self.data, self.val = self._datasets()
        self.per_epoch = len(self.data) // options.batch
        if self.per_epoch == 0:
            raise ConfigError(
                f"batch is {options.batch}, but there are {len(self.data)} training images; make it smaller"
            )
        if options.epochs is not None:
            self.options = replace(options, steps=max(1, round(options.epochs * self.per_epoch)))
        if stage.fresh:
            stage.set_up(self._spread(self.data, SET_UP_IMAGES))
        self._set_up_optimizers()
        self.ema = EMA(stage.trainable, options.ema) if options.ema else None
        self.step = 0
        if self.world.rank:
            torch.manual_seed(options.seed + self.world.rank)  # stochastic depth differs between the processes

    def _images(self, size: int) -> tuple[ControlledImages, ControlledImages]:
        """What is trained and what is validated on; lists both on stderr."""
        options, stage = self.options, self.stage
        common: dict[str, Any] = {
            "control_type": stage.control_type,
            "convention": stage.convention,
            "fit": options.fit,
            "seed": options.seed,
            "preload": options.preload,
            "classes": options.classes,
        }
        folder = scan(options.data)
        own = options.val is not None
        val = folder if options.val is None else scan(options.val, folder.class_names)
        if not self.world.rank:
            for found in (folder, val) if own else (folder,):
                for line in found.listing(own):
                    print(f"{shown(found.root)}: {line}", file=sys.stderr)
        train_split, val_split = ("all", "all") if own else ("train", "val")
        roots = (options.control_root, options.val_control_root if own else options.control_root)
        return (
            ControlledImages(
                folder,
                size,
                split=train_split,
                control_root=roots[0],
                augment=options.augment,
                flip=options.flip,
                drop_strokes=options.drop_strokes,
                **common,
            ),
            ControlledImages(val, size, split=val_split, control_root=roots[1], **common),
        )

    def _check_classes(self) -> None:
        names, config = self.images.class_names, self.stage.model.config
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

    def _set_up_blocks(self) -> None:
        for module in self.stage.model.modules():
            if isinstance(module, Block | ResBlock):
                module.activation_checkpointing = self.options.activation_checkpointing
            if self.options.compile and isinstance(module, Block | ConvBlock | Encoder | Decoder):
                module.compile()

    def _datasets(self) -> tuple[ControlledImages | CachedTokens, ControlledImages | CachedTokens]:
        """What is trained and validated on: images, or their tokens where the stage takes these."""
        options = self.options
        if not (self.stage.takes_tokens and options.token_cache):
            return self.images, self.val_images

        def encode(images: Tensor) -> list[Tensor]:
            with self._autocast():
                return self.stage.model.vqvae.encode(self._to_device({"image": images})["image"])

        def cached(images: ControlledImages) -> CachedTokens:
            cache = open_cache(
                images,
                self.stage.model.vqvae,
                views=options.views,
                root=options.token_root,
                precision=options.precision,
                encode=encode,
            )
            return CachedTokens(images, cache)

        if self.world.rank:  # the first process makes the caches, the others find them
            self.world.barrier()
        data = cached(self.images), cached(self.val_images)
        if not self.world.rank:
            self.world.barrier()
        return data

    def _set_up_optimizers(self) -> None:
        options, stage = self.options, self.stage
        settings: dict[str, Any] = {"lr": options.lr, "betas": (0.9, 0.95), "fused": True}
        self.optimizers = [torch.optim.AdamW(parameter_groups(stage.trainable, options.weight_decay), **settings)]
        self.loss_module = self.world.wrap(LossModule(stage), self.device)
        if stage.adversary is not None:
            # Betas of the GAN literature: the critic's target moves.
            self.optimizers.append(torch.optim.AdamW(stage.adversary.parameters(), lr=options.lr, betas=(0.5, 0.9)))
            stage.critic = self.world.wrap(stage.adversary, self.device)
        self.scaler = torch.amp.GradScaler(
            self.device.type,
            init_scale=FIRST_SCALE,
            growth_interval=SCALE_STEPS,
            enabled=options.precision == "fp16",
        )

    # --- state -----------------------------------------------------------------------------------------------------

    def resume(self) -> None:
        """Continue from the newest checkpoint of the run; CheckpointError if its config is another one."""
        path = checkpoint.locate(self.options.output)
        loaded, state = checkpoint.load(path), checkpoint.load_trainer(path)
        if loaded.config != self.stage.model.config:
            raise checkpoint.CheckpointError(
                f"{path}: was trained with another config; give the same model options, or another output folder"
            )
        mine = checkpoint.modules(self.stage.model)
        for name, module in checkpoint.modules(loaded).items():
            mine[name].load_state_dict(module.state_dict())
        try:
            self._take_up(state)
        except (KeyError, ValueError, IndexError, TypeError, AttributeError, RuntimeError) as error:
            raise checkpoint.CheckpointError(
                f"{path}: its training state doesn't fit these options ({error}); resume with those it had before"
            ) from error

    def _take_up(self, state: dict[str, Any]) -> None:
        if (self.ema is not None) != ("raw" in state):
            raise ValueError("ema was switched on or off")
        if self.ema is not None:
            self.ema.load({name: p.to(self.device) for name, p in state["raw"].items()})
        if len(state["optimizers"]) != len(self.optimizers):
            raise ValueError("the adversarial loss was switched on or off")
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
            match_layout(optimizer)
        if self.stage.adversary is not None:
            self.stage.adversary.load_state_dict(state["adversary"])
        self.scaler.load_state_dict(state["scaler"])
        self.stage.load_state(state["stage"])
        if self.world.rank < len(state["rng"]):  # more processes than before: the new ones keep their own seed
            rng = state["rng"][self.world.rank]
            torch.set_rng_state(rng["cpu"])
            if "cuda" in rng and self.device.type == "cuda":
                torch.cuda.set_rng_state(rng["cuda"], self.device)
        self.step = state["step"]
        self._warn_of_changes(state["options"])

    def _warn_of_changes(self, before: dict[str, Any]) -> None:
        """Warn of options that differ from those the run was started with, where they change what is computed."""
        before = {RENAMED.get(k, k): v for k, v in before.items()}
        now = json.loads(json.dumps(self.options.to_json() | {"files": self.images.fingerprint()}))
        known = before.keys() & now.keys() - FREE  # an option that an earlier version lacked can't have changed
        changed = [f"{k} {before[k]!r} → {now[k]!r}" for k in now if k in known and before[k] != now[k]]
        if changed and not self.world.rank:
            warnings.warn(
                f"resumed at step {self.step} with other options than before: {'; '.join(changed)}; the run goes on, "
                "but it is not the one that would have been without the stop",
                stacklevel=3,
            )

    def save(self) -> Path:
        """Write a checkpoint; older ones than the `keep` newest go once it is whole.

        TrainingError: the model is broken (`_refuse_broken`); what was saved before stays.
        """
        self._refuse_broken()
        rng: dict[str, Tensor] = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.device)
        everyone = self.world.gather(rng)
        path = self.options.output / f"step-{self.step:07d}"
        if self.world.rank == 0:
            state = {
                "step": self.step,
                "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
                "scaler": self.scaler.state_dict(),
                "rng": everyone,
                "stage": self.stage.state(),
                "options": self.options.to_json() | {"files": self.images.fingerprint()},
            }
            if self.stage.adversary is not None:
                state["adversary"] = self.stage.adversary.state_dict()
            with ExitStack() as stack:
                if self.ema is not None:
                    state["raw"] = self.ema.raw()
                    stack.enter_context(self.ema.applied())
                checkpoint.save(self.stage.model, path, state)
            for old in checkpoint.of_run(self.options.output)[: -self.options.keep]:
                remove_folder(old)
        self.world.barrier()
        return path

    @torch.no_grad()
    def _refuse_broken(self) -> None:
        """TrainingError where what would be saved, or the loss that it computes, is not finite."""
        trained: dict[str, Any] = {"weights": dict(self.stage.trainable.named_parameters())}
        trained["optimizer"] = [list(optimizer.state.values()) for optimizer in self.optimizers]
        if self.ema is not None:
            trained["average"] = self.ema.average
        broken = checkpoint.not_finite(checkpoint.tensors_of(trained))
        if broken is None:
            self.stage.train(False)
            with ExitStack() as stack:
                if self.ema is not None:
                    stack.enter_context(self.ema.applied())
                stack.enter_context(self._autocast())
                loss, metrics = self.stage.loss(self._spread(self.val, CHECK_IMAGES))
            self.stage.train()
            broken = checkpoint.not_finite({"validation loss": loss, **metrics}.items())
        if any(self.world.gather(broken is not None)):
            raise TrainingError(
                f"step {self.step} broke the model ({broken or 'on another process'} is not finite): not saved; "
                f"{self._remedy()}"
            )

    def _remedy(self) -> str:
        """What helps a run whose numbers became too large."""
        saved = checkpoint.of_run(self.options.output)
        start = f"resume from {saved[-1].name} (--resume)" if saved else "start again"
        return (
            f"{start} with a lower lr than {self.options.lr:g} (--lr), a longer warm-up (--warmup), or another "
            f"--precision than {self.options.precision}"
        )

    # --- data ------------------------------------------------------------------------------------------------------

    def batches(self) -> Iterator[dict[str, Tensor]]:
        """This process's microbatches from the current step on.

        Epoch after epoch in an order that (seed, epoch) decides; `grad_accum` items make one batch.
        """
        options, world = self.options, self.world
        micro = options.batch // (world.size * options.grad_accum)
        mine = [(m * world.size + world.rank) * micro for m in range(options.grad_accum)]
        epoch, skip = divmod(self.step, self.per_epoch)
        step = self.step
        while True:
            order = torch.randperm(
                len(self.data), generator=torch.Generator().manual_seed(options.seed * 100_003 + epoch)
            ).tolist()
            self.data.set_epoch(epoch)
            groups = [order[i * options.batch + m :][:micro] for i in range(skip, self.per_epoch) for m in mine]
            # A generator of its own: a loader draws from the global one, which a resumed run must find as it was.
            generator = torch.Generator().manual_seed(step)
            loader = DataLoader(self.data, batch_sampler=groups, num_workers=options.workers, generator=generator)
            for i, batch in enumerate(loader):
                if i % options.grad_accum == 0:
                    drop = torch.rand(options.batch, generator=_generator(options.seed, step))
                    step += 1
                at = mine[i % options.grad_accum]
                yield batch | {"drop": drop[at : at + micro]}
            epoch, skip = epoch + 1, 0

    def _to_device(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        moved = {k: v.to(self.device) for k, v in batch.items()}
        if "image" in moved and self.options.channels_last:
            moved["image"] = moved["image"].contiguous(memory_format=torch.channels_last)
        return moved

    def _autocast(self) -> torch.autocast:
        dtype = torch.float16 if self.options.precision == "fp16" else torch.bfloat16
        return torch.autocast(self.device.type, dtype, enabled=self.options.precision != "fp32")

    # --- the loop --------------------------------------------------------------------------------------------------

    def run(self) -> Path:
        """Train to the last step; returns the last checkpoint.

        TrainingError: the loss is no number any more. What was saved before stays.
        """
        options, stage = self.options, self.stage
        path = options.output
        with ExitStack() as stack:
            logger = stack.enter_context(self._logger()) if self.world.rank == 0 else None
            stage.train()
            batches = self.batches()
            while self.step < options.steps:
                record = self._train_step(batches)
                done = self.step == options.steps
                if done or self.step % options.validate_every == 0:
                    record |= self.validate()
                if logger is not None:
                    logger.write(self.step, record)
                if done or self.step % options.save_every == 0:
                    path = self.save()
        return path

    def _logger(self) -> RunLogger:
        options, model = self.options, self.stage.model
        trained = sum(p.numel() for p in self.stage.trainable.parameters() if p.requires_grad)
        facts = {
            "format": 1,
            "stage": self.stage.name,
            "options": options.to_json(),
            "config": json.loads(model.config.to_json()),
            "pictures": {"train": len(self.images), "val": len(self.val_images)},
            "parameters": {"total": sum(p.numel() for p in model.parameters()), "trainable": trained},
            "processes": self.world.size,
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
        }
        return RunLogger(options.output, facts, step=self.step, steps=options.steps, tensorboard=options.tensorboard)

    def _train_step(self, batches: Iterator[dict[str, Tensor]]) -> dict[str, float]:
        """One optimizer step; returns what to log, the mean over the batch."""
        options, stage = self.options, self.stage
        lr = learning_rate(self.step, options)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.zero_grad(set_to_none=True)
        self.optimizers[0].param_groups[0]["weight_decay"] = weight_decay(self.step, options)
        stage.before_step(self.step)
        record: dict[str, float] = {}
        for m in range(options.grad_accum):
            last = m + 1 == options.grad_accum
            for name, value in self._microbatch(self._to_device(next(batches)), last).items():
                record[name] = record.get(name, 0.0) + value.item() / options.grad_accum
        if not math.isfinite(record["loss"]):
            raise TrainingError(f"the loss is {record['loss']} at step {self.step + 1}; {self._remedy()}")
        for optimizer in self.optimizers:
            grads = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            if grads:
                self.scaler.unscale_(optimizer)
                norm = nn.utils.clip_grad_norm_(grads, options.grad_clip)
                if optimizer is self.optimizers[0]:
                    record["grad_norm"] = norm.item()
                self.scaler.step(optimizer)
        self.scaler.update()
        if self.scaler.get_scale() > LARGEST_SCALE:
            self.scaler.update(LARGEST_SCALE)
        self.step += 1
        extra = stage.after_step(self.step, options.steps)
        if self.ema is not None:
            self.ema.update(self.step)
        return self.world.mean(record, self.device) | extra | {"lr": lr}

    def _microbatch(self, batch: dict[str, Tensor], last: bool) -> dict[str, Tensor]:
        """Forward and backward of one microbatch; gradients are exchanged with the last one."""
        with without_exchange(self.loss_module, last):
            with self._autocast():
                loss, metrics = self.loss_module(batch)
            self.scaler.scale(loss / self.options.grad_accum).backward()
        with without_exchange(self.stage.critic, last):
            with self._autocast():
                extra = self.stage.extra_loss(self.step)
            if extra is not None:
                self.scaler.scale(extra[0] / self.options.grad_accum).backward()
                metrics = metrics | extra[1]
        return {"loss": loss.detach(), **{k: v.detach() for k, v in metrics.items()}}

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Mean loss and metrics over the validation split, with the averaged weights; writes a sample sheet."""
        self.stage.train(False)
        sums: dict[str, float] = {}
        with ExitStack() as stack:
            if self.ema is not None:
                stack.enter_context(self.ema.applied())
            share = Subset(self.val, range(self.world.rank, len(self.val), self.world.size))
            micro = self.options.batch // (self.world.size * self.options.grad_accum)
            for batch in DataLoader(share, batch_size=micro, generator=torch.Generator()):
                batch = self._to_device(batch)
                with self._autocast():
                    loss, metrics = self.stage.loss(batch)
                for name, value in {"loss": loss, **metrics}.items():
                    sums[name] = sums.get(name, 0.0) + value.item() * len(batch["label"])
            if self.world.rank == 0:
                self._save_samples()
        self.stage.train()
        means = {f"val_{name}": value * self.world.size / len(self.val) for name, value in sums.items()}
        return self.world.mean(means, self.device)

    def _spread(self, data: ControlledImages | CachedTokens, most: int) -> dict[str, Tensor]:
        """One batch of at most so many items, evenly from the whole of a data set, on the device."""
        count = min(most, len(data))
        chosen = Subset(data, [i * len(data) // count for i in range(count)])
        return self._to_device(next(iter(DataLoader(chosen, batch_size=count, generator=torch.Generator()))))

    def _save_samples(self) -> None:
        """A contact sheet of validation images, evenly from the whole split."""
        batch = self._spread(self.val_images, 16)
        with self._autocast():
            shown = self.stage.samples(batch)
        groups = list(zip(*(to_pixels(x) for x in shown.values()), strict=True))
        save_png(contact_sheet(groups, list(shown)), self.options.output / f"samples-{self.step:07d}.png")


def _generator(seed: int, step: int) -> torch.Generator:
    """The generator of one step's random numbers that don't depend on how its batch is shared out."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) * 2 + 1)


def seed_everything(seed: int) -> None:
    """Seed PyTorch; called before a model is made, since its initial weights follow from the seed too."""
    torch.manual_seed(seed)
