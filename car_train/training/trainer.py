"""One training loop for all three stages, on one process or, under `torchrun`, on many.

Everything random follows from the seed: order of pictures, augmentation, dropped labels, dropout. A run continues
from its newest checkpoint; on one process and a CPU, stopped and resumed equals never stopped, bit for bit.

A run's folder:

    run.json              stage, options, config, sizes, versions
    log.jsonl             one object a step; validation figures now and then, as `val_…`
    samples-0000500.png   a sheet: control | picture | truth, in rows
    step-0000500/         a checkpoint; its weights are the moving average, where there is one
    tensorboard/          with `tensorboard`

`batch` is what one optimizer step sees, over all processes and all accumulated parts: the same command on two
processes, or with `accumulate`, takes the same steps up to rounding.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import platform
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from car_train import checkpoint
from car_train.config import ConfigError
from car_train.data.dataset import ControlledImages
from car_train.model.car import ConvBlock
from car_train.model.var import Block
from car_train.model.vqvae import Decoder, Encoder, ResBlock
from car_train.training.ema import MovingAverage
from car_train.training.stages import Objective, Stage, TransformerStage
from car_train.training.token_cache import CachedTokens, open_cache

SCHEDULES = ("cosine", "linear", "constant")
PRECISIONS = ("fp32", "bf16", "fp16")
SET_UP_IMAGES = 16
"""Images that a fresh stage is set up on; at 256×256 they have 10,880 tokens to measure deviations of."""


class TrainingError(RuntimeError):
    """Training can't go on; the message says why and ends with the remedy."""


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """How to train; what to train is the stage's."""

    data: Path
    output: Path
    steps: int = 5000
    batch: int = 32
    """Pictures of one optimizer step, over all processes and accumulated parts."""
    accumulate: int = 1
    """Parts a batch is computed in, for memory."""
    lr: float = 1e-4
    """Peak learning rate, as is (the papers' is per 256 pictures)."""
    schedule: str = "cosine"
    """After the warm-up: cosine to 1 %; linear to 1 % (VAR's, with 5 % of the steps at the peak); or constant."""
    warmup: int = 200
    weight_decay: float = 0.05
    clip: float = 2.0
    """Largest norm of the gradient."""
    seed: int = 0
    precision: str = "fp32"
    """Autocast to bf16 or fp16 (with a gradient scaler); weights and norms stay float32."""
    ema: float = 0.0
    """Decay of the moving average of weights; 0 = none."""
    compile: bool = False
    """`torch.compile` blocks, encoder and decoder."""
    recompute: bool = False
    """Keep no activations within a block; compute them again in the backward pass."""
    channels_last: bool = True
    workers: int = 1
    """Data loader processes, each."""
    threads: int = 0
    """CPU threads, 0 = all."""
    device: str = "cpu"
    augment: bool = True
    preload: bool = True
    """Keep all pictures decoded in memory: 64 KB each at 64 pixels, 1 MB at 256."""
    control_root: Path | None = None
    classes: str | None = None
    """Train and validate on some classes only (`data.select_classes`); labels keep their numbers."""
    token_cache: bool = True
    """Encode pictures once (stages 2 and 3), not once a step."""
    token_root: Path | None = None
    """Folder of token caches; None = `tokens.DEFAULT_ROOT`."""
    views: int = 8
    """Augmentations of every picture in a token cache; without augmentation it is 1."""
    validate_every: int = 500
    save_every: int = 500
    keep: int = 2
    """Checkpoints kept of one run."""
    tensorboard: bool = False

    def __post_init__(self) -> None:
        for field in ("steps", "batch", "accumulate", "views", "validate_every", "save_every", "keep"):
            if getattr(self, field) < 1:
                raise ConfigError(f"{field} is {getattr(self, field)}; it must be at least 1")
        for field in ("warmup", "weight_decay", "seed", "workers", "threads"):
            if not getattr(self, field) >= 0:
                raise ConfigError(f"{field} is {getattr(self, field)}; it must be at least 0")
        for field in ("lr", "clip"):
            if not 0 < getattr(self, field) < math.inf:
                raise ConfigError(f"{field} is {getattr(self, field)}; it must be positive")
        if not 0 <= self.ema < 1:
            raise ConfigError(f"ema is {self.ema}; it must be in [0, 1), e.g. 0.999")
        for field, known in (("schedule", SCHEDULES), ("precision", PRECISIONS)):
            if getattr(self, field) not in known:
                raise ConfigError(f"{field} is {getattr(self, field)!r}; choose one of: {', '.join(known)}")
        try:
            torch.empty(0, device=self.device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(
                f"device {self.device!r} can't be used ({reason}); give cpu, or cuda with a GPU"
            ) from error

    def to_json(self) -> dict[str, Any]:
        return {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(self).items()}


@dataclass(frozen=True)
class World:
    """This process among those that train together. Alone, unless `torchrun` started it."""

    rank: int = 0
    size: int = 1

    @staticmethod
    def join(device: str) -> tuple[World, str]:
        """The world, and this process's device.

        Reads what `torchrun` sets: WORLD_SIZE, RANK, LOCAL_RANK. Collectives by nccl on GPUs, gloo on CPUs.
        """
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size == 1:
            return World(), device
        if device == "cuda":
            device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
            torch.cuda.set_device(device)
        if not dist.is_initialized():
            dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
        return World(dist.get_rank(), size), device

    def mean(self, values: dict[str, float], device: torch.device) -> dict[str, float]:
        """The mean of every value over the processes."""
        if self.size == 1:
            return values
        summed = torch.tensor(list(values.values()), dtype=torch.float64, device=device)
        dist.all_reduce(summed)
        return dict(zip(values, (summed / self.size).tolist(), strict=True))

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()


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
    exempt = ("embedding", "pos_", "level_", "log_scale", "ada_offset")
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, p in module.named_parameters():
        if p.requires_grad:
            (free if p.ndim < 2 or any(word in name for word in exempt) else decayed).append(p)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]


class Trainer:
    """The loop around a stage: order, optimizers, precision, average, logs, checkpoints."""

    def __init__(self, stage: Stage, options: TrainOptions):
        self.world, device = World.join(options.device)
        self.stage, self.options, self.device = stage, options, torch.device(device)
        parts = self.world.size * options.accumulate
        if options.batch % parts:
            raise ConfigError(
                f"batch {options.batch} can't be split over {self.world.size} processes × accumulate "
                f"{options.accumulate}; give a multiple of {parts}"
            )
        if options.threads:
            torch.set_num_threads(options.threads)
        options.output.mkdir(parents=True, exist_ok=True)  # a folder that can't be made is better known at once
        size = stage.model.config.vqvae.image_size
        common: dict[str, Any] = {
            "control_type": stage.control_type,
            "control_root": options.control_root,
            "seed": options.seed,
            "preload": options.preload,
            "classes": options.classes,
        }
        self.images = ControlledImages(options.data, size, split="train", augment=options.augment, **common)
        self.val_images = ControlledImages(options.data, size, split="val", **common)
        self._check_classes()
        if len(self.val_images) < self.world.size:
            raise ConfigError(
                f"{len(self.val_images)} validation pictures for {self.world.size} processes; use fewer processes"
            )
        stage.to(self.device)
        if options.channels_last:
            # torch's stubs leave out the overload with a memory format alone.
            stage.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._set_up_blocks()
        self.data, self.val = self._datasets()
        if stage.fresh:
            stage.set_up(self._spread(self.data, SET_UP_IMAGES))
        self._set_up_optimizers()
        self.average = MovingAverage(stage.trainable, options.ema) if options.ema else None
        self.step = 0
        if self.world.rank:
            torch.manual_seed(options.seed + self.world.rank)  # stochastic depth differs between the processes

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
                module.recompute = self.options.recompute
            if self.options.compile and isinstance(module, Block | ConvBlock | Encoder | Decoder):
                module.compile()

    def _datasets(self) -> tuple[ControlledImages | CachedTokens, ControlledImages | CachedTokens]:
        """What is trained and validated on: pictures, or their tokens where the stage takes these."""
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
        options, stage, device = self.options, self.stage, self.device.type
        settings: dict[str, Any] = {"lr": options.lr, "betas": (0.9, 0.95), "fused": True}
        self.optimizers = [torch.optim.AdamW(parameter_groups(stage.trainable, options.weight_decay), **settings)]
        self.objective: nn.Module = Objective(stage)
        wrap = {"broadcast_buffers": False, "device_ids": [self.device.index] if device == "cuda" else None}
        if self.world.size > 1:
            self.objective = DistributedDataParallel(self.objective, **wrap)  # type: ignore[arg-type]
        if stage.adversary is not None:
            # Betas of the GAN literature: the critic's target moves.
            self.optimizers.append(torch.optim.AdamW(stage.adversary.parameters(), lr=options.lr, betas=(0.5, 0.9)))
            stage.critic = stage.adversary
            if self.world.size > 1:
                stage.critic = DistributedDataParallel(stage.adversary, **wrap)  # type: ignore[arg-type]
        self.scaler = torch.amp.GradScaler(device, enabled=options.precision == "fp16")

    # --- state -----------------------------------------------------------------------------------------------------

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
        try:
            self._take_up(state)
        except (KeyError, ValueError, IndexError, RuntimeError) as error:
            raise checkpoint.CheckpointError(
                f"{path}: its training state doesn't fit these options ({error}); resume with those it had before"
            ) from error

    def _take_up(self, state: dict[str, Any]) -> None:
        if (self.average is not None) != ("raw" in state):
            raise ValueError("ema was switched on or off")
        if self.average is not None:
            self.average.load({name: p.to(self.device) for name, p in state["raw"].items()})
        if len(state["optimizers"]) != len(self.optimizers):
            raise ValueError("the adversarial loss was switched on or off")
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
            _match_layout(optimizer)
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
        self._tell_changes(state["options"])

    def _tell_changes(self, before: dict[str, Any]) -> None:
        """Warn of options that differ from those the run was started with, where they change what is computed."""
        free = {"output", "workers", "threads", "device", "validate_every", "save_every", "keep", "tensorboard"}
        now = json.loads(json.dumps(self.options.to_json() | {"files": self.images.fingerprint()}))
        changed = [f"{k} {before.get(k)!r} → {now[k]!r}" for k in now if k not in free and before.get(k) != now[k]]
        if changed and not self.world.rank:
            warnings.warn(
                f"resumed at step {self.step} with other options than before: {'; '.join(changed)}; the run goes on, "
                "but it is not the one that would have been without the stop",
                stacklevel=3,
            )

    def save(self) -> Path:
        """Write a checkpoint; older ones than the `keep` newest go once it is whole."""
        rng: dict[str, Tensor] = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.device)
        everyone = [rng]
        if self.world.size > 1:
            everyone = [rng] * self.world.size
            dist.all_gather_object(everyone, rng)
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
                if self.average is not None:
                    state["raw"] = self.average.raw()
                    stack.enter_context(self.average.applied())
                checkpoint.save(self.stage.model, path, state)
            for old in sorted(self.options.output.glob("step-*"))[: -self.options.keep]:
                checkpoint.remove(old)
        self.world.barrier()
        return path

    # --- data ------------------------------------------------------------------------------------------------------

    def batches(self) -> Iterator[dict[str, Tensor]]:
        """This process's parts of the batches from the current step on.

        Epoch after epoch in an order that (seed, epoch) decides; `accumulate` items make one batch.
        """
        options, world = self.options, self.world
        per_epoch = len(self.data) // options.batch
        if per_epoch == 0:
            raise ConfigError(
                f"batch is {options.batch}, but there are {len(self.data)} training pictures; make it smaller"
            )
        part = options.batch // (world.size * options.accumulate)
        mine = [(m * world.size + world.rank) * part for m in range(options.accumulate)]
        epoch, skip = divmod(self.step, per_epoch)
        step = self.step
        while True:
            order = torch.randperm(
                len(self.data), generator=torch.Generator().manual_seed(options.seed * 100_003 + epoch)
            ).tolist()
            self.data.set_epoch(epoch)
            groups = [order[i * options.batch + m :][:part] for i in range(skip, per_epoch) for m in mine]
            # A generator of its own: a loader draws from the global one, which a resumed run must find as it was.
            generator = torch.Generator().manual_seed(step)
            loader = DataLoader(self.data, batch_sampler=groups, num_workers=options.workers, generator=generator)
            for i, batch in enumerate(loader):
                if i % options.accumulate == 0:
                    drop = torch.rand(options.batch, generator=_generator(options.seed, step))
                    step += 1
                at = mine[i % options.accumulate]
                yield batch | {"drop": drop[at : at + part]}
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
            journal = stack.enter_context(Journal(self)) if self.world.rank == 0 else None
            stage.train()
            batches = self.batches()
            while self.step < options.steps:
                record = self._train_step(batches)
                done = self.step == options.steps
                if done or self.step % options.validate_every == 0:
                    record |= self.validate()
                if journal is not None:
                    journal.write(record)
                if done or self.step % options.save_every == 0:
                    path = self.save()
        return path

    def _train_step(self, batches: Iterator[dict[str, Tensor]]) -> dict[str, float]:
        """One optimizer step; returns what to log, the mean over the batch."""
        options, stage = self.options, self.stage
        lr = learning_rate(self.step, options)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.zero_grad(set_to_none=True)
        stage.before_step(self.step)
        record: dict[str, float] = {}
        for m in range(options.accumulate):
            last = m + 1 == options.accumulate
            for name, value in self._part(self._to_device(next(batches)), sync=last).items():
                record[name] = record.get(name, 0.0) + value.item() / options.accumulate
        if not math.isfinite(record["loss"]):
            raise TrainingError(
                f"the loss is {record['loss']} at step {self.step + 1}; resume from the last checkpoint with a lower "
                f"lr than {options.lr:g}, a longer warm-up, or another precision than {options.precision}"
            )
        for optimizer in self.optimizers:
            grads = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            if grads:
                self.scaler.unscale_(optimizer)
                norm = nn.utils.clip_grad_norm_(grads, options.clip)
                if optimizer is self.optimizers[0]:
                    record["grad_norm"] = norm.item()
                self.scaler.step(optimizer)
        self.scaler.update()
        self.step += 1
        extra = stage.after_step(self.step, options.steps)
        if self.average is not None:
            self.average.update(self.step)
        return self.world.mean(record, self.device) | extra | {"lr": lr}

    def _part(self, batch: dict[str, Tensor], sync: bool) -> dict[str, Tensor]:
        """Forward and backward of one part of a batch; gradients are exchanged with the last part."""
        wrapped = isinstance(self.objective, DistributedDataParallel)
        with nullcontext() if sync or not wrapped else self.objective.no_sync():  # type: ignore[operator]
            with self._autocast():
                loss, metrics = self.objective(batch)
            self.scaler.scale(loss / self.options.accumulate).backward()
        critic = self.stage.critic
        wrapped = isinstance(critic, DistributedDataParallel)
        with nullcontext() if sync or not wrapped else critic.no_sync():
            with self._autocast():
                extra = self.stage.extra_loss(self.step)
            if extra is not None:
                self.scaler.scale(extra[0] / self.options.accumulate).backward()
                metrics = metrics | extra[1]
        return {"loss": loss.detach(), **{k: v.detach() for k, v in metrics.items()}}

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Mean loss and metrics over the validation split, with the averaged weights; writes a sample sheet."""
        self.stage.train(False)
        sums: dict[str, float] = {}
        with ExitStack() as stack:
            if self.average is not None:
                stack.enter_context(self.average.applied())
            share = Subset(self.val, range(self.world.rank, len(self.val), self.world.size))
            part = self.options.batch // (self.world.size * self.options.accumulate)
            for batch in DataLoader(share, batch_size=part, generator=torch.Generator()):
                batch = self._to_device(batch)
                with self._autocast():
                    loss, metrics = self.stage.loss(batch)
                for name, value in {"loss": loss, **metrics}.items():
                    sums[name] = sums.get(name, 0.0) + value.item() * len(batch["label"])
            if self.world.rank == 0:
                self._write_sheet()
        self.stage.train()
        means = {f"val_{name}": value * self.world.size / len(self.val) for name, value in sums.items()}
        return self.world.mean(means, self.device)

    def _spread(self, data: ControlledImages | CachedTokens, most: int) -> dict[str, Tensor]:
        """One batch of at most so many items, evenly from the whole of a data set, on the device."""
        count = min(most, len(data))
        chosen = Subset(data, [i * len(data) // count for i in range(count)])
        return self._to_device(next(iter(DataLoader(chosen, batch_size=count, generator=torch.Generator()))))

    def _write_sheet(self) -> None:
        """Samples of validation pictures, evenly from the whole split."""
        batch = self._spread(self.val_images, 16)
        with self._autocast():
            rows = self.stage.picture(batch)
        sheet(rows).save(self.options.output / f"samples-{self.step:07d}.png")


def _match_layout(optimizer: torch.optim.Optimizer) -> None:
    """Lay the moments out as their parameters are: the fused step goes by memory, and a run may change its layout."""
    for p, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == p.shape:
                state[name] = torch.empty_like(p).copy_(value)


class Journal:
    """What a run tells: `run.json`, `log.jsonl`, the progress bar, TensorBoard."""

    def __init__(self, trainer: Trainer):
        self.trainer, self.options = trainer, trainer.options
        self.began = time.monotonic()

    def __enter__(self) -> Journal:
        output = self.options.output
        self.board = _tensorboard(output / "tensorboard") if self.options.tensorboard else None
        (output / "run.json").write_text(json.dumps(self._facts(), indent=2) + "\n", encoding="utf-8")
        self.log = (output / "log.jsonl").open("a", encoding="utf-8")
        start = self.trainer.step
        self.bar = tqdm(total=self.options.steps, initial=start, unit="step", dynamic_ncols=True, disable=None)
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()
        self.log.close()
        if self.board is not None:
            self.board.close()

    def _facts(self) -> dict[str, Any]:
        trainer, stage = self.trainer, self.trainer.stage
        trained = sum(p.numel() for p in stage.trainable.parameters() if p.requires_grad)
        return {
            "format": 1,
            "stage": stage_name(stage),
            "options": self.options.to_json(),
            "config": json.loads(stage.model.config.to_json()),
            "pictures": {"train": len(trainer.images), "val": len(trainer.val_images)},
            "parameters": {"total": sum(p.numel() for p in stage.model.parameters()), "trainable": trained},
            "processes": trainer.world.size,
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
        }

    def write(self, record: dict[str, float]) -> None:
        step, seconds = self.trainer.step, round(time.monotonic() - self.began, 2)
        self.log.write(json.dumps({"step": step, "seconds": seconds, **record}) + "\n")
        self.log.flush()
        if self.board is not None:
            for name, value in record.items():
                self.board.add_scalar(name.replace("val_", "val/") if name.startswith("val_") else name, value, step)
        shown = {k: v for k, v in record.items() if not k.startswith("codes_used_")}
        self.bar.update()
        brief = {k: f"{shown[k]:.3g}" for k in ("loss", "psnr", "accuracy") if k in shown}
        self.bar.set_postfix(brief, refresh=False)
        if "val_loss" in record:
            told = "  ".join(f"{k} {v:.4g}" for k, v in shown.items())
            tqdm.write(f"step {step}: {told}", file=sys.stderr)


def stage_name(stage: Stage) -> str:
    """ "vqvae", "var" or "car"."""
    if not isinstance(stage, TransformerStage):
        return "vqvae"
    return "car" if stage.car.branch is not None else "var"


def _tensorboard(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError(f"TensorBoard logs need a package ({error}); pip install tensorboard") from error
    return SummaryWriter(folder)  # type: ignore[no-untyped-call]


def _generator(seed: int, step: int) -> torch.Generator:
    """For the random numbers of one step that don't depend on how its batch is shared out."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) * 2 + 1)


def sheet(rows: list[Tensor]) -> Image.Image:
    """A contact sheet: one picture per column, one tensor f32 [B, 3, H, W] in [-1, 1] per row."""
    grid = torch.cat([torch.cat(list(row.detach().float().cpu()), 2) for row in rows], 1)
    return Image.fromarray(((grid.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy())


def seed_everything(seed: int) -> None:
    """Before a model is made: its initial weights follow from the seed too."""
    torch.manual_seed(seed)
