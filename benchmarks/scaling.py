"""How the loss of VAR falls with its size: several depths trained on the same tokens, and a power law through them.

    python -m benchmarks.scaling --data ~/.cache/car/data/emoji --vqvae runs/vqvae \\
        -o docs/scaling.json --plot docs/images/scaling.png

VAR (arXiv 2404.02905, section 4.2, figure 5) trains depths 6 to 30 with width 64·depth and finds, for the test loss L
and the token error rate Err, over all tokens and over those of the last scale, L = (β·N)^α: a straight line in
log-log axes, with a Pearson correlation near −1. N counts the parameters of the blocks (attention, MLP, AdaLN:
18·depth·width²), not embeddings and head.

With compute it does the same (equations 13 to 16): every validation of every size is a point (C, value), with
C = 6·N·tokens seen so far; the Pareto front are those that no point of as little compute is as good as, and a power
law (β·C)^α goes through them. The slope of a front of unfinished schedules is not that of finished ones.

Here all sizes see the same images in the same order and the same number of times, with the same augmentation,
dropped labels and schedule. Only the learning rate follows the size: `lr`·√(`LR_WIDTH`/width), so that what is tuned
for one width is neither too hot for wider ones nor too cold for narrower ones. Validation is the trainer's: all
tokens of all held-out images, teacher-forced, label given.

The result is one JSON object (`benchmarks.harness.records`) with the keys `fits` and `fits_compute` besides. It is
written after every size; a size in it, under the same settings, is not trained again, and one that was interrupted
goes on from its checkpoint.
"""

from __future__ import annotations

import argparse
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

from benchmarks.harness.cli import Log, guarded, make_parser, numbers
from benchmarks.harness.errors import BenchmarkError
from benchmarks.harness.records import emit, record
from benchmarks.harness.tables import markdown_table
from car_train import checkpoint
from car_train.config import ConfigError, ModelConfig, VARConfig
from car_train.data.folder import find_images
from car_train.evaluation.runs import ReportError, Run, read_run, summary
from car_train.files import written_aside
from car_train.model import Model
from car_train.training.options import PRECISIONS, TrainOptions
from car_train.training.stages import TransformerStage, add_var
from car_train.training.trainer import Trainer, seed_everything

LR_WIDTH = 192
"""Width at which a size's learning rate is `--lr`: that of the transformer in the 64×64 plan."""

MEASURES = {
    "loss": "Validation loss, all tokens (nats)",
    "loss_last": "Validation loss, last scale (nats)",
    "error": "Token error rate, all tokens",
    "error_last": "Token error rate, last scale",
}
FEWEST = 3
"""Sizes through which a line says anything: two are always on one."""


@dataclass(frozen=True)
class Size:
    """One model of the series; heads are as many as blocks, as VAR has it."""

    depth: int
    width: int

    def config(self, classes: int) -> VARConfig:
        return VARConfig(depth=self.depth, width=self.width, heads=self.depth, classes=classes)

    def lr(self, lr: float) -> float:
        """The learning rate of this size. lr: that at `LR_WIDTH`."""
        return lr * math.sqrt(LR_WIDTH / self.width)


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """What the result depends on, in words that mean the same on another machine."""
    tokens = checkpoint.load(args.vqvae).config.vqvae.tokens
    return {
        "data": args.data.name,
        "images": _fingerprint_images(args.data),
        "tokenizer": checkpoint.fingerprint(args.vqvae)["vqvae.safetensors"][:16],
        "tokens_per_image": tokens,
        "tokens": args.steps * args.batch * tokens,
        **{k: getattr(args, k) for k in ("steps", "batch", "lr", "warmup", "seed", "precision", "views")},
        "lr_rule": f"lr·√({LR_WIDTH}/width)",
        "width_per_depth": args.width_per_depth,
    }


def block_parameters(config: ModelConfig) -> int:
    """N: parameters of all transformer blocks; embeddings, positions and head are left out, as in VAR's figure 5."""
    with torch.device("meta"):
        model = Model(config)
    assert model.car is not None, "config.var"
    return sum(p.numel() for block in model.car.base.blocks for p in block.parameters())


def _fingerprint_images(root: Path) -> str:
    """16 hex digits of a hash of the names and sizes of all images."""
    digest = hashlib.sha256()
    for path, label in find_images(root)[1]:
        digest.update(f"{path.relative_to(root).as_posix()}\0{label}\0{path.stat().st_size}\n".encode())
    return digest.hexdigest()[:16]


def train(args: argparse.Namespace, size: Size, folder: Path) -> None:
    """Train one size into a run's folder, or go on with what is there."""
    names = tuple(find_images(args.data)[0])
    seed_everything(args.seed)
    stage = TransformerStage(add_var(checkpoint.load(args.vqvae), size.config(len(names)), names))
    quarter = max(1, args.steps // 4)
    same = "data steps batch warmup seed precision views workers threads device token_root".split()
    options = TrainOptions(
        output=folder,
        lr=size.lr(args.lr),
        validate_every=quarter,
        save_every=quarter,
        keep=1,
        **{name: getattr(args, name) for name in same},
    )
    trainer = Trainer(stage, options)
    if checkpoint.of_run(folder):
        trainer.resume()
    trainer.run()


def measure(args: argparse.Namespace, size: Size, settings: dict[str, Any]) -> dict[str, Any]:
    """One row of the result; the training is done first where it isn't yet."""
    folder = args.runs / f"d{size.depth}-w{size.width}-{_key(settings)}"
    if _finished(folder, args.steps) is None:
        train(args, size, folder)
    finished = _finished(folder, args.steps)
    if finished is None:
        raise BenchmarkError(f"{folder}: has no validation at step {args.steps}; remove the folder and run again")
    run = read_run(folder)
    if run.config is None:
        raise BenchmarkError(f"{folder}: its run.json names no sizes; remove the folder and run again")
    last = finished["last"]
    return {
        "depth": size.depth,
        "width": size.width,
        "block_parameters": block_parameters(run.config),
        "all_parameters": finished["parameters"]["trainable"],
        "lr": size.lr(args.lr),
        "loss": last["val_loss"],
        "loss_last": last["val_loss_last"],
        "error": 1 - last["val_accuracy"],
        "error_last": 1 - last["val_accuracy_last"],
        "curve": curve(run, block_parameters(run.config), settings["tokens"] / settings["steps"]),
        "train_seconds": finished["seconds"],
        "images_per_second": finished["images_per_second"],
    }


def curve(run: Run, parameters: int, tokens_per_step: float) -> list[dict[str, float]]:
    """{"compute", "loss", …} of every validation of a run; compute in operations, 6·N·tokens."""
    validated = [r for r in run.records if "val_loss" in r]
    return [
        {
            "compute": 6 * parameters * tokens_per_step * r["step"],
            "loss": r["val_loss"],
            "loss_last": r["val_loss_last"],
            "error": 1 - r["val_accuracy"],
            "error_last": 1 - r["val_accuracy_last"],
        }
        for r in validated
    ]


def pareto(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points (compute, value) that are better than every other of no more compute, by compute."""
    front: list[tuple[float, float]] = []
    for compute, value in sorted(points):
        if not front or value < front[-1][1]:
            front.append((compute, value))
    return front


def compute_law(rows: Sequence[dict[str, Any]], measure: str) -> dict[str, float] | None:
    """The power law of a measure's Pareto front in compute, with its points; None where there is none."""
    front = pareto([(point["compute"], point[measure]) for row in rows for point in row["curve"]])
    law = power_law([compute for compute, _ in front], [value for _, value in front])
    return None if law is None else {**law, "points": len(front)}


def _key(settings: dict[str, Any]) -> str:
    """A name for the settings: runs under other ones stand in other folders."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]


def _finished(folder: Path, steps: int) -> dict[str, Any] | None:
    """The run's summary, if it was validated at its last step."""
    try:
        found = summary(folder)
    except ReportError:
        return None
    return found if found["last"] is not None and found["last"]["step"] == steps else None


def power_law(parameters: Sequence[float], values: Sequence[float]) -> dict[str, float] | None:
    """{"alpha", "beta", "pearson"} of values = (β·N)^α: least squares of log value over log N.

    None where there is no such law: fewer than three sizes, all values the same, or one that has no logarithm, as an
    error rate of 0.
    """
    if len(set(parameters)) < FEWEST or len(set(values)) < 2 or min(values) <= 0:
        return None
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
    """The record with its fits: of each measure that has one."""
    ordered = sorted(rows, key=lambda row: (row["block_parameters"], row["depth"]))
    found = record("scaling", settings, ordered)
    sizes = [row["block_parameters"] for row in ordered]
    fits = {m: power_law(sizes, [r[m] for r in ordered]) for m in MEASURES}
    laws = {m: compute_law(ordered, m) for m in MEASURES} if len(ordered) >= FEWEST else {}
    return {
        **found,
        "fits": {m: law for m, law in fits.items() if law is not None},
        "fits_compute": {m: law for m, law in laws.items() if law is not None},
    }


def write(output: Path, content: bytes) -> None:
    """Written aside and renamed."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with written_aside(output) as file:
        file.write_bytes(content)


def plot(found: dict[str, Any]) -> bytes:
    """The eight diagrams as PNG: above sizes as dots and power laws as lines, below the same in compute."""
    from benchmarks.analysis.plots import page

    with page(9.6, 4, 2) as (panels, finished):
        for axes, name in zip(panels, MEASURES, strict=False):
            _draw_fit(axes, found["results"], name, found["fits"].get(name))
        for axes, name in zip(panels[len(MEASURES) :], MEASURES, strict=True):
            _draw_compute(axes, found["results"], name, found["fits_compute"].get(name))
        return finished()


def _draw_compute(axes: Any, rows: Sequence[dict[str, Any]], name: str, law: dict[str, float] | None) -> None:
    """Every size's validations over its compute, and the law of their Pareto front."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

    from benchmarks.analysis.plots import COLOURS, GREY

    for colour, row in zip(COLOURS, rows, strict=False):
        x, y = ([point[key] for point in row["curve"]] for key in ("compute", name))
        axes.plot(x, y, ".-", color=colour, linewidth=0.8, label=f"d{row['depth']}")
    if law is not None:
        front = pareto([(point["compute"], point[name]) for row in rows for point in row["curve"]])
        line = np.geomspace(front[0][0], front[-1][0], 50)
        text = f"front: (βC)^α,  α = {law['alpha']:.3f}\nPearson's r = {law['pearson']:.4f}"
        axes.plot(line, (law["beta"] * line) ** law["alpha"], color=GREY, linewidth=1, linestyle=(0, (4, 3)))
        axes.text(0.97, 0.95, text, transform=axes.transAxes, ha="right", va="top")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_title(MEASURES[name], loc="left")
    axes.set_xlabel("operations, C = 6·N·tokens")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda c, _: f"{c:.0e}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(FixedLocator(MaxNLocator(6).tick_values(*axes.get_ylim())))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:.3g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.legend(loc="lower left", ncols=2)


def _draw_fit(axes: Any, rows: Sequence[dict[str, Any]], name: str, fit: dict[str, float] | None) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

    from benchmarks.analysis.plots import GREY, OURS

    sizes, values = (np.array([row[k] for row in rows], np.float64) for k in ("block_parameters", name))
    if fit is not None:
        line = np.geomspace(sizes.min() / 1.3, sizes.max() * 1.3, 50)
        law = f"(βN)^α,  α = {fit['alpha']:.3f},  β = {fit['beta']:.2e}\nPearson's r = {fit['pearson']:.4f}"
        axes.plot(line, (fit["beta"] * line) ** fit["alpha"], color=GREY, linewidth=1, linestyle=(0, (4, 3)))
        axes.text(0.97, 0.95, law, transform=axes.transAxes, ha="right", va="top")
    axes.plot(sizes, values, "o", color=OURS, markersize=5)
    axes.set_title(MEASURES[name], loc="left")
    for row, x, y in zip(rows, sizes, values, strict=True):
        axes.annotate(f"d{row['depth']}", (x, y), (-3, -10), textcoords="offset points", ha="right", color=GREY)
    axes.set_xscale("log")
    if values.min() > 0:
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
    found = numbers(text)
    if len(found) < FEWEST:
        raise argparse.ArgumentTypeError(f"{text!r}: a fit needs at least {FEWEST} different depths")
    return found


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = make_parser("scaling", __doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of class folders")
    parser.add_argument("--vqvae", type=Path, required=True, help="checkpoint or run of the tokenizer")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the result, .json")
    parser.add_argument("--plot", type=Path, help="also a diagram of it, .png")
    parser.add_argument("--depths", type=depths, default=(2, 3, 4, 5, 6), help="(default: 2,3,4,5,6)")
    parser.add_argument(
        "--width-per-depth", type=int, default=32, help="width is this times depth (default: 32; VAR: 64)"
    )
    parser.add_argument(
        "--tokens", type=float, default=3e6, help="tokens each size is trained on, in all passes (default: 3e6)"
    )
    parser.add_argument("--batch", type=int, default=32, help="images a step (default: 32)")
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


def run(args: argparse.Namespace, log: Log) -> None:
    """Train what is missing, write the result after each size, show it."""
    check(args)
    settings = settings_of(args)
    rows = read_done(args.output, settings)
    for depth in sorted(args.depths):
        size = Size(depth, args.width_per_depth * depth)
        if (size.depth, size.width) in rows:
            log(f"depth {depth}: measured before")
            continue
        log(f"depth {depth}, width {size.width}: {args.steps} steps of {args.batch}")
        rows[size.depth, size.width] = measure(args, size, settings)
        found = result(settings, list(rows.values()))
        write(args.output, (json.dumps(found, indent=2, ensure_ascii=False) + "\n").encode("utf-8"))
    found = json.loads(args.output.read_text(encoding="utf-8"))  # measured now or before: it says when and where
    if args.plot is not None:
        write(args.plot, plot(found))
    print(markdown_table([{k: v for k, v in row.items() if k != "curve"} for row in found["results"]]))
    print()
    print(markdown_table([{"measure": name, **fit} for name, fit in found["fits"].items()]))
    print()
    print(markdown_table([{"in compute": name, **fit} for name, fit in found.get("fits_compute", {}).items()]))
    print()
    emit(found)


def check(args: argparse.Namespace) -> None:
    """Raise ConfigError for what can't be trained; fill in `steps`."""
    if args.width_per_depth < 1 or args.batch < 1:
        raise ConfigError(f"width-per-depth {args.width_per_depth}, batch {args.batch}; both must be at least 1")
    per_step = args.batch * checkpoint.load(args.vqvae).config.vqvae.tokens
    if not per_step <= args.tokens < math.inf:
        raise ConfigError(f"tokens is {args.tokens:g}; give at least one step's, {per_step}")
    if args.plot is not None and args.plot.suffix != ".png":
        raise ConfigError(f"--plot {args.plot}: give a file that ends with .png")
    args.data, args.steps = args.data.expanduser(), int(args.tokens // per_step)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    stopped = "the same command goes on from the last checkpoint"
    return guarded("benchmarks.scaling", lambda log: run(args, log), stopped)


if __name__ == "__main__":
    sys.exit(main())
