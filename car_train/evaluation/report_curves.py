"""The diagrams of a report: loss, accuracy, codes in use and so on, of one run or of several of one stage."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from car_train.evaluation.report import Array, ReportError, Run

MARGIN = 0.45
"""Of the page, inches."""
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a5195", "#444444")  # Okabe and Ito's
GREY = "#6b6b6b"
MOST_POINTS = 2000
"""Points drawn of one raw curve: about two for every pixel of the widest panel."""

LEGEND_LINE = 0.055
"""Share of a panel's height to leave free for a line of its legend: less than it takes, for it finds a gap too."""

STYLE: dict[Any, Any] = {
    "font.size": 8,
    "font.family": "DejaVu Sans",  # comes with matplotlib, so a report looks the same everywhere
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


@dataclass(frozen=True)
class Panel:
    """One diagram: metrics by their names in the log; those that a run lacks are left out."""

    title: str
    metrics: tuple[str, ...]
    log: bool = False
    percent: bool = False
    prefix: str = ""
    """Also every metric that starts so, e.g. `codes_used_` for one curve a scale."""


# One run: the curves of a panel are metrics.
PANELS = {
    "vqvae": (
        Panel("Loss and its terms", ("loss", "l1", "l2", "quantisation", "perceptual"), log=True),
        Panel("Reconstruction, PSNR (dB)", ("psnr",)),
        Panel("Codes in use", ("codes_used",), percent=True),
        Panel("Codes in use, by scale", (), percent=True, prefix="codes_used_"),
        Panel("Adversarial terms", ("adversarial", "discriminator")),
        Panel("Weight of the adversarial term", ("adaptive",), log=True),
        Panel("Norm of the gradient", ("grad_norm",), log=True),
        Panel("Learning rate", ("lr",)),
    ),
    "var": (
        Panel("Cross-entropy (nats per token)", ("loss", "loss_last")),
        Panel("Accuracy", ("accuracy", "accuracy_last"), percent=True),
        Panel("Norm of the gradient", ("grad_norm",), log=True),
        Panel("Learning rate", ("lr",)),
    ),
}
PANELS["car"] = PANELS["var"]

# Several runs: the curves of a panel are runs, so each metric has its own.
COMPARED = {
    "vqvae": (
        Panel("Loss", ("loss",), log=True),
        Panel("Reconstruction, PSNR (dB)", ("psnr",)),
        Panel("L1", ("l1",), log=True),
        Panel("Perceptual loss", ("perceptual",), log=True),
        Panel("Quantisation loss", ("quantisation",), log=True),
        Panel("Codes in use", ("codes_used",), percent=True),
        Panel("Norm of the gradient", ("grad_norm",), log=True),
        Panel("Learning rate", ("lr",)),
    ),
    "var": (
        Panel("Cross-entropy (nats per token)", ("loss",)),
        Panel("Cross-entropy, last scale", ("loss_last",)),
        Panel("Accuracy", ("accuracy",), percent=True),
        Panel("Accuracy, last scale", ("accuracy_last",), percent=True),
        Panel("Norm of the gradient", ("grad_norm",), log=True),
        Panel("Learning rate", ("lr",)),
    ),
}
COMPARED["car"] = COMPARED["var"]

NAMES = {
    "l1": "L1",
    "l2": "L2",
    "psnr": "PSNR",
    "loss_last": "loss, last scale",
    "accuracy_last": "accuracy, last scale",
    "codes_used": "codes in use",
    "adversarial": "generator",
}


def draw_curves(figure: Figure, runs: Sequence[Run], top: float) -> None:
    """All panels of one run, or of several over each other, in the part of a figure below `top` inches from above."""
    panels = _panels(runs)
    columns = 1 if len(panels) == 1 else -(-len(panels) // 2)
    width, height = figure.get_size_inches()
    grid = figure.add_gridspec(
        1 if len(panels) == 1 else 2,
        columns,
        left=(MARGIN + 0.4) / width,  # room for the labels of the axes
        right=1 - MARGIN / width,
        top=1 - (top + 0.25) / height,
        bottom=(MARGIN + 0.15) / height,
        wspace=0.24,
        hspace=0.42,
    )
    # An odd number leaves one cell over: the first panel, the loss, is twice as wide.
    first = 2 if len(panels) % 2 and columns > 1 else 1
    cells = [(0, slice(0, first))] + [divmod(i, columns) for i in range(first, 2 * columns)]
    for number, (panel, cell) in enumerate(zip(panels, cells, strict=False)):
        axes = figure.add_subplot(grid[cell])
        curves = _curves(panel, runs)
        legend = _legend(curves, named=len(curves) > 1 and (len(runs) == 1 or number == 0), styles=number == 0)
        columns = 2 if len(legend) > 4 else 1
        _draw_panel(axes, panel, curves, headroom=LEGEND_LINE * -(-len(legend) // columns))
        if legend:
            axes.legend(handles=legend, ncols=columns, loc="best")


@dataclass(frozen=True)
class Curve:
    label: str
    colour: str
    train: tuple[Array, Array]
    val: tuple[Array, Array]
    noisy: bool = True
    """Whether it is smoothed."""


def _panels(runs: Sequence[Run]) -> list[Panel]:
    """Those that have something to show; ReportError if there are none."""
    have = {name for run in runs for name in run.metrics()}
    found = []
    for panel in (PANELS if len(runs) == 1 else COMPARED)[runs[0].stage]:
        names = tuple(n for n in panel.metrics if n in have)
        if panel.prefix:
            names += tuple(sorted((n for n in have if n.startswith(panel.prefix)), key=_trailing_number))
        if names:
            found.append(dataclasses.replace(panel, metrics=names))
    if not found:
        raise ReportError(
            f"{runs[0].folder}: its log has none of the curves of stage {runs[0].stage!r}; give the folder of a run"
        )
    return found


def _trailing_number(name: str) -> tuple[int, str]:
    tail = name.rsplit("_", 1)[-1]
    return (int(tail) if tail.isdigit() else -1, name)


def _curves(panel: Panel, runs: Sequence[Run]) -> list[Curve]:
    if len(runs) > 1:
        labels, (name,) = run_labels(runs), panel.metrics
        return [
            Curve(label, COLOURS[i], run.series(name), run.series(f"val_{name}"), noisy=name != "lr")
            for i, (run, label) in enumerate(zip(runs, labels, strict=True))
        ]
    run, n = runs[0], len(panel.metrics)
    noisy = panel.metrics != ("lr",)
    colours = [COLOURS[i % len(COLOURS)] for i in range(n)]
    if panel.prefix:  # an ordered family, so an ordered map of colours, light (coarse) to dark (fine)
        colours = [to_hex(colormaps["viridis_r"](0.1 + 0.9 * i / max(n - 1, 1))) for i in range(n)]
    labels = [_curve_label(panel, name) for name in panel.metrics]
    return [
        Curve(label, colour, run.series(name), run.series(f"val_{name}"), noisy)
        for label, colour, name in zip(labels, colours, panel.metrics, strict=True)
    ]


def _curve_label(panel: Panel, metric: str) -> str:
    if panel.prefix:
        return f"scale {metric.removeprefix(panel.prefix)}"
    if metric in ("loss_last", "accuracy_last"):
        return "last scale"
    if len(panel.metrics) > 1 and metric in ("loss", "accuracy"):
        return "all tokens" if f"{metric}_last" in panel.metrics else "sum"
    return NAMES.get(metric, metric.replace("_", " "))


def run_labels(runs: Sequence[Run]) -> list[str]:
    """The runs' folder names, with as many parents as it takes to tell them apart."""
    parts = [run.folder.resolve().parts for run in runs]
    for depth in range(1, max(map(len, parts)) + 1):
        labels = ["/".join(p[-depth:]) for p in parts]
        if len(set(labels)) == len(labels):
            break
    return labels


def smoothing(points: int) -> int:
    """Width of the smoothing window: a fiftieth of the curve; short ones stay as they are."""
    return points // 50


def _draw_panel(axes: Axes, panel: Panel, curves: Sequence[Curve], headroom: float) -> None:
    axes.set_title(panel.title, loc="left")
    seen: list[Array] = []
    for curve in curves:
        seen += _draw_curve(axes, curve)
    positive = np.concatenate([s[s > 0] for s in seen]) if seen else np.zeros(0)
    # Below a factor of 4 a logarithmic axis looks like a linear one with odd ticks.
    log = panel.log and len(positive) > 0 and bool(positive.max() > 4 * positive.min())
    low, high = _range(seen, log, headroom)
    if panel.percent and panel.metrics[0].startswith("codes_used"):
        low, high = 0.0, 1.05
    if log:
        axes.set_yscale("log")
        # Ticks at 1, 2, 5: a loss that spans less than a decade would have one tick, or none.
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=20))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_ylim(low, high)
    if panel.percent:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.4g} %"))
    elif panel.metrics == ("lr",):
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _scientific(value)))
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_xlabel("step")


def _scientific(value: float) -> str:
    """8e-4 for 0.0008; a common factor above the axis would push the panel's title."""
    if value == 0:
        return "0"
    exponent = math.floor(math.log10(abs(value)) + 1e-9)
    return f"{value / 10**exponent:.3g}e{exponent}"


def _draw_curve(axes: Axes, curve: Curve) -> list[Array]:
    """Raw faint, smoothed above it, validation as dots; returns the values that have to be in sight."""
    steps, values = curve.train
    width = smoothing(len(values)) if curve.noisy else 0
    thin = max(1, len(steps) // MOST_POINTS)
    shown = []
    if len(steps):
        smoothed = smooth(values, width)
        if width >= 2:
            axes.plot(steps[::thin], values[::thin], color=curve.colour, alpha=0.18, linewidth=0.5, rasterized=True)
        marker = "." if len(steps) == 1 else None
        axes.plot(steps[::thin], smoothed[::thin], color=curve.colour, linewidth=1.2, marker=marker)
        shown.append(smoothed)
        shown.append(np.nanquantile(values, (0.01, 0.99)) if np.isfinite(values).any() else values)
    if len(curve.val[0]):
        axes.plot(*curve.val, color=curve.colour, linewidth=0.8, linestyle=(0, (3, 2)), **VAL_MARKER)
        shown.append(curve.val[1])
    return shown


VAL_MARKER: dict[str, Any] = {
    "marker": "o",
    "markersize": 3.6,
    "markerfacecolor": "white",
    "markeredgewidth": 1.1,
    "zorder": 3,
}


def _range(seen: Sequence[Array], log: bool, headroom: float) -> tuple[float, float]:
    """Limits of the y axis: all that is finite (and positive, if it is to be logarithmic) and a little around it.

    headroom: share of the range to leave free above, for a legend.
    """
    values = np.concatenate([np.asarray(s, np.float64) for s in seen]) if seen else np.zeros(1)
    values = values[np.isfinite(values)]
    if log and (values > 0).any():
        values = np.log(values[values > 0])
    low, high = (float(values.min()), float(values.max())) if len(values) else (0.0, 1.0)
    pad = 0.06 * (high - low) or 0.05 * abs(high) or 0.5
    low, high = low - pad, high + pad + headroom * (high - low)
    return (math.exp(low), math.exp(high)) if log and len(values) else (low, high)


def _legend(curves: Sequence[Curve], named: bool, styles: bool) -> list[Line2D]:
    """Colours where there are several; in the first panel also what the kinds of line are."""
    handles = [Line2D([], [], color=c.colour, linewidth=1.6, label=c.label) for c in curves] if named else []
    if styles:
        width = max(smoothing(len(c.train[0])) for c in curves)
        label = f"training, mean of {width} steps" if width >= 2 else "training"
        handles.append(Line2D([], [], color=GREY, linewidth=1.2, label=label))
        if any(len(c.val[0]) for c in curves):
            dashes: dict[str, Any] = {"color": GREY, "linewidth": 0.8, "linestyle": (0, (3, 2))}
            handles.append(Line2D([], [], **dashes, **VAL_MARKER, label="validation"))
    return handles


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
