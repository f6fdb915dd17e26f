"""What a control encoder distinguishes: t-SNE of the control features of held-out images, by class and by type.

    python -m benchmarks.control_features runs/canny runs/depth --data ~/.cache/car/data/emoji -o features.png

CAR (figure 5) shows the features of its encoders for images of several classes. Here, as there, every
image gives one point for each checkpoint: the features of the finest scale, mean over its places, [C]. Colour is the
class, the marker the control type. The numbers behind the plot: how often the nearest neighbour of a point, in
the features themselves and not in the plane, is of its class and of its type, and how often by chance.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.harness.cli import Log, guarded, make_parser
from benchmarks.harness.errors import BenchmarkError
from benchmarks.harness.records import emit, record
from benchmarks.harness.tables import markdown_table
from car_train import checkpoint
from car_train.data.dataset import ControlledImages
from car_train.evaluation.evaluate import choose
from car_train.evaluation.metrics import squared_distances
from car_train.evaluation.options import EvalOptions
from car_train.files import check_writable, written_aside
from car_train.training.stages import control_pyramids

MARKERS = "osD^v"
SHAPES = "●■◆▲▼"
"""The markers in the title, which says what type each is."""
BATCH = 16

Floats = NDArray[np.float64]
Labels = NDArray[np.intp]


@torch.no_grad()
def features(path: Path, args: argparse.Namespace) -> tuple[str, Floats, Labels, list[str]]:
    """(control type, features [N, C], classes [N], names of the classes) of the same images for every checkpoint."""
    model = checkpoint.load(path)
    if model.car is None or model.car.branch is None or model.config.car is None:
        raise BenchmarkError(f"{path} has no control branch; give a run of `python -m car_train car`")
    how, config = model.config.car, model.config.vqvae
    data = ControlledImages(
        args.data,
        config.image_size,
        split=args.split,
        control_type=how.control_type,
        convention=how.control_convention,
        preload=False,
    )
    options = EvalOptions(checkpoint=path, data=args.data, per_class=args.per_class, classes=args.classes)
    order = choose(data, options)
    rows, labels = [], []
    for start in range(0, len(order), BATCH):
        items = [data[i] for i in order[start : start + BATCH]]
        finest = control_pyramids([item["control"].numpy() for item in items], config, "cpu")[-1:]
        maps_BCSS = model.car.branch.encoder.scales(finest)[0]
        rows.append(maps_BCSS.double().mean((2, 3)).numpy())
        labels += [item["label"] for item in items]
    return how.control_type, np.concatenate(rows), np.array(labels), data.class_names


def neighbours(x_ND: Floats, label_N: Labels) -> tuple[float, float]:
    """(share of points whose nearest other point is of their label, the share that chance would give)."""
    if len(x_ND) < 2:
        raise BenchmarkError(f"{len(x_ND)} points have no neighbours; evaluate more images")
    x_ND = x_ND - x_ND.mean(0)  # distances are differences of squares, which are small then
    nearest: list[int] = []
    for squared in squared_distances(x_ND, x_ND):
        rows = np.arange(len(squared))
        squared[rows, len(nearest) + rows] = np.inf
        nearest += squared.argmin(1).tolist()
    counts = np.bincount(label_N)
    chance = float((counts * (counts - 1)).sum() / (len(label_N) * (len(label_N) - 1)))
    return float((label_N[nearest] == label_N).mean()), chance


def plane(x_ND: Floats, seed: int) -> Floats:
    """t-SNE in two dimensions (van der Maaten and Hinton 2008), [N, 2]."""
    try:
        from sklearn.manifold import TSNE
    except ImportError as error:
        raise BenchmarkError(f"t-SNE needs {error.name}; pip install 'car-deploy[lab]'") from error
    perplexity = min(30.0, (len(x_ND) - 1) / 3)
    found: Floats = TSNE(2, perplexity=perplexity, init="pca", random_state=seed).fit_transform(x_ND)
    return found


def plot(points_N2: Floats, classes: Labels, types: Labels, names: Sequence[str], kinds: Sequence[str]) -> bytes:
    """The plane as PNG: colours are classes, markers types."""
    from matplotlib import colormaps

    from benchmarks.analysis.plots import page

    with page(6.0) as ((axes,), finished):
        used = np.unique(classes)
        for k, label in enumerate(used):
            for kind, marker in zip(range(len(kinds)), MARKERS, strict=False):
                at = (classes == label) & (types == kind)
                colour = colormaps["tab20"](k) if len(used) <= 20 else colormaps["turbo"](k / (len(used) - 1))
                text = names[label] if kind == 0 else None
                axes.plot(*points_N2[at].T, marker, color=colour, markersize=4, linestyle="", label=text)
        shown = (f"{shape} {kind}" for shape, kind in zip(SHAPES, kinds, strict=False))
        axes.set_title("t-SNE of control features: " + ", ".join(shown), loc="left")
        axes.set_xticks([])
        axes.set_yticks([])
        if len(used) <= 30:
            axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
        return finished()


def run(args: argparse.Namespace, log: Log) -> None:
    check_writable(args.output, ".png")
    if len(args.checkpoints) > len(MARKERS):
        raise BenchmarkError(f"{len(args.checkpoints)} checkpoints; give at most {len(MARKERS)}")
    found = []
    for path in args.checkpoints:
        log(f"{path}")
        found.append(features(path, args))
    kinds, names = [kind for kind, *_ in found], found[0][3]
    # Encoders trained apart have features of scales of their own.
    x = np.concatenate([(f - f.mean()) / f.std() for _, f, _, _ in found])
    classes = np.concatenate([labels for _, _, labels, _ in found])
    types = np.repeat(np.arange(len(found)), [len(f) for _, f, _, _ in found])
    rows: list[dict[str, Any]] = []
    for kind, f, labels, _ in found:
        share, chance = neighbours(f, labels)
        rows.append({"features": kind, "neighbour of": "its class", "share": share, "chance": chance})
    if len(found) > 1:
        share, chance = neighbours(x, types)
        rows.append({"features": "all", "neighbour of": "its type", "share": share, "chance": chance})
    with written_aside(args.output) as file:
        file.write_bytes(plot(plane(x, args.seed), classes, types, names, kinds))
    print(markdown_table(rows))
    emit(record("control_features", {"images": len(x), "seed": args.seed, "split": args.split}, rows))


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = make_parser("control_features", __doc__)
    parser.add_argument("checkpoints", type=Path, nargs="+", help="checkpoints or runs with a branch, a type each")
    parser.add_argument("--data", type=Path, required=True, help="folder of class folders")
    parser.add_argument("--split", default="val", choices=("train", "val", "all"), help="(default: val)")
    parser.add_argument("--classes", help="some classes only, as in `car_train eval`")
    parser.add_argument("--per-class", type=int, default=20, help="images of a class at most (default: 20)")
    parser.add_argument("--seed", type=int, default=0, help="of t-SNE (default: 0)")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the plot, .png")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    return guarded("benchmarks.control_features", lambda log: run(args, log))


if __name__ == "__main__":
    sys.exit(main())
