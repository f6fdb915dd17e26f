"""`python -m car_train`: fetch data, train the three stages, evaluate, sample, import the published weights."""

from __future__ import annotations

import argparse
import io
import sys
import warnings
from pathlib import Path
from typing import Any

from car_train.data import annotate, datasets, pretrained
from car_train.errors import UserError, error_lines
from car_train.evaluation import curves, evaluate, generate
from car_train.interop import command as interop
from car_train.streams import (
    Terminated,
    after_broken_pipe,
    one_line_warning,
    open_closed_streams,
    terminated_politely,
)
from car_train.training import command as training
from car_train.training.distributed import World

EXAMPLES = """examples:
  python -m car_train data emoji
  python -m car_train vqvae --data ~/.cache/car/data/emoji -o runs/vqvae --patch-nums 1,2,3,4,6,8 \\
      --channels 24 --multipliers 1,2,3,4
  python -m car_train var --data ~/.cache/car/data/emoji --vqvae runs/vqvae -o runs/var \\
      --depth 6 --width 192 --heads 6
  python -m car_train car --data ~/.cache/car/data/emoji --base runs/var -o runs/car --control canny
  torchrun --nproc-per-node 4 -m car_train car --device cuda --bf16 --base runs/var -o runs/car --data photos
  python -m car_train controls --data photos --annotator hed -o photos-hed
  python -m car_train eval runs/car --data ~/.cache/car/data/emoji
  python -m car_train report runs/vqvae runs/var runs/car -o report.png
  python -m car_train sample runs/car --control edges.png --class 3 -o sample.png
  python -m car_train import --vae vae_ch160v4096z32.pth --var var_d16.pth --car car_depth_d16.pth \\
      --control-type depth -o d16
"""

COMMANDS: dict[str, tuple[str, Any]] = {
    "data": ("fetch a real data set and lay it out as class folders", datasets),
    **{stage: (text, training) for stage, text in training.STAGES.items()},
    "controls": ("precompute control images of a data set", annotate),
    "eval": ("losses, FID and KID, control fidelity of a checkpoint", evaluate),
    "report": ("one page of curves and samples of training runs", curves),
    "weights": ("fetch pretrained weights for losses, annotators, evaluation", pretrained),
    "sample": ("sample from a checkpoint with PyTorch (the reference loop)", generate),
    "import": ("turn official .pth files into a checkpoint", interop),
}
"""Command → (what it does, a module with `add_arguments(parser)` and `run(args)`, which returns what to print)."""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m car_train", description=__doc__, epilog=EXAMPLES, formatter_class=raw
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (text, module) in COMMANDS.items():
        description = text if module is training else module.__doc__
        command = commands.add_parser(name, help=text, description=description, formatter_class=raw)
        if module is training:
            training.add_arguments(command, name)
        else:
            module.add_arguments(command)
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> Path | None:
    """Run the command; returns what it made, to be printed. Raises UserError, OSError."""
    made: Path | None = COMMANDS[args.command][1].run(args)
    return made


def main(argv: list[str] | None = None) -> int:
    """The exit code: 0; 1 when nobody reads the output; 2 for what the user can put right; 130, 143 when stopped."""
    open_closed_streams()
    warnings.formatwarning = one_line_warning
    args = parse_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")  # a path is printed as the bytes that it is
    try:
        with terminated_politely():
            made = run(args)
        if made is not None and World.is_first():
            print(made, flush=True)
    except BrokenPipeError:
        return after_broken_pipe()
    except (UserError, OSError) as error:
        print(f"car_train: error: {error_lines(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        goes_on = "a training run and `eval --samples` continue with --resume, `controls` by itself"
        print(f"car_train: interrupted; {goes_on}", file=sys.stderr)
        return 143 if isinstance(stop, Terminated) else 130
    return 0
