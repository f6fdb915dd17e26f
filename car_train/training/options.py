"""How a run trains: every option with its default, its check and the help text of its flag."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from car_train.config import ConfigError
from car_train.conventions import FITS
from car_train.flags import option

SCHEDULES = ("cosine", "linear", "lin0", "constant")
PRECISIONS = ("fp32", "bf16", "fp16")


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """How to train; what to train is the stage's. Raises ConfigError."""

    data: Path = option(help="folder of class folders")
    output: Path = option(help="folder of this run: checkpoints, samples, log.jsonl", flag="-o --output")
    steps: int = option(5000)
    epochs: float | None = option(None, "instead of --steps: passes over the training images")
    batch: int = option(32, "images of one optimizer step, over all processes and microbatches")
    grad_accum: int = option(1, "microbatches that a batch is computed in, for memory", aliases=("--accumulate",))
    lr: float = option(6e-4, "peak learning rate, as is (the papers' is per 256 images: --lr-per-256)")
    schedule: str = option(
        "cosine",
        "after the warm-up: cosine; linear, with 5 %% of the steps at the peak; lin0, which is VAR's: linear, and "
        "its warm-up starts at 0.5 %% of the peak; or constant",
        choices=SCHEDULES,
    )
    final_lr: float = option(
        0.01, "share of the peak that is left at the end (published: 0.1 for d16, d20 and CAR, 0.01 from d24 on)"
    )
    warmup: int = option(200, "steps of linear warm-up")
    weight_decay: float = option(0.05, "of matrices, kernels and the class embedding")
    weight_decay_end: float | None = option(
        None, "fall to this along a half cosine (default: constant; published: 0.08 for d30 and d36)"
    )
    grad_clip: float = option(2.0, "largest norm of the gradient", aliases=("--clip",))
    ema: float = option(
        0.0, "keep an exponential moving average of the weights, e.g. 0.999 (default: 0, off)", metavar="DECAY"
    )
    seed: int = option(0)
    precision: str = option(
        "fp32", "autocast, fp16 with gradient scaling; weights and norms stay fp32", choices=PRECISIONS
    )
    compile: bool = option(False, "torch.compile blocks, encoder and decoder (needs a C++ compiler)")
    activation_checkpointing: bool = option(
        False, "less memory: recompute a block's activations in the backward pass", aliases=("--recompute",)
    )
    channels_last: bool = True
    device: str = option("cpu", "e.g. cuda; under torchrun: one GPU a process")
    threads: int = option(0, "CPU threads (default: 0, all)")
    workers: int = option(1, "data loader processes")
    fit: str = option(FITS[0], "of images that aren't square: their middle, with margins, or distorted", choices=FITS)
    augment: bool = option(True, "no flips, shifts and zooms")
    flip: bool = option(True, "mirror nothing, as in VAR's training: for scenes with writing, or a right and a left")
    preload: bool = option(
        True, "don't keep all images decoded in memory (64 KB each at 64 pixels, 1 MB at 256): for large sets"
    )
    classes: str | None = option(None, 'some classes only, e.g. 0-99, or "!0-99" for all others (labels stay)')
    val: Path | None = option(
        None, "folder of validation images, of the same classes (default: about 5 %% of --data, or its folder val)"
    )
    control_root: Path | None = option(None, "folder of control images that mirrors --data")
    val_control_root: Path | None = option(None, "folder of control images that mirrors --val")
    drop_strokes: float = option(
        0.0,
        "share of the training images whose control lines lose some strokes, so that a branch follows unfinished "
        "sketches (default: 0)",
        metavar="SHARE",
    )
    token_cache: bool = option(True, "encode images anew at every step, not once")
    token_root: Path | None = option(None, "folder of token caches (default: ~/.cache/car/tokens)")
    views: int = option(8, "augmentations of each image in the token cache; without augmentation it is 1")
    tensorboard: bool = option(False, "write TensorBoard logs too")
    keep: int = option(2, "checkpoints kept")
    validate_every: int = option(500, "steps")
    save_every: int = option(500, "steps")

    def __post_init__(self) -> None:
        for field in ("steps", "batch", "grad_accum", "views", "validate_every", "save_every", "keep"):
            if getattr(self, field) < 1:
                raise ConfigError(f"{field} is {getattr(self, field)}; it must be at least 1")
        for field in ("warmup", "weight_decay", "seed", "workers", "threads"):
            if not 0 <= getattr(self, field) < math.inf:
                raise ConfigError(f"{field} is {getattr(self, field)}; it must be finite and at least 0")
        if (self.val is not None and self.control_root is not None) != (self.val_control_root is not None):
            raise ConfigError(
                "control_root and val_control_root belong together where there is a val; give --val-control-root "
                "with --val and --control-root, and not without"
            )
        if not 0 <= self.final_lr <= 1:
            raise ConfigError(f"final_lr is {self.final_lr}; it must be in [0, 1], e.g. 0.1")
        if self.weight_decay_end is not None and not 0 <= self.weight_decay_end < math.inf:
            raise ConfigError(f"weight_decay_end is {self.weight_decay_end}; it must be at least 0")
        for field in ("lr", "grad_clip", "epochs"):
            if getattr(self, field) is not None and not 0 < getattr(self, field) < math.inf:
                raise ConfigError(f"{field} is {getattr(self, field)}; it must be positive")
        if not 0 <= self.drop_strokes <= 1:
            raise ConfigError(f"drop_strokes is {self.drop_strokes}; it must be in [0, 1], e.g. 0.5")
        if not 0 <= self.ema < 1:
            raise ConfigError(f"ema is {self.ema}; it must be in [0, 1), e.g. 0.999")
        for field, known in (("schedule", SCHEDULES), ("precision", PRECISIONS), ("fit", FITS)):
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


@dataclass(frozen=True, kw_only=True)
class TokenizerLossOptions:
    """The terms of the tokenizer's loss (VAR eq. 5) beyond pixels and codes, and their weights λ."""

    perceptual: float = option(0.0, "weight of the perceptual loss (default: 0, off)", metavar="W")
    perceptual_net: str = option("squeezenet", choices=("squeezenet", "vgg"))
    perceptual_weights: Path | None = option(
        None, "its weights, .safetensors (default: those of `car_train weights squeezenet`, or torchvision's VGG)"
    )
    adversarial: float = option(
        0.0, "weight of the PatchGAN loss, times its adaptive weight (default: 0, off; VQGAN: 0.8)", metavar="W"
    )
    adversarial_start: int = option(0, "first step with it", metavar="STEP")
    critic_width: int = option(64, "channels of the PatchGAN")
    decoder_only: bool = option(
        False, "train the decoder of --init alone: images keep their tokens, so that transformers on them still fit"
    )


PARTS = ("base", "branch", "both")
CONDITIONS = ("class", "control")


@dataclass(frozen=True, kw_only=True)
class CCAOptions:
    """Condition Contrastive Alignment (arXiv 2410.09347): what it trains, against what, and how hard."""

    part: str | None = option(
        None,
        "what is trained; other branches of a base that was trained fit it no more (default: the branch, or the "
        "base where there is none)",
        flag="--train",
        choices=PARTS,
    )
    negative: str | None = option(
        None,
        "condition that is exchanged for the next image's (default: control for a branch, else class)",
        choices=CONDITIONS,
    )
    beta: float = option(0.02, "β: the smaller, the further from the model as it was")
    weight: float = option(
        50.0,
        "λ, weight of the mismatched pairs: the larger, the more like strong guidance (published for VAR: 50 for "
        "d16 and d20, 100 for d24, 1000 for d30)",
        flag="--lambda",
        metavar="W",
    )

    def __post_init__(self) -> None:
        for field in ("beta", "weight"):
            if not 0 < getattr(self, field) < math.inf:
                raise ConfigError(
                    f"{field} is {getattr(self, field)}; it must be positive, e.g. 0.02 for β, 50 for λ"
                )
        for field, known in (("part", PARTS), ("negative", CONDITIONS)):
            if getattr(self, field) not in (None, *known):
                raise ConfigError(f"{field} is {getattr(self, field)!r}; choose one of: {', '.join(known)}")


RENAMED = {"accumulate": "grad_accum", "clip": "grad_clip", "recompute": "activation_checkpointing"}
"""Options by the names that runs of earlier versions recorded."""
FREE = frozenset({"output", "workers", "threads", "device", "validate_every", "save_every", "keep", "tensorboard"})
"""Options that change nothing of what a run computes."""
