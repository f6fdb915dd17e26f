"""How the loss of VAR falls with its size: several depths trained on the same tokens, and a power law through them.

    python -m benchmarks.scaling --data ~/.cache/car/data/emoji --vqvae runs/vqvae -o docs/scaling.json \\
        --plot docs/images/scaling.png

VAR (arXiv 2404.02905, section 4.2, figure 5) trains depths 6 to 30 with width 64·depth and finds, for the test loss L
and the token error rate Err, over all tokens and over those of the last scale, L = (β·N)^α: a straight line in
log-log axes, with a Pearson correlation near −1. N counts the parameters of the blocks (attention, MLP, AdaLN:
18·depth·width²), not embeddings and head.

Here all sizes see the same pictures in the same order and the same number of times, with the same augmentation,
dropped labels and schedule. Only the learning rate follows the size: `lr`·√(`LR_WIDTH`/width), so that what is tuned
for one width is neither too hot for wider ones nor too cold for narrower ones. Validation is the trainer's: all
tokens of all held-out pictures, teacher-forced, label given.

The result is one JSON object (`benchmarks.harness.machine`) with the key `fits` besides. It is written after every
size; a size in it, under the same settings, is not trained again, and one that was interrupted goes on from its
checkpoint.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.harness.machine import BenchmarkError, emit, markdown_table, record
from car_train import checkpoint
from car_train.config import ConfigError, ModelConfig, VARConfig
from car_train.data.folder import DataError, find_images
from car_train.evaluation.runs import ReportError, read_run, summary
from car_train.files import written_aside
from car_train.model import Model
from car_train.training.options import PRECISIONS, TrainOptions
from car_train.training.stages import TransformerStage, add_var
from car_train.training.trainer import Trainer, TrainingError, seed_everything

LR_WIDTH = 192
"""Width at which a size's learning rate is `--lr`: that of the transformer in the shipped plan."""

MEASURES = {
    "loss": "Validation loss, all tokens (nats)",
    "loss_last": "Validation loss, last scale (nats)",
    "error": "Token error rate, all tokens",
    "error_last": "Token error rate, last scale",
}
FEWEST = 3
"""Sizes through which a line says anything: two are always on one."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What all sizes have in common."""

    data: Path
    vqvae: Path
    runs: Path
    """Folder of the training runs, one a size."""
    steps: int
    batch: int
    lr: float
    warmup: int
    seed: int
    precision: str
    views: int
    workers: int
    threads: int
    device: str
    token_root: Path | None

    def settings(self) -> dict[str, Any]:
        """What the result depends on, in words that mean the same on another machine."""
        tokens = checkpoint.load(self.vqvae).config.vqvae.tokens
        chosen = {k: getattr(self, k) for k in ("steps", "batch", "lr", "warmup", "seed", "precision", "views")}
        return {
            "data": self.data.name,
            "pictures": _fingerprint_pictures(self.data),
            "tokenizer": checkpoint.fingerprint(self.vqvae)["vqvae.safetensors"][:16],
            "tokens_per_picture": tokens,
            "tokens": self.steps * self.batch * tokens,
            **chosen,
            "lr_rule": f"lr·√({LR_WIDTH}/width)",
        }


@dataclass(frozen=True)
class Size:
    """One model of the series; heads are as many as blocks, as VAR has it."""

    depth: int
    width: int

    def config(self, classes: int) -> VARConfig:
        return VARConfig(depth=self.depth, width=self.width, heads=self.depth, classes=classes)

    def lr(self, plan: Plan) -> float:
        return plan.lr * math.sqrt(LR_WIDTH / self.width)


def block_parameters(config: ModelConfig) -> int:
    """N: parameters of all transformer blocks; embeddings, positions and head are left out, as in VAR's figure 5."""
    with torch.device("meta"):
        model = Model(config)
    assert model.car is not None, "config.var"
    return sum(p.numel() for block in model.car.base.blocks for p in block.parameters())


def _fingerprint_pictures(root: Path) -> str:
    """Of the names and sizes of all pictures, 16 hex digits."""
    digest = hashlib.sha256()
    for path, label in find_images(root)[1]:
        digest.update(f"{path.relative_to(root).as_posix()}\0{label}\0{path.stat().st_size}\n".encode())
    return digest.hexdigest()[:16]


def train(plan: Plan, size: Size, folder: Path) -> None:
    """Train one size into a run's folder, or go on with what is there."""
    names = tuple(find_images(plan.data)[0])
    seed_everything(plan.seed)
    stage = TransformerStage(add_var(checkpoint.load(plan.vqvae), size.config(len(names)), names))
    quarter = max(1, plan.steps // 4)
    options = TrainOptions(
        data=plan.data,
        output=folder,
        steps=plan.steps,
        batch=plan.batch,
        lr=size.lr(plan),
        warmup=plan.warmup,
        seed=plan.seed,
        precision=plan.precision,
        views=plan.views,
        workers=plan.workers,
        threads=plan.threads,
        device=plan.device,
        token_root=plan.token_root,
        validate_every=quarter,
        save_every=quarter,
        keep=1,
    )
    trainer = Trainer(stage, options)
    if checkpoint.of_run(folder):
        trainer.resume()
    trainer.run()


def measure(plan: Plan, size: Size, settings: dict[str, Any]) -> dict[str, Any]:
    """One row of the result; the training is done first where it isn't yet."""
    folder = plan.runs / f"d{size.depth}-w{size.width}-{_key(settings)}"
    if _finished(folder, plan.steps) is None:
        train(plan, size, folder)
    told = _finished(folder, plan.steps)
    if told is None:
        raise BenchmarkError(f"{folder}: has no validation at step {plan.steps}; remove the folder and run again")
    run = read_run(folder)
    if run.config is None:
        raise BenchmarkError(f"{folder}: its run.json names no sizes; remove the folder and run again")
    last = told["last"]
    return {
        "depth": size.depth,
        "width": size.width,
        "block_parameters": block_parameters(run.config),
        "all_parameters": told["parameters"]["trainable"],
        "lr": size.lr(plan),
        "loss": last["val_loss"],
        "loss_last": last["val_loss_last"],
        "error": 1 - last["val_accuracy"],
        "error_last": 1 - last["val_accuracy_last"],
        "train_seconds": told["seconds"],
        "images_per_second": told["images_per_second"],
    }


def _key(settings: dict[str, Any]) -> str:
    """A name for the settings: runs under other ones stand in other folders."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]


def _finished(folder: Path, steps: int) -> dict[str, Any] | None:
    """The run's summary, if it was validated at its last step."""
    try:
        told = summary(folder)
    except ReportError:
        return None
    return told if told["last"] is not None and told["last"]["step"] == steps else None


def power_law(parameters: Sequence[float], values: Sequence[float]) -> dict[str, float]:
    """{"alpha", "beta", "pearson"} of values = (β·N)^α: least squares of log value over log N.

    Raises BenchmarkError: fewer than three sizes, equal sizes, values that are not positive or all the same.
    """
    if len(values) < FEWEST or len(set(parameters)) < FEWEST or len(set(values)) < 2:
        raise BenchmarkError(f"{len(set(parameters))} sizes; give at least {FEWEST} different ones")
    if min(*values, *parameters) <= 0:
        raise BenchmarkError(f"values from {min(values):g}; a power law has positive ones, train for longer")
    x, y = np.log(parameters), np.log(values)
    alpha, intercept = np.polyfit(x, y, 1)
    return {
        "alpha": float(alpha),
        "beta": float(np.exp(intercept / alpha)),
        "pearson": float(np.corrcoef(x, y)[0, 1]),
    }


def read_done(output: Path, settings: dict[str, Any]) -> dict[tuple[int, int], dict[str, Any]]:
    """Rows of an earlier result by (depth, width); BenchmarkError if it was made under other settings."""
    if not output.is_file():
        return {}
    try:
        found = json.loads(output.read_text(encoding="utf-8"))
        before, rows = found["settings"], {(row["depth"], row["width"]): row for row in found["results"]}
    except (ValueError, KeyError, TypeError) as error:
        raise BenchmarkError(f"{output}: is no result of this benchmark ({error!r}); give another file") from error
    changed = [f"{k} {before.get(k)!r} → {v!r}" for k, v in settings.items() if before.get(k) != v]
    if changed:
        raise BenchmarkError(
            f"{output}: was measured with other settings ({'; '.join(changed)}); give these again, or another file"
        )
    return rows


def result(settings: dict[str, Any], rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The record with its fits, which are there from three sizes on."""
    ordered = sorted(rows, key=lambda row: (row["block_parameters"], row["depth"]))
    found = record("scaling", settings, ordered)
    sizes = [row["block_parameters"] for row in ordered]
    enough = len(ordered) >= FEWEST
    return {**found, "fits": {m: power_law(sizes, [r[m] for r in ordered]) for m in MEASURES} if enough else {}}


def write(output: Path, content: bytes) -> None:
    """Written aside and renamed."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with written_aside(output) as file:
        file.write_bytes(content)


def plot(found: dict[str, Any]) -> bytes:
    """The four diagrams as PNG: sizes as dots, power laws as lines."""
    import io

    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine

        from car_train.evaluation.curves import STYLE
    except ImportError as error:
        raise BenchmarkError(f"--plot needs matplotlib ({error}); pip install matplotlib") from error

    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(STYLE)
        page = Figure(figsize=(8.4, 6.2), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12))
        for axes, measure_name in zip(page.subplots(2, 2).flat, MEASURES, strict=True):
            _draw_fit(axes, found["results"], measure_name, found["fits"][measure_name])
        file = io.BytesIO()
        page.savefig(file, format="png", dpi=160)
        return file.getvalue()


def _draw_fit(axes: Any, rows: Sequence[dict[str, Any]], name: str, fit: dict[str, float]) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

    from car_train.evaluation.curves import COLOURS, GREY

    sizes, values = (np.array([row[k] for row in rows], np.float64) for k in ("block_parameters", name))
    line = np.geomspace(sizes.min() / 1.3, sizes.max() * 1.3, 50)
    axes.plot(line, (fit["beta"] * line) ** fit["alpha"], color=GREY, linewidth=1, linestyle=(0, (4, 3)))
    axes.plot(sizes, values, "o", color=COLOURS[0], markersize=5)
    axes.set_title(MEASURES[name], loc="left")
    law = f"(βN)^α,  α = {fit['alpha']:.3f},  β = {fit['beta']:.2e}\nPearson's r = {fit['pearson']:.4f}"
    axes.text(0.97, 0.95, law, transform=axes.transAxes, ha="right", va="top")
    for row, x, y in zip(rows, sizes, values, strict=True):
        axes.annotate(f"d{row['depth']}", (x, y), (-3, -10), textcoords="offset points", ha="right", color=GREY)
    axes.set_xscale("log")
    axes.set_yscale("log")
    spread = max(values.max() / values.min(), 1.001) ** 0.25  # room for the letters
    axes.set_ylim(values.min() / spread, values.max() * spread**1.6)
    axes.set_xlabel("parameters of the blocks, N")
    axes.xaxis.set_major_locator(FixedLocator(sizes.tolist()))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda n, _: f"{n / 1e6:.2g} M"))
    axes.xaxis.set_minor_locator(NullLocator())
    # A few plain numbers: within one decade a logarithmic locator finds next to none.
    axes.yaxis.set_major_locator(FixedLocator(MaxNLocator(6).tick_values(*axes.get_ylim())))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:.3g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def depths(text: str) -> tuple[int, ...]:
    try:
        found = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers such as 2,3,4,6") from None
    if len(set(found)) < FEWEST or min(found) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: a fit needs at least {FEWEST} different depths, from 1")
    return found


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scaling",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of class folders")
    parser.add_argument("--vqvae", type=Path, required=True, help="checkpoint or run of the tokenizer")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the result, .json")
    parser.add_argument("--plot", type=Path, help="also a picture of it, .png")
    parser.add_argument("--depths", type=depths, default=(2, 3, 4, 5, 6), help="(default: 2,3,4,5,6)")
    parser.add_argument(
        "--width-per-depth", type=int, default=32, help="width is this times depth (default: 32; VAR: 64)"
    )
    parser.add_argument(
        "--tokens", type=float, default=3e6, help="tokens each size is trained on, in all passes (default: 3e6)"
    )
    parser.add_argument("--batch", type=int, default=32, help="pictures a step (default: 32)")
    parser.add_argument("--lr", type=float, default=1e-3, help=f"peak, at width {LR_WIDTH} (default: 1e-3)")
    parser.add_argument("--warmup", type=int, default=100, help="steps (default: 100)")
    parser.add_argument("--seed", type=int, default=0, help="(default: 0)")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32", help="(default: fp32)")
    parser.add_argument("--views", type=int, default=8, help="augmentations in the token cache (default: 8)")
    parser.add_argument("--workers", type=int, default=0, help="data loader processes (default: 0)")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (default: 0, all)")
    parser.add_argument("--device", default="cpu", help="e.g. cuda (default: cpu)")
    parser.add_argument("--runs", type=Path, default=Path("runs/scaling"), help="(default: runs/scaling)")
    parser.add_argument("--token-root", type=Path, help="folder of token caches (default: the trainer's)")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Train what is missing, write the result after each size; returns it."""
    plan, sizes = _plan(args)
    settings = plan.settings() | {"width_per_depth": args.width_per_depth}
    rows = read_done(args.output, settings)
    for size in sizes:
        if (size.depth, size.width) in rows:
            print(f"depth {size.depth}: measured before", file=sys.stderr)
            continue
        print(f"depth {size.depth}, width {size.width}: {plan.steps} steps of {plan.batch}", file=sys.stderr)
        rows[size.depth, size.width] = measure(plan, size, settings)
        found = result(settings, list(rows.values()))
        write(args.output, (json.dumps(found, indent=2, ensure_ascii=False) + "\n").encode("utf-8"))
    found = json.loads(args.output.read_text(encoding="utf-8"))  # measured now or before: it says when and where
    if args.plot is not None:
        write(args.plot, plot(found))
    return found


def _plan(args: argparse.Namespace) -> tuple[Plan, list[Size]]:
    if args.width_per_depth < 1 or args.batch < 1:
        raise ConfigError(f"width-per-depth {args.width_per_depth}, batch {args.batch}; both must be at least 1")
    per_step = args.batch * checkpoint.load(args.vqvae).config.vqvae.tokens
    if not per_step <= args.tokens < math.inf:
        raise ConfigError(f"tokens is {args.tokens:g}; give at least one step's, {per_step}")
    if args.plot is not None and args.plot.suffix != ".png":
        raise ConfigError(f"--plot {args.plot}: give a file that ends with .png")
    fields = {field.name for field in dataclasses.fields(Plan)}
    given = {k: v for k, v in vars(args).items() if k in fields}
    given["data"] = args.data.expanduser()
    plan = Plan(**given, steps=int(args.tokens // per_step))
    return plan, [Size(depth, args.width_per_depth * depth) for depth in sorted(set(args.depths))]


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        found = run(args)
    except (
        BenchmarkError,
        ConfigError,
        DataError,
        ReportError,
        TrainingError,
        checkpoint.CheckpointError,
        OSError,
    ) as error:
        print(f"scaling: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("scaling: interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    print(markdown_table(found["results"]))
    print()
    print(markdown_table([{"measure": name, **fit} for name, fit in found["fits"].items()]))
    print()
    emit(found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
