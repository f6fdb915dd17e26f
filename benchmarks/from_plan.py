"""The checkpoint that a plan of format 2 was exported from, made again of the parameters that its manifest names.

    python -m benchmarks.from_plan -o runs/shipped                    # the shipped plan, with its default branch
    python -m car_train eval runs/shipped --tokenizer --data ~/.cache/car/data/emoji

Values are those that the plan stores: float32 ones bit for bit, float16 ones as they were rounded. What a plan
doesn't know (dropped labels, stochastic depth) is the default of training. The first strides of a convolutional 𝓕
are 2, as training makes them.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.harness.cli import Log, guarded, make_parser
from benchmarks.harness.errors import BenchmarkError
from car_runtime.errors import CarError
from car_runtime.format.manifest import Manifest, read_manifest
from car_runtime.format.parameters import UnsupportedGraphError, plan_parameters
from car_runtime.plan import default_plan
from car_train import checkpoint
from car_train.config import CARConfig, ConfigError, ModelConfig, VARConfig, VQVAEConfig
from car_train.conventions import PRESETS
from car_train.model import Model

Shapes = dict[str, tuple[int, ...]]


def plan_model(path: Path) -> Model:
    """The model of a plan with its default branch, float32, frozen and in eval mode.

    Raises BenchmarkError for what is no plan of format 2 in float32 or float16.
    """
    try:
        manifest = read_manifest(path)
        parameters = plan_parameters(manifest, path)
        config = config_of(manifest)
        with torch.device("meta"):
            model = Model(config)
        values = {}
        for name, wanted in model.state_dict().items():
            stored = parameters.view(_in_plan(name, manifest), *wanted.shape)
            values[name] = torch.from_numpy(np.array(stored, np.float32))
        model.load_state_dict(values, assign=True)
    except (CarError, UnsupportedGraphError, ConfigError, KeyError, StopIteration) as error:
        raise BenchmarkError(f"{path} can't be made a checkpoint ({error}); give a plan of format 2") from error
    model.vqvae.quantizer.reset_buffers()
    return model.requires_grad_(False).eval()


def _in_plan(name: str, manifest: Manifest) -> str:
    """A parameter's name in the manifest's table: "car.base.…" is "base.…", "car.branch.…" "branches.NAME.…"."""
    name = name.removeprefix("car.")
    return re.sub(r"^branch\.", f"branches.{manifest.model.default_branch}.", name)


def config_of(manifest: Manifest) -> ModelConfig:
    """The config of a plan's model, as far as the shapes of its parameters and its manifest show it."""
    facts = manifest.model
    shapes: Shapes = {
        name: entry.shape[::-1] if entry.layout == "transposed" else entry.shape
        for name, entry in manifest.parameters.items()
    }
    channels = shapes["vqvae.encoder.conv_in.weight"][0]
    levels = _count(shapes, r"vqvae\.encoder\.levels\.(\d+)\.")
    widths = [shapes[f"vqvae.encoder.levels.{i}.block.0.conv1.weight"][0] for i in range(levels)]
    vqvae = VQVAEConfig(
        sides=tuple(scale.side for scale in manifest.scales),
        vocab=facts.vocab,
        latent_channels=facts.latent_channels,
        channels=channels,
        multipliers=tuple(width // channels for width in widths),
        res_blocks=_count(shapes, r"vqvae\.encoder\.levels\.0\.block\.(\d+)\."),
        phis=shapes["vqvae.quantizer.phi_weight"][0] // facts.latent_channels,
    )
    var = VARConfig(
        depth=facts.depth,
        width=facts.width,
        heads=facts.heads,
        classes=facts.classes,
        shared_aln="base.shared_ada_linear.weight" in shapes,
        mlp_ratio=shapes["base.blocks.0.mlp.fc1.weight"][0] // facts.width,
    )
    car = None if facts.default_branch is None else _branch(manifest, facts.default_branch, shapes)
    return ModelConfig(vqvae=vqvae, var=var, car=car, class_names=facts.class_names)


def _branch(manifest: Manifest, name: str, shapes: Shapes) -> CARConfig:
    facts, at = manifest.model.branches[name], f"branches.{name}.encoder."
    convention = asdict(facts.control_convention) if facts.control_convention is not None else None
    preset = next(key for key, known in PRESETS.items() if asdict(known) == convention)
    kind: dict[str, Any] = {"control_type": facts.control_type, "convention": preset}
    kind |= {"transformer": facts.transformer, "fusion": facts.fusion}
    if f"{at}conv_in.weight" not in shapes:
        return CARConfig(**kind, encoder="vqvae")
    steps = _count(shapes, re.escape(at) + r"steps\.(\d+)\.")
    widths = [shapes[f"{at}{one}.weight"][0] for one in ("conv_in", *(f"steps.{i}" for i in range(1, steps, 2)))]
    halvings = _count(shapes, r"vqvae\.encoder\.levels\.(\d+)\.") - 1
    strides = (2,) * halvings + (1,) * (len(widths) - 1 - halvings)
    return CARConfig(**kind, encoder_widths=tuple(widths), encoder_strides=strides)


def _count(shapes: Shapes, pattern: str) -> int:
    """How many numbers 0, 1, … stand in the place of a pattern's group."""
    return 1 + max((int(match[1]) for name in shapes if (match := re.match(pattern, name))), default=-1)


def run(args: argparse.Namespace, log: Log) -> None:
    print(checkpoint.save(plan_model(args.plan or default_plan()), args.output))


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = make_parser("from_plan", __doc__)
    parser.add_argument("plan", type=Path, nargs="?", help="plan directory (default: the shipped one)")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the checkpoint, a folder")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    return guarded("benchmarks.from_plan", lambda log: run(args, log))


if __name__ == "__main__":
    sys.exit(main())
