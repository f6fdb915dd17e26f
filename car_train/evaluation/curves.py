"""One page of curves of training runs, with their newest samples; runs of one stage are drawn over each other.

    python -m car_train report runs/var -o var.png
    python -m car_train report runs/vqvae runs/var runs/car -o training.pdf
    python -m car_train report runs/var --json

Training is drawn faint and, above it, smoothed; validation as dots.
"""

from __future__ import annotations

import argparse
import json
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from car_train.data.images import ImageFileError, open_image
from car_train.evaluation.runs import Array, ReportError, Run, read_run, summary
from car_train.files import written_aside

TITLES = {
    "vqvae": "Tokenizer (VQVAE)",
    "var": "Transformer (VAR)",
    "car": "Control branch (CAR)",
    "cca": "Alignment (CCA)",
}

PANELS = {
    "loss": "Loss",
    "loss_last": "Loss, last scale",
    "psnr": "PSNR (dB)",
    "l1": "L1",
    "quantisation": "Quantisation loss",
    "perceptual": "Perceptual loss",
    "accuracy": "Accuracy",
    "accuracy_last": "Accuracy, last scale",
    "codes_used": "Codes in use",
    "adversarial": "Generator loss",
    "discriminator": "Discriminator loss",
    "adaptive": "Generator's weight",
    "nats": "Nats a token",
    "margin": "Log-ratio, own less other condition",
    "preferred": "Own condition preferred",
    "grad_norm": "Norm of the gradient",
    "lr": "Learning rate",
}
"""Metric → title of its panel, in the page's order; what a log lacks is left out."""
LOGARITHMIC = ("l1", "quantisation", "perceptual", "adaptive", "grad_norm")
COLUMNS = 4
WIDTH, PANEL_HEIGHT, SAMPLES_HEIGHT = 11.69, 1.9, 2.6
"""Inches: the page's (A4's longer side), a row of panels', the samples'."""
DPI = 160

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a5195", "#444444")  # Okabe and Ito's
GREY = "#6b6b6b"
STYLE: dict[Any, Any] = {
    "font.size": 8,
    "font.family": "DejaVu Sans",  # comes with matplotlib, so a page looks the same everywhere
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.labelsize": 7.5,
    "axes.labelcolor": GREY,
    "axes.edgecolor": "#b0b0b0",
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e8e8e8",
    "grid.linewidth": 0.6,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "legend.fontsize": 7,
    "legend.frameon": True,
    "legend.framealpha": 0.85,
    "legend.edgecolor": "none",
    "text.parse_math": False,  # a "$" in a folder's name is a dollar
    "svg.fonttype": "none",
    "pdf.fonttype": 42,
}


def write(runs: Sequence[Run], output: Path) -> Path:
    """Draw the page, PNG or PDF by its name; whole, or not at all.

    Raises ReportError: too many runs, nothing to draw, another suffix, a folder that can't be written, no matplotlib.
    """
    by_stage = [found for stage in TITLES if (found := [run for run in runs if run.stage == stage])]
    if not by_stage or max(map(len, by_stage)) > len(COLOURS):
        raise ReportError(f"{len(runs)} runs; give 1 to {len(COLOURS)} of a stage")
    if output.suffix.lower() not in (".png", ".pdf"):
        raise ReportError(f"{output}: no such kind of report; give a file that ends with .png or .pdf")
    if not output.absolute().parent.is_dir():
        raise ReportError(f"{output}: its folder does not exist; make it first, or choose another")
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ReportError(f"a report needs matplotlib ({error}); install it: pip install matplotlib") from error
    heights = [_height(group) for group in by_stage]
    try:
        with mpl.rc_context(), warnings.catch_warnings(), written_aside(output) as file:
            warnings.filterwarnings("ignore", "Glyph")  # a folder's name may be in any script
            mpl.rcdefaults()  # a page does not depend on anyone's matplotlibrc
            mpl.rcParams.update(STYLE)
            page = Figure(figsize=(WIDTH, sum(heights)), layout="constrained")
            parts = page.subfigures(len(by_stage), 1, height_ratios=heights, squeeze=False)[:, 0]
            for part, group in zip(parts, by_stage, strict=True):
                _draw_stage(part, group)
            page.savefig(file, format=output.suffix.lower()[1:], dpi=DPI, metadata=_no_date(output))
    except OSError as error:
        raise ReportError(f"{output}: can't be written ({error.strerror}); choose another folder") from error
    return output


def _no_date(output: Path) -> dict[str, None] | None:
    return {"CreationDate": None} if output.suffix.lower() == ".pdf" else None


def _panels(runs: Sequence[Run]) -> list[str]:
    """Metrics that any of the runs has; ReportError if there are none."""
    have = {name for run in runs for name in run.metrics()}
    found = [metric for metric in PANELS if metric in have]
    if not found:
        raise ReportError(
            f"{runs[0].folder}: its log has none of the curves of stage {runs[0].stage!r}; give the folder of a run"
        )
    return found


def _height(runs: Sequence[Run]) -> float:
    samples = SAMPLES_HEIGHT if any(newest_samples(run) for run in runs) else 0
    return -(-len(_panels(runs)) // COLUMNS) * PANEL_HEIGHT + samples + 0.3 + 0.17 * len(runs)


def _draw_stage(part: Any, runs: Sequence[Run]) -> None:
    """Title, curves and newest samples of the runs of one stage."""
    panels, labels = _panels(runs), run_labels(runs)
    title = [TITLES[runs[0].stage], *(f"{label}: {caption(run)}" for label, run in zip(labels, runs, strict=True))]
    part.suptitle("\n".join(title), x=0.01, ha="left", fontsize=8)
    sheets = [(label, sheet) for label, run in zip(labels, runs, strict=True) if (sheet := newest_samples(run))]
    rows = -(-len(panels) // COLUMNS)
    ratios = [PANEL_HEIGHT * rows, *([SAMPLES_HEIGHT] if sheets else [])]
    curves, *below = part.subfigures(len(ratios), 1, height_ratios=ratios, squeeze=False)[:, 0]
    axes = list(curves.subplots(rows, COLUMNS, squeeze=False).flat)
    for metric, panel in zip(panels, axes, strict=False):
        _draw_panel(panel, metric, runs, labels)
    for unused in axes[len(panels) :]:
        unused.set_axis_off()
    if len(runs) > 1:
        axes[0].legend(loc="best")
    places = below[0].subplots(1, len(sheets), squeeze=False).flat if sheets else ()
    for (label, (image, step)), place in zip(sheets, places, strict=True):
        place.imshow(np.asarray(image), interpolation="lanczos")
        place.set_axis_off()
        place.set_title(f"{label}, step {step:,}", fontsize=7, color=GREY, fontweight="normal")


def _draw_panel(axes: Any, metric: str, runs: Sequence[Run], labels: Sequence[str]) -> None:
    """One metric of all runs: training faint and smoothed, validation as dots."""
    from matplotlib.ticker import LogLocator, NullFormatter

    positive: list[float] = []
    for colour, run, label in zip(COLOURS, runs, labels, strict=False):
        steps, values = run.series(metric)
        if len(steps):
            smoothed = smooth(values, 0 if metric == "lr" else len(values) // 50)
            axes.plot(steps, values, color=colour, alpha=0.18, linewidth=0.5, rasterized=True)
            axes.plot(
                steps, smoothed, color=colour, linewidth=1.2, label=label, marker="." if len(steps) == 1 else ""
            )
            positive += smoothed[smoothed > 0].tolist()
        axes.plot(*run.series(f"val_{metric}"), "o--", color=colour, linewidth=0.8, markersize=3.6, mfc="white")
    # Below a factor of 4 a logarithmic axis looks like a linear one with odd ticks.
    if metric in LOGARITHMIC and positive and max(positive) > 4 * min(positive):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_title(PANELS[metric], loc="left")
    axes.set_xlim(left=0)
    axes.set_xlabel("step")


def caption(run: Run) -> str:
    """A run in one line: steps, batch, trained parameters, time, best validation figures; what is known of them."""
    found = summary(run)
    parts = [f"step {run.step:,}" + (f" of {found['steps']:,}" if isinstance(found["steps"], int) else "")]
    parts += [f"batch {found['batch']}"] if found["batch"] else []
    parts += [f"{run.parameters['trainable'] / 1e6:.3g} M parameters trained"] if run.parameters else []
    parts += [f"{run.seconds / 3600:.2g} h"] if math.isfinite(run.seconds) else []
    parts += [f"{found['images_per_second']:.3g} images/s"] if found["images_per_second"] else []
    for name, best in found["best"].items():
        if name in ("val_loss", "val_psnr", "val_accuracy"):
            parts.append(f"best {name.removeprefix('val_')} {best['value']:.4g} @ {best['step']:,}")
    return " · ".join(parts)


def newest_samples(run: Run) -> tuple[Image.Image, int] | None:
    """(contact sheet, its step), the newest that can be read; None if there is none."""
    for path in sorted(run.folder.glob("samples-*.png"), reverse=True):
        step = path.stem.removeprefix("samples-")
        try:
            image = open_image(path).convert("RGB")
        except ImageFileError:
            continue  # torn by a kill: an older one does
        return image, int(step) if step.isdigit() else run.step
    return None


def run_labels(runs: Sequence[Run]) -> list[str]:
    """The runs' folder names, with as many parents as it takes to distinguish them."""
    parts = [run.folder.resolve().parts for run in runs]
    for depth in range(1, max(map(len, parts)) + 1):
        labels = ["/".join(p[-depth:]) for p in parts]
        if len(set(labels)) == len(labels):
            break
    return labels


def smooth(values: Array, width: int) -> Array:
    """Mean of the finite among `width` values around each: f64 [n] → f64 [n].

    Near the first value, where losses fall steeply, the window is narrower but centred; near the last it is cut off.
    """
    half = max(width // 2, 0)
    finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    at = np.arange(len(values))
    reach = np.minimum(at, half)
    low, high = at - reach, np.minimum(at + reach + 1, len(values))
    count = counts[high] - counts[low]
    return np.where(count > 0, (sums[high] - sums[low]) / np.maximum(count, 1), np.nan)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of a run; one stage's share axes")
    parser.add_argument("-o", "--output", type=Path, help="report.png or .pdf (default: report.png)")
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object a run instead; with -o draw the page as well"
    )


def run(args: argparse.Namespace) -> Path | None:
    """Draw the page, or print the summaries; ReportError names what can't be used."""
    found = [read_run(folder) for folder in args.runs]
    written = None
    if args.output is not None or not args.json:
        written = write(found, args.output or Path("report.png"))
    if not args.json:
        return written
    for one in found:
        print(json.dumps(summary(one)))
    return None
