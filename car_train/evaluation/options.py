"""What is evaluated, on which images, drawn how."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from car_train.conventions import FITS
from car_train.data.folder import SPLITS
from car_train.errors import UserError
from car_train.flags import option
from car_train.sampling import PRESETS, Sampling, settings_of

MOST_TOLERANCE = 64
"""Pixels: a square of 129 around every edge."""


class EvaluationError(UserError, ValueError):
    """An evaluation that can't be made. The message names what is in the way and ends with the remedy."""


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """What is evaluated, on which images, drawn how."""

    checkpoint: Path
    """A checkpoint of any stage, or a run's folder for its newest one."""
    data: Path | None = option(
        None, "folder of class folders; plans and --samples of a model without control can do without"
    )
    split: str = option("val", choices=SPLITS)
    classes: str | None = option(
        None, 'only these: names, noto-*, 7, 100-999, with commas; "!0-99": all others', metavar="LIST"
    )
    control_root: Path | None = option(None, "ready control images that mirror --data", metavar="DIR")
    limit: int = option(0, "at most N images, at random (default: 0, all)", metavar="N")
    per_class: int = option(
        0,
        "at most N images of each class, at random (default: 0, all); of a plan or with --samples: images to draw of "
        "each class (default: 50)",
        metavar="N",
    )
    batch: int = option(16)
    seed: int = option(0)
    preset: str = option("plan", "guidance, top-k, top-p", choices=tuple(PRESETS))
    cfg: float | None = option(None, "guidance (default: the preset's)")
    top_k: int | None = option(None, "0, or no less than the vocabulary: off (default: the preset's)")
    top_p: float | None = option(None, "0 or 1: off (default: the preset's)")
    fit: str = option(FITS[0], "of images that aren't square: their middle, with margins, or distorted", choices=FITS)
    annotator_onnx: Path | None = option(None, "network that derives the control from a drawn image", metavar="FILE")
    device: str = option("cpu", "e.g. cuda")
    samples: Path | None = option(
        None,
        "draw --per-class images of every class and write them: arr_0, uint8 [N, H, W, 3] (default of a plan: "
        "samples.npz, where -o is)",
        metavar="NPZ",
    )
    controls: Path | None = option(
        None, "also write the control map of each of --samples, in the same form and order", metavar="NPZ"
    )
    reference: Path | None = option(
        None,
        "the real images of --samples in the layout of ADM's evaluation: arr_0, or mu and sigma (mu_s, sigma_s)",
        metavar="NPZ",
    )
    reject: float = option(
        0.0, "draw 1/(1 - P) times as many and drop the share P that a classifier trusts least", metavar="P"
    )
    branch: str | None = option(None, "branch of a plan (default: the plan's own default)", metavar="NAME")
    tolerance: int = option(
        1, "pixels in x and in y by which a drawn edge may be off and still counts", metavar="PIXELS"
    )
    tokenizer: bool = option(False, "the tokenizer alone, with a perceptual distance and the legibility of text")
    processes: int = option(1, "processes that draw")
    resume: bool = option(False, "go on with the images that a stopped evaluation has drawn")
    backend: str = option("auto", "engine of a plan, such as ort-cpu")
    threads: int = option(0, "CPU threads (default: 0, all)")
    baseline: bool | None = None
    """Also draw and measure without the control; None: of held-out images, but not of samples."""

    def __post_init__(self) -> None:
        require(self.split in SPLITS, f"no split {self.split!r}; choose one of: {', '.join(SPLITS)}")
        require(self.fit in FITS, f"no fit {self.fit!r}; choose one of: {', '.join(FITS)}")
        require(self.batch >= 1, f"batch is {self.batch}; it must be at least 1")
        require(self.preset in PRESETS, f"no preset {self.preset!r}; choose one of: {', '.join(PRESETS)}")
        require(self.processes >= 1, f"processes is {self.processes}; it must be at least 1")
        require(0 <= self.reject < 1, f"reject is {self.reject}; it must be at least 0 and below 1")
        for name in ("limit", "per_class", "seed", "top_k", "threads", "tolerance"):
            value = getattr(self, name)
            require(value is None or value >= 0, f"{name} is {value}; it must be at least 0")
        require(
            self.tolerance <= MOST_TOLERANCE,
            f"tolerance is {self.tolerance}; it must be at most {MOST_TOLERANCE} pixels",
        )
        require(self.cfg is None or 0 <= self.cfg < math.inf, f"cfg is {self.cfg}; it must be a number from 0")
        require(self.top_p is None or 0 <= self.top_p <= 1, f"top_p is {self.top_p}; it must be between 0 and 1")
        try:
            torch.empty(0, device=self.device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise EvaluationError(
                f"device {self.device!r} can't be used ({reason}); give cpu, or cuda with a GPU"
            ) from error

    def sampling(self, vocab: int) -> Sampling:
        """The settings of sampling; top-k at least the vocabulary is 0."""
        chosen = settings_of(self.preset, self.cfg, self.top_k, self.top_p, vocab)
        return replace(chosen, top_k=chosen.top_k if chosen.top_k < vocab else 0)


def require(condition: bool, message: str) -> None:
    if not condition:
        raise EvaluationError(message)
