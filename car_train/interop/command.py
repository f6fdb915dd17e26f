"""`python -m car_train import`: published .pth files as a checkpoint; and the flags that name these files."""

from __future__ import annotations

import argparse
from pathlib import Path

from car_train import checkpoint
from car_train.config import CONTROL_TYPES, ConfigError
from car_train.flags import integers
from car_train.interop import official
from car_train.model import Model


def add_official_arguments(parser: argparse.ArgumentParser, several: bool = False) -> None:
    """The options that name official files, shared with the exporter. several: any number of `--car`."""
    parser.add_argument("--vae", type=Path, help="official tokenizer, e.g. vae_ch160v4096z32.pth")
    parser.add_argument("--var", type=Path, help="official transformer, e.g. var_d16.pth")
    text = "official control branch, e.g. car_depth_d16.pth; without it: no control"
    if several:
        text += "; NAME=FILE, once for each of several branches: --car canny=a.pth --car depth=b.pth"
    parser.add_argument("--car", type=Path, action="append" if several else "store", help=text)
    parser.add_argument("--control-type", choices=CONTROL_TYPES, help="what --car was trained on")
    parser.add_argument(
        "--patch-nums",
        dest="sides",
        metavar="PATCH_NUMS",
        type=integers,
        help="tokens per edge of each scale, where they are not the official ones",
    )
    parser.add_argument("--sides", type=integers, default=argparse.SUPPRESS, help=argparse.SUPPRESS)  # its old name


def load_official(args: argparse.Namespace) -> Model:
    """The model of `add_official_arguments`' files. Raises ConfigError, OfficialCheckpointError."""
    if args.vae is None:
        raise ConfigError("--vae is missing; give the official tokenizer, e.g. --vae vae_ch160v4096z32.pth")
    if args.car is not None and args.control_type is None:
        raise ConfigError(
            f"--control-type is missing; say what {args.car.name} was trained on: {', '.join(CONTROL_TYPES)}"
        )
    var, car = (official.load_pth(p) if p is not None else None for p in (args.var, args.car))
    return official.build_model(official.load_pth(args.vae), var, car, args.control_type or "canny", args.sides)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_official_arguments(parser)
    parser.add_argument("-o", "--output", type=Path, required=True, help="checkpoint to write")


def run(args: argparse.Namespace) -> Path:
    """Write the checkpoint; returns its folder."""
    return checkpoint.save(load_official(args), args.output)
