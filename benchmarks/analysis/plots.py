"""The diagrams of `benchmarks.report`, each as the bytes of a PNG."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.analysis.results import METHODS, Result, Row
from benchmarks.harness.errors import BenchmarkError
from benchmarks.harness.tables import seconds, times

try:
    import matplotlib as mpl
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.patches import Patch
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    from car_train.evaluation.curves import COLOURS, GREY, STYLE
except ImportError as error:
    raise BenchmarkError(f"diagrams need matplotlib ({error}); pip install 'car-deploy[lab]'") from error

OURS, LOOP = COLOURS[0], "#9a9a9a"
COLOUR_OF_METHOD = dict(zip(METHODS, (COLOURS[1], COLOURS[3], COLOURS[4]), strict=True))
WIDTH = 8.4
"""Inches of every diagram: what a page of text is wide."""
BAR, EDGE = 0.23, 1.35
"""Inches of a bar, and of all that surrounds the bars."""


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One bar of a diagram; a label of the legend belongs to each colour."""

    name: str
    value: float
    colour: str
    label: str
    hatched: bool = False


@contextmanager
def page(
    height: float, rows: int = 1, columns: int = 1, **grid: Any
) -> Iterator[tuple[list[Axes], Callable[[], bytes]]]:
    """Panels in the project's style, and what gives the finished PNG."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(STYLE)
        figure = Figure(figsize=(WIDTH, height), layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08))
        panels = figure.subplots(rows, columns, squeeze=False, **grid)
        for panel in panels.flat:
            panel.set_axisbelow(True)

        def finished() -> bytes:
            file = io.BytesIO()
            figure.savefig(file, format="png", dpi=150, metadata={"Software": None})
            return file.getvalue()

        yield list(panels.flat), finished


def logarithmic(axis: Any, low: float, high: float, shown: Callable[[float], str]) -> None:
    """1, 2 and 5 of every decade."""
    marks = [m * 10.0**e for e in range(-7, 6) for m in (1, 2, 5)]
    inside = [mark for mark in marks if low <= mark <= high]
    if len(inside) > 8:
        inside = [mark for mark in inside if f"{mark:e}"[0] == "1"]
    axis.set_major_locator(FixedLocator(inside))
    axis.set_major_formatter(FuncFormatter(lambda value, _: shown(value)))
    axis.set_minor_locator(NullLocator())


def bars(chosen: Sequence[Bar], unit: str, shown: Callable[[float], str], start: float | None = None) -> bytes:
    """Horizontal bars on a logarithmic axis. start: where they begin; without it, left of the smallest."""
    with page(EDGE + BAR * len(chosen)) as ((axes,), finished):
        values = [bar.value for bar in chosen]
        low, high = min([*values, start or values[0]]) / 1.6, max(values) * 2.2
        for y, bar in enumerate(chosen):
            left, right = sorted((low if start is None else start, bar.value))
            axes.barh(
                y,
                right - left,
                left=left,
                height=0.72,
                color=bar.colour,
                hatch="////" if bar.hatched else None,
                edgecolor="white",
                linewidth=0,
            )
            axes.text(right * 1.04, y, shown(bar.value), va="center", fontsize=7.5)
        if start is not None:
            axes.axvline(start, color=GREY, linewidth=1)
        axes.set_xscale("log")
        axes.set_xlim(low, high)
        logarithmic(axes.xaxis, low, high, shown)
        axes.set_yticks(range(len(chosen)), [bar.name for bar in chosen])
        axes.set_ylim(len(chosen) - 0.4, -0.6)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel(unit)
        handles = [Patch(color=colour, label=label) for colour, label in {b.colour: b.label for b in chosen}.items()]
        if any(bar.hatched for bar in chosen):
            handles.append(
                Patch(facecolor="#cccccc", hatch="////", edgecolor="white", label="scaled from fewer steps")
            )
        axes.legend(handles=handles, loc="lower left", bbox_to_anchor=(0, 1.0), ncols=3, frameon=False)
        return finished()


def latency_bars(result: Result) -> bytes:
    """Seconds for an image on each backend and by the loop in PyTorch, fastest first."""
    first = result.settings["batch"][0]
    chosen = [
        Bar(
            name=row["candidate"],
            value=row["p50"] / row["batch"],
            colour=OURS if row["backend"] is not None else LOOP,
            label="our runtime" if row["backend"] is not None else "the published loop in PyTorch",
        )
        for row in result.of("end_to_end")
        if row["batch"] == first
    ]
    return bars(sorted(chosen, key=lambda bar: bar.value), "time of an image, p50, logarithmic", seconds)


def ratio_bars(rows: Sequence[Row]) -> bytes:
    """How many times as long as ours others take; one bar a row of `ratio`."""
    chosen = [
        Bar(
            name=f"{r['method']} {r['size']}², {r['steps']} steps ({r['tier']}, {r['precision']})",
            value=r["times_ours"],
            colour=COLOUR_OF_METHOD[r["method"]],
            label=r["method"],
            hatched=r["scaled"],
        )
        for r in rows
    ]
    assert np.isfinite([bar.value for bar in chosen]).all()
    return bars(chosen, "times as long as ours, logarithmic", times, start=1.0)
