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
from car_export.sizes import base_config, encoder_widths
from car_runtime.errors import CarError
from car_runtime.format.manifest import Manifest, read_manifest
from car_runtime.format.parameters import UnsupportedGraphError, plan_parameters
from car_runtime.plan import default_plan
from car_train import checkpoint
from car_train.config import CARConfig, ConfigError, ModelConfig
from car_train.conventions import PRESETS
from car_train.model import Model


class Stored:
    """The parameters in a plan's table, base and one branch, by their names in a checkpoint."""

    def __init__(self, manifest: Manifest, branch: str | None) -> None:
        own = f"branches.{branch}."
        self._entries = manifest.parameters
        self.names = {
            name if name.startswith("vqvae.") else "car." + re.sub(rf"^{re.escape(own)}", "branch.", name): name
            for name in manifest.parameters
            if name.startswith(("vqvae.", "base.", own))
        }
        """Name in a checkpoint → in the table."""

    def has(self, name: str) -> bool:
        return name in self.names

    def shape(self, name: str) -> tuple[int, ...]:
        entry = self._entries[self.names[name]]
        return entry.shape[::-1] if entry.layout == "transposed" else entry.shape

    def count(self, pattern: str) -> int:
        return 1 + max((int(match[1]) for name in self.names if (match := re.match(pattern, name))), default=-1)


def plan_model(path: Path, branch: str | None = None) -> Model:
    """The model of a plan with one branch (None: the default one, if any), float32, frozen and in eval mode.

    Raises BenchmarkError for what is no plan of format 2 in float32 or float16.
    """
    try:
        manifest = read_manifest(path)
        branch = manifest.model.default_branch if branch is None else branch
        if branch is not None and branch not in manifest.model.branches:
            raise BenchmarkError(f"{path} has no branch {branch!r}; choose of: {', '.join(manifest.model.branches)}")
        parameters, stored = plan_parameters(manifest, path), Stored(manifest, branch)
        config = config_of(manifest, stored, branch)
        with torch.device("meta"):
            model = Model(config)
        values = {}
        for name, wanted in model.state_dict().items():
            array = parameters.view(stored.names[name], *wanted.shape)
            values[name] = torch.from_numpy(np.array(array, np.float32))
        model.load_state_dict(values, assign=True)
    except (CarError, UnsupportedGraphError, ConfigError, KeyError, StopIteration) as error:
        raise BenchmarkError(f"{path} can't be made a checkpoint ({error}); give a plan of format 2") from error
    model.vqvae.quantizer.reset_buffers()
    return model.requires_grad_(False).eval()


def config_of(manifest: Manifest, stored: Stored, branch: str | None) -> ModelConfig:
    """The config of a plan's model, as far as the shapes of its parameters and its manifest show it."""
    facts = manifest.model
    vqvae, var = base_config(manifest, stored)
    car = None if branch is None else _branch(manifest, branch, stored)
    return ModelConfig(vqvae=vqvae, var=var, car=car, class_names=facts.class_names)


def _branch(manifest: Manifest, name: str, stored: Stored) -> CARConfig:
    facts = manifest.model.branches[name]
    convention = asdict(facts.control_convention) if facts.control_convention is not None else None
    preset = next(key for key, known in PRESETS.items() if asdict(known) == convention)
    kind: dict[str, Any] = {"control_type": facts.control_type, "convention": preset}
    kind |= {"transformer": facts.transformer, "fusion": facts.fusion}
    widths = tuple(encoder_widths(stored).values())
    if not widths:
        return CARConfig(**kind, encoder="vqvae")
    halvings = stored.count(r"vqvae\.encoder\.levels\.(\d+)\.") - 1
    strides = (2,) * halvings + (1,) * (len(widths) - 1 - halvings)
    return CARConfig(**kind, encoder_widths=widths, encoder_strides=strides)


def run(args: argparse.Namespace, log: Log) -> None:
    print(checkpoint.save(plan_model(args.plan or default_plan(), args.branch), args.output))


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = make_parser("from_plan", __doc__)
    parser.add_argument("plan", type=Path, nargs="?", help="plan directory (default: the shipped one)")
    parser.add_argument("--branch", metavar="NAME", help="of a plan with several (default: its default branch)")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the checkpoint, a folder")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    return guarded("benchmarks.from_plan", lambda log: run(args, log))


if __name__ == "__main__":
    sys.exit(main())
