"""What is measured: a plan and, for the loop in PyTorch, a model of the same weights.

torch and the exporter are imported where they are needed: processes that measure the runtime alone do without.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import inspect
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from benchmarks.harness.errors import BenchmarkError
from benchmarks.harness.machine import ROOT
from car_runtime.errors import CarError
from car_runtime.format.manifest import Manifest, read_manifest
from car_runtime.plan import open_plan
from car_train.config import SIDES_256, SIDES_512, CARConfig, ConfigError, ModelConfig, VARConfig, VQVAEConfig

if TYPE_CHECKING:
    from car_train.model import Model

CACHE = Path("~/.cache/car/benchmarks")
SEED = 0


def published(depth: int, sides: tuple[int, ...] = SIDES_256) -> ModelConfig:
    """CAR with a control branch, as published at 256×256: width 64·depth, 1000 classes."""
    return ModelConfig(
        vqvae=VQVAEConfig(sides=sides), var=VARConfig(depth=depth), car=CARConfig(control_type="depth")
    )


MODELS: dict[str, ModelConfig] = {
    "d16": published(16),
    "d16-512": published(16, SIDES_512),  # its scales are published, with another depth
    "d20": published(20),
    "d24": published(24),
    "d30": published(30),
    "tiny": ModelConfig(  # a toy, to try the command in seconds
        vqvae=VQVAEConfig(
            sides=(1, 2, 4), vocab=64, latent_channels=8, channels=8, multipliers=(1, 2), res_blocks=1, phis=3
        ),
        var=VARConfig(depth=2, width=32, heads=2, classes=5),
        car=CARConfig(control_type="depth", encoder_widths=(8, 16), encoder_strides=(2,)),
    ),
}


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where the weights of the PyTorch loop come from; JSON's own, so that another process can make the model too."""

    checkpoint: str | None = None
    model: str | None = None
    depth: int | None = None

    def config(self) -> ModelConfig:
        """The config of a model with random weights."""
        assert self.model is not None
        config = MODELS[self.model]
        assert config.var is not None
        if self.depth is None:
            return config
        var = dataclasses.replace(config.var, depth=self.depth, width=config.var.C, heads=config.var.H)
        return dataclasses.replace(config, var=var)

    def load(self) -> Model:
        """The model, frozen, in float32. BenchmarkError if the checkpoint can't be read."""
        from car_train import checkpoint

        if self.checkpoint is None:
            return random_model(self.config())
        try:
            return checkpoint.load(self.checkpoint)
        except (checkpoint.CheckpointError, OSError) as error:
            raise BenchmarkError(str(error)) from error


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A plan and, unless only the runtime is measured, the source of its weights."""

    plan: Path
    manifest: Manifest
    source: Source | None

    def reference(self) -> Model:
        """The model in PyTorch with its weights rounded as the plan stores them."""
        from car_export.plan import reference_model

        assert self.source is not None
        precision = self.manifest.precision
        return reference_model(self.source.load(), precision.compute, precision.weights)

    @property
    def cfg(self) -> float:
        """Guidance: the plan's, and on in any case."""
        return self.manifest.sampling.cfg or 4.0

    def control(self) -> NDArray[np.uint8] | None:
        """A control image, uint8 [H, W, 3]: a disc and a bar. None for a plan without control."""
        return None if self.manifest.model.control_type is None else draw_control(self.manifest.model.image_size)


def first_image(plan: str, backend: str, threads: int, cfg: float) -> dict[str, float]:
    """Open a plan and generate one image, for `in_subprocess`: seconds of each.

    It stands here because nothing that this module needs loads PyTorch, whose memory would be counted too.
    """
    began = time.perf_counter()
    with open_plan(plan, backend, threads=threads) as opened:
        ready = time.perf_counter()
        opened.generate(Workload(plan=opened.path, manifest=opened.manifest, source=None).control(), 0, cfg=cfg)
        return {"open_s": ready - began, "first_image_s": time.perf_counter() - ready}


def random_model(config: ModelConfig) -> Model:
    """Weights of ordinary size from a fixed seed: time doesn't depend on them, numbers near zero might."""
    import torch

    from car_train.model import Model

    torch.manual_seed(SEED)
    model = Model(config).requires_grad_(False).eval()
    for name, p in model.named_parameters():
        if p.ndim >= 2 and "embedding" not in name:
            p.normal_(std=p[0].numel() ** -0.5)
    return model


def draw_control(size: int) -> NDArray[np.uint8]:
    """A light disc and a bar on black, uint8 [size, size, 3]."""
    image = Image.new("RGB", (size, size))
    pen = ImageDraw.Draw(image)
    pen.ellipse((size // 4, size // 8, size * 3 // 4, size * 5 // 8), fill=(200, 200, 200))
    pen.rectangle((size // 8, size * 3 // 4, size * 7 // 8, size * 7 // 8), fill=(120, 120, 120))
    return np.asarray(image)


def existing(plan: Path, run: Path | None) -> Workload:
    """A plan of the caller's, and the checkpoint it was exported from if the loop in PyTorch is to be measured too.

    BenchmarkError if one can't be read, or if the plan was exported from another checkpoint.
    """
    from car_train import checkpoint

    manifest = read(plan)
    if run is None:
        return Workload(plan=plan, manifest=manifest, source=None)
    try:
        prints = checkpoint.fingerprint(run)
    except (checkpoint.CheckpointError, OSError) as error:
        raise BenchmarkError(str(error)) from error
    for file, digest in prints.items():
        if manifest.provenance.get(f"sha256 {file}", digest) != digest:
            raise BenchmarkError(
                f"{plan} was not exported from {run}: {file} is another; "
                "give the checkpoint that it was exported from, or leave --checkpoint out"
            )
    return Workload(plan=plan, manifest=manifest, source=Source(checkpoint=str(run)))


def random_weights(
    model: str, depth: int | None, precision: str, batches: tuple[int, ...], cache: Path, log: Callable[[str], None]
) -> Workload:
    """A model of published sizes and random weights, exported once into `cache` and found there the next time.

    The plan's name ends in a hash of the sizes and of the code that exports it. BenchmarkError for sizes that no
    model can have, or if the export fails.
    """
    from car_export.config import ExportOptions
    from car_export.plan2 import build_plan_of_2

    try:
        source = Source(model=model, depth=depth)
        config = source.config()
    except ConfigError as error:
        raise BenchmarkError(f"--model {model} --depth {depth}: {error}") from error
    assert config.var is not None

    def export(plan: Path) -> None:
        options = ExportOptions(
            output=plan,
            name=plan.name.removesuffix(".plan"),
            precision=precision,
            batches=batches,
            provenance={"weights": f"random, seed {SEED}"},
        )
        build_plan_of_2(source.load(), options, log)

    name = f"{model}-depth{config.var.depth}-{precision}-b{'.'.join(map(str, batches))}"
    plan = _made_once(cache, name, _key(config), export, log)
    return Workload(plan=plan, manifest=read(plan), source=source)


def random_branches(model: str, cache: Path, log: Callable[[str], None]) -> Path:
    """A plan of one base with the branches "depth" and "other", exported once into `cache`. BenchmarkError."""
    from car_export.config import ExportOptions
    from car_export.plan2 import build_plan_of_2

    def export(plan: Path) -> None:
        one = random_model(MODELS[model])
        other = copy.deepcopy(one)
        assert other.car is not None
        assert other.car.branch is not None
        for parameter in other.car.branch.parameters():
            parameter.data.mul_(0.9)
        options = ExportOptions(output=plan, name=plan.name.removesuffix(".plan"))
        build_plan_of_2({"depth": one, "other": other}, options, log)

    return _made_once(cache, f"{model}-branches", _key(MODELS[model]), export, log)


def int8(workload: Workload, cache: Path, log: Callable[[str], None]) -> Workload:
    """The INT8 form of a workload's plan, made once into `cache`. It has no loop of its own to compare with.

    BenchmarkError if it can't be made.
    """
    from car_export.quantize.int8 import Int8Options, to_int8

    digest = hashlib.sha256((workload.plan / "manifest.json").read_bytes())
    _add_code(digest, ROOT / "export" / "car_export" / "quantize")
    name = f"{workload.manifest.name}-int8"

    def convert(plan: Path) -> None:
        to_int8(Int8Options(source=workload.plan, output=plan, name=name), log)

    plan = _made_once(cache, name, digest.hexdigest()[:12], convert, log)
    return Workload(plan=plan, manifest=read(plan), source=None)


def _made_once(cache: Path, name: str, key: str, make: Callable[[Path], object], log: Callable[[str], None]) -> Path:
    """The plan `name`-`key` of a folder; older ones of the name are removed when a new one is in place."""
    from car_export.errors import ExportError
    from car_export.verify import VerificationError

    cache = cache.expanduser()
    plan = cache / f"{name}-{key}.plan"
    if (plan / "manifest.json").is_file():
        return plan
    log(f"making {plan.name}, once")
    try:
        make(plan)
    except (ExportError, VerificationError, CarError) as error:
        raise BenchmarkError(f"{plan.name} can't be made: {error}") from error
    for old in cache.glob(f"{name}-*.plan"):
        if old != plan:
            shutil.rmtree(old, ignore_errors=True)
    return plan


def _key(config: ModelConfig) -> str:
    """12 hex digits of a hash of the sizes and of the code that makes the graphs and the weights."""
    digest = hashlib.sha256(json.dumps(dataclasses.asdict(config), sort_keys=True).encode())
    _add_code(digest, ROOT / "car_train" / "model")
    _add_code(digest, ROOT / "export" / "car_export")
    digest.update(inspect.getsource(random_model).encode())
    return digest.hexdigest()[:12]


def _add_code(digest: Any, folder: Path) -> None:
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.read_bytes())


def read(plan: Path) -> Manifest:
    try:
        return read_manifest(plan)
    except CarError as error:
        raise BenchmarkError(str(error)) from error
