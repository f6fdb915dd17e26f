"""Drawing images with the reference loop: the uniform numbers of a seed, and `python -m car_train sample`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from car_train import checkpoint
from car_train.config import ConfigError
from car_train.conventions import FITS
from car_train.data.images import fitted, open_map
from car_train.images import save_png, to_pixels
from car_train.model import Model
from car_train.model.sample import gumbel_noise, sample
from car_train.sampling import PRESETS, settings_of
from car_train.training.stages import control_pyramids


def uniform_numbers(seeds: Sequence[int], tokens: int) -> Tensor:
    """f32 [B, L] in [0, 1): one number for each token of each seed's image, as `car-run --seed` draws them."""
    drawn = [np.random.default_rng(seed).random(tokens, dtype=np.float32) for seed in seeds]
    return torch.from_numpy(np.stack(drawn))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--control", type=Path, help="control image")
    parser.add_argument("--fit", choices=FITS, help="a control that isn't square: middle, margins, distorted")
    parser.add_argument("--class", dest="label", type=int, help="class index (default: no class)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--preset", choices=PRESETS, default="plan", help="guidance, top-k, top-p (default: plan)")
    parser.add_argument("--cfg", type=float, help="guidance, 0 = off (default: the preset's)")
    parser.add_argument("--top-k", type=int, help="0 = off (default: the preset's)")
    parser.add_argument("--top-p", type=float, help="0 = off (default: the preset's)")
    parser.add_argument("--more-smooth", action="store_true", help="smoother images: codes mixed by Gumbel noise")
    parser.add_argument("-o", "--output", type=Path, default=Path("sample.png"))


def run(args: argparse.Namespace) -> Path:
    """Draw one image; returns its file. Raises ConfigError, CheckpointError, DataError."""
    model = checkpoint.load(args.checkpoint)
    _check(args, model)
    assert model.car is not None
    config = model.config.vqvae
    controls = None
    if args.control is not None:
        assert model.config.car is not None
        how = model.config.car.control_convention
        square = fitted(open_map(args.control, how.ground), config.image_size, args.fit or how.fit, how.ground)
        controls = control_pyramids([np.asarray(square)], config, "cpu")
    label = model.car.base.config.classes if args.label is None else args.label
    uniforms = uniform_numbers([args.seed], config.tokens)
    chosen = settings_of(args.preset, args.cfg, args.top_k, args.top_p, config.vocab)
    _, drawn = sample(
        model.vqvae,
        model.car,
        torch.tensor([label]),
        uniforms,
        controls,
        **asdict(chosen),
        smooth_noise_BLV=gumbel_noise([args.seed], config.tokens, config.vocab) if args.more_smooth else None,
    )
    save_png(Image.fromarray(to_pixels(drawn)[0]), args.output)
    output: Path = args.output
    return output


def _check(args: argparse.Namespace, model: Model) -> None:
    if model.car is None:
        raise ConfigError(f"{args.checkpoint} holds a tokenizer only; give a transformer or a CAR checkpoint")
    vocab, classes = model.config.vqvae.vocab, model.car.base.config.classes
    if args.label is not None and not 0 <= args.label <= classes:
        raise ConfigError(f"class {args.label} is out of range; give 0 to {classes - 1}, or {classes} for no class")
    if (args.control is not None) != (model.car.branch is not None):
        needs, remedy = ("needs", "add") if model.car.branch else ("has no", "leave out")
        raise ConfigError(f"{args.checkpoint} {needs} control; {remedy} --control")
    chosen = settings_of(args.preset, args.cfg, args.top_k, args.top_p, vocab)
    if not 0 <= chosen.top_k <= vocab or not 0 <= chosen.top_p <= 1 or not 0 <= chosen.cfg < float("inf"):
        raise ConfigError(
            f"top-k {chosen.top_k}, top-p {chosen.top_p}, cfg {chosen.cfg}: "
            f"give top-k in 0…{vocab}, top-p in 0…1, cfg from 0"
        )
    if args.control is not None and args.control.resolve() == args.output.resolve():
        raise ConfigError(f"the output {args.output} would replace the control image; choose another -o")
    if args.seed < 0 or args.output.suffix.lower() != ".png" or not args.output.absolute().parent.is_dir():
        raise ConfigError(
            f"seed {args.seed}, output {args.output}: give a seed from 0 and a .png in a folder that exists"
        )
