"""The diagrams of `benchmarks.report`, each as the bytes of a PNG; None where a result has nothing to draw."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from benchmarks.analysis.report_results import Result, Row, seconds
from benchmarks.harness.machine import BenchmarkError

try:
    import matplotlib as mpl
    from matplotlib.axes import Axes
    from matplotlib.colors import to_rgb
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter, NullLocator

    from car_train.evaluation.curves import COLOURS, GREY, STYLE
except ImportError as error:
    raise BenchmarkError(f"a report needs matplotlib ({error}); pip install 'car-deploy[lab]'") from error

BLUE, RED, GREEN, PINK, ORANGE, SKY = COLOURS[:6]
LOOP = "#9a9a9a"
METHODS = {"ControlNet": RED, "T2I-Adapter": PINK, "LCM + ControlNet": ORANGE}
WIDTH = 8.4
"""Inches of every diagram: what a page of text is wide."""
BAR, EDGE = 0.23, 0.95
"""Inches of a bar, and of all that surrounds the bars."""


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


def log_seconds(axis: Any, low: float, high: float) -> None:
    """1, 2 and 5 of every decade, with their unit."""
    marks = [m * 10.0**e for e in range(-7, 6) for m in (1, 2, 5)]
    inside = [mark for mark in marks if low <= mark <= high]
    if len(inside) > 8:
        inside = [mark for mark in inside if f"{mark:e}"[0] == "1"]
    axis.set_major_locator(FixedLocator(inside))
    axis.set_major_formatter(FuncFormatter(lambda value, _: seconds(value)))
    axis.set_minor_locator(NullLocator())


# ---- Bars of pictures ----


def picture_bars(results: Sequence[Result]) -> bytes | None:
    """Seconds for a picture, fastest first, on a logarithmic axis. Scaled ones are hatched."""
    bars = sorted((bar for result in results for bar in bars_of(result)), key=lambda bar: bar[1])
    if not bars:
        return None
    with page(EDGE + 0.4 + BAR * len(bars)) as ((axes,), finished):
        values = [value for _, value, _, _ in bars]
        low, high = min(values) / 1.6, max(values) * 2.2
        for y, (_, value, colour, scaled) in enumerate(bars):
            axes.barh(
                y,
                value - low,
                left=low,
                height=0.72,
                color=colour,
                hatch="////" if scaled else None,
                edgecolor="white",
                linewidth=0,
            )
            axes.text(value * 1.04, y, seconds(value), va="center", fontsize=7.5)
        axes.set_xscale("log")
        axes.set_xlim(low, high)
        log_seconds(axes.xaxis, low, high)
        axes.set_yticks(range(len(bars)), [name for name, *_ in bars])
        axes.set_ylim(len(bars) - 0.4, -0.6)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("time of a picture, p50, logarithmic")
        handles = bar_legend(bars)
        axes.legend(handles=handles, loc="lower left", bbox_to_anchor=(0, 1.0), ncols=3, frameon=False)
        return finished()


Bar = tuple[str, float, str, bool]
"""Name, seconds, colour, whether it was scaled."""


def bars_of(result: Result) -> Iterator[Bar]:
    if result.benchmark == "latency":
        for row in result.of("end_to_end"):
            if row["batch"] == result.settings["batch"][0]:
                ours = row["backend"] is not None
                name = f"ours, {row['candidate']}" if ours else f"PyTorch, {row['candidate']}"
                yield name, row["p50"] / row["batch"], BLUE if ours else LOOP, False
        return
    # Ours was measured once beside each of theirs; one bar stands for all. Of theirs, the fewest steps are drawn.
    groups: dict[tuple[Any, ...], list[Row]] = {}
    fewest: dict[tuple[Any, ...], int] = {}
    for row in result.of("end_to_end"):
        alike = (row["method"], row["tier"], row["precision"], row["size"])
        fewest[alike] = min(row["steps"], fewest.get(alike, row["steps"]))
    for row in result.of("end_to_end"):
        steps = None if row["whose"] == "ours" else row["steps"]
        if steps is not None and steps > fewest[row["method"], row["tier"], row["precision"], row["size"]]:
            continue
        key = (row["method"], row["candidate"], row["tier"], row["precision"], row["size"], steps)
        groups.setdefault(key, []).append(row)
    for (method, candidate, tier, precision, size, steps), rows in groups.items():
        ours = rows[0]["whose"] == "ours"
        colour = METHODS.get(method, SKY)
        if ours:
            colour = BLUE if rows[0]["backend"] is not None else LOOP
        name = f"ours {size}², {candidate}" if ours else f"{method} {size}², {steps} steps"
        kind = f"{tier}, {precision}" if not ours or precision not in candidate else tier
        yield f"{name} ({kind})", float(np.median([row["p50"] for row in rows])), colour, bool(rows[0]["scaled"])


def bar_legend(bars: Sequence[Bar]) -> list[Patch]:
    names = {
        BLUE: "our runtime",
        LOOP: "CAR as published, PyTorch",
        **{c: m for m, c in METHODS.items()},
        SKY: "others",
    }
    there = [Patch(color=colour, label=name) for colour, name in names.items() if any(b[2] == colour for b in bars)]
    if any(scaled for *_, scaled in bars):
        there.append(Patch(facecolor="#cccccc", hatch="////", edgecolor="white", label="scaled from fewer steps"))
    return there


# ---- Stages ----


def stage_colours(stages: Sequence[str]) -> dict[str, Any]:
    """Control, class and decoder each of its own; scales from light to dark."""
    scales = [name for name in stages if name.startswith("scale_")]
    blue = np.array(to_rgb(BLUE))
    shades = {
        name: tuple(1 - (1 - blue) * share)
        for name, share in zip(scales, np.linspace(0.25, 1, len(scales)), strict=True)
    }
    return {"control": ORANGE, "condition": PINK, **shades, "decoder": GREEN}


def stage_stacks(result: Result) -> bytes | None:
    """Each candidate's picture as its stages one after the other."""
    rows = [row for row in result.of("stage") if row["batch"] == result.settings["batch"][0]]
    if not rows:
        return None
    names = list(dict.fromkeys(row["candidate"] for row in rows))
    stages = list(dict.fromkeys(row["stage"] for row in rows))
    colours = stage_colours(stages)
    with page(EDGE + 0.25 + 0.34 * len(names)) as ((axes,), finished):
        longest = max(sum(row["p50"] for row in rows if row["candidate"] == name) for name in names)
        for y, name in enumerate(names):
            left = 0.0
            for row in (row for row in rows if row["candidate"] == name):
                axes.barh(
                    y,
                    row["p50"],
                    left=left,
                    height=0.7,
                    color=colours[row["stage"]],
                    edgecolor="white",
                    linewidth=0.4,
                )
                if row["p50"] > 0.035 * longest and row["stage"].startswith("scale_"):
                    label, light = row["stage"].removeprefix("scale_"), sum(to_rgb(colours[row["stage"]])) > 1.4
                    ink = "#222222" if light else "white"
                    axes.text(left + row["p50"] / 2, y, label, ha="center", va="center", fontsize=6.5, color=ink)
                left += row["p50"]
            axes.text(left + 0.008 * longest, y, seconds(left), va="center", fontsize=7.5)
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.set_xlim(0, longest * 1.12)
        axes.grid(visible=False, axis="y")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: seconds(value) if value else "0"))
        axes.set_xlabel("medians of the stages added up; numbers: scales, coarse to fine")
        scales = [name for name in stages if name.startswith("scale_")]
        named = {
            "control": "control",
            "condition": "class",
            scales[0]: "first scale",
            scales[-1]: "last scale",
            "decoder": "decoder",
        }
        handles = [Patch(color=colours[stage], label=label) for stage, label in named.items() if stage in stages]
        axes.legend(handles=handles, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(handles), frameon=False)
        return finished()


def against_limit(result: Result) -> bytes | None:
    """Of each of our engines, every stage's time beside what the machine's limit allows."""
    ours = {row["candidate"] for row in result.of("end_to_end") if row["backend"] is not None}
    rows = [r for r in result.of("stage") if r["candidate"] in ours and r["batch"] == result.settings["batch"][0]]
    names = list(dict.fromkeys(row["candidate"] for row in rows))
    if not names:
        return None
    stages = list(dict.fromkeys(row["stage"] for row in rows))
    every = [value for row in rows for value in (row["p50"], row["limit_s"]) if value > 0]
    low, high = min(every) / 1.7, max(every) * 4
    with page(EDGE + 0.25 + BAR * len(stages), 1, len(names), sharey=True) as (panels, finished):
        for axes, name in zip(panels, names, strict=True):
            for row in (row for row in rows if row["candidate"] == name):
                y, colour = stages.index(row["stage"]), BLUE if row["bound"] == "compute" else RED
                axes.plot((row["limit_s"], row["p50"]), (y, y), color=colour, linewidth=1.2, alpha=0.5)
                axes.plot(row["limit_s"], y, "|", color=colour, markersize=9, markeredgewidth=1.8)
                axes.plot(row["p50"], y, "o", color=colour, markersize=4.5)
                at = max(row["p50"], row["limit_s"])
                axes.annotate(
                    f"{row['of_limit']:.0%}", (at, y), (6, 0), textcoords="offset points", va="center", fontsize=7
                )
            axes.set_xscale("log")
            axes.set_xlim(low, high)
            log_seconds(axes.xaxis, low, high)
            axes.set_title(name, loc="left")
            axes.set_xlabel("time, logarithmic; percent: of the limit")
        panels[0].set_yticks(range(len(stages)), stages)
        panels[0].set_ylim(len(stages) - 0.4, -0.6)
        panels[0].legend(
            handles=limit_legend(), loc="lower center", bbox_to_anchor=(0.5, 1.08), ncols=4, frameon=False
        )
        return finished()


def limit_legend() -> list[Line2D]:
    def mark(colour: str, marker: str, label: str) -> Line2D:
        return Line2D(
            [], [], color=colour, marker=marker, linestyle="", markersize=6, markeredgewidth=1.6, label=label
        )

    return [
        mark(GREY, "o", "measured"),
        mark(GREY, "|", "limit"),
        mark(BLUE, "s", "bound by arithmetic"),
        mark(RED, "s", "bound by memory"),
    ]


# ---- Growth ----


def growth_measured(result: Result) -> bytes | None:
    """Seconds a picture of each model, batch and backend that was measured."""
    rows = result.of("measured")
    if not rows:
        return None
    with page(EDGE + BAR * len(rows)) as ((axes,), finished):
        backends = list(dict.fromkeys(row["backend"] for row in rows))
        longest = max(1 / row["images_per_s"] for row in rows)
        for y, row in enumerate(rows):
            value = 1 / row["images_per_s"]
            axes.barh(y, value, height=0.72, color=COLOURS[backends.index(row["backend"])])
            axes.text(value + 0.01 * longest, y, seconds(value), va="center", fontsize=7.5)
        names = [
            f"{r['model']} {r['image_size']}², batch {r['batch']}, {r['backend']} {r['precision']}" for r in rows
        ]
        axes.set_yticks(range(len(rows)), names)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_xlim(0, longest * 1.12)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("seconds a picture, p50 of the batch ÷ its size")
        return finished()


def growth_floors(result: Result) -> bytes | None:
    """Least times on the card by size and depth, beside what was quoted, and by depth, precision and batch."""
    rows = [row for row in result.of("floor") if row["stage"] == "image"]
    if not rows:
        return None
    precision = rows[-1]["precision"]
    with page(3.5, 1, 2, width_ratios=(1.25, 1)) as ((left, right), finished):
        sizes = sorted({row["image_size"] for row in rows})
        depths = sorted({row["depth"] for row in rows})
        batches = sorted({row["batch"] for row in rows})
        for colour, depth in zip(COLOURS, depths, strict=False):
            chosen = {
                r["image_size"]: r["floor_s"] / r["batch"]
                for r in rows
                if (r["depth"], r["precision"], r["batch"]) == (depth, precision, batches[0])
            }
            left.plot(
                list(chosen),
                list(chosen.values()),
                "o-",
                color=colour,
                linewidth=1.3,
                markersize=4,
                label=f"d{depth}",
            )
        quoted_marks(left, result.of("quoted"), sizes)
        left.set_xscale("log")
        left.set_yscale("log")
        left.xaxis.set_major_locator(FixedLocator(sizes))
        left.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}²"))
        left.xaxis.set_minor_locator(NullLocator())
        low, high = left.get_ylim()
        log_seconds(left.yaxis, low, high)
        left.set_title(f"At best on an RTX 4090, {precision}, batch {batches[0]}: computed", loc="left")
        left.set_xlabel("pixels; dotted and ×: quoted, measured elsewhere")
        left.legend(loc="lower right")
        cases = [(p, b) for p in dict.fromkeys(r["precision"] for r in rows) for b in batches]
        for colour, (kind, batch) in zip(COLOURS, cases, strict=False):
            chosen = {
                r["depth"]: 1e3 * r["floor_s"] / batch
                for r in rows
                if (r["image_size"], r["precision"], r["batch"]) == (sizes[0], kind, batch)
            }
            right.plot(
                list(chosen),
                list(chosen.values()),
                "o-",
                color=colour,
                linewidth=1.3,
                markersize=4,
                label=f"{kind}, batch {batch}",
            )
        right.set_title(f"{sizes[0]}², ms a picture: computed", loc="left")
        right.set_ylim(bottom=0)
        right.xaxis.set_major_locator(FixedLocator(depths))
        right.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"d{value:.0f}"))
        right.legend(loc="upper left")
        return finished()


def quoted_marks(axes: Axes, quoted: Sequence[Row], sizes: Sequence[int]) -> None:
    """Lines of what others published; those for one size, as crosses there."""
    for row in quoted:
        if row["image_size"] is None:
            axes.axhline(row["seconds"], color=GREY, linewidth=0.8, linestyle=(0, (1, 2)))
            axes.annotate(
                f"{row['method']} {seconds(row['seconds'])}",
                (sizes[0], row["seconds"]), (0, 2), textcoords="offset points", ha="left", fontsize=6.5, color=GREY,
            )  # fmt: skip
        elif row["image_size"] in sizes:
            axes.plot(row["image_size"], row["seconds"], "x", color=GREY, markersize=5)


def growth_roofline(result: Result) -> bytes | None:
    """Each stage of the shallowest model under the card's roof: operations a byte, and operations a second."""
    rows = result.of("floor")
    if not rows:
        return None
    first, precision = rows[0], rows[-1]["precision"]
    card = result.settings["cards"][precision]
    roof, slope = card["flops_per_s"] / 1e12, card["bytes_per_s"] / 1e12
    with page(3.3) as ((axes,), finished):
        reach = np.geomspace(1, 1e5, 200)
        axes.plot(reach, np.minimum(roof, slope * reach), color=GREY, linewidth=1.4)
        sizes = sorted({row["image_size"] for row in rows})
        for colour, marker, size in zip(COLOURS, "osD^", sizes, strict=False):
            chosen = [
                r
                for r in rows
                if (r["image_size"], r["depth"], r["precision"], r["batch"])
                == (size, first["depth"], precision, first["batch"])
                and r["stage"] != "image"
            ]
            x = [1e9 * r["gflop"] / (r["weight_bytes"] + r["kv_bytes"] + r["io_bytes"]) for r in chosen]
            y = [r["gflop"] / r["floor_s"] / 1e3 for r in chosen]
            axes.plot(x, y, marker, color=colour, markersize=4.5, alpha=0.85, label=f"{size}²")
            if size == sizes[0]:
                name_points(axes, chosen, x, y)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_ylim(0.3, 2 * roof)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("operations per byte of weights, K/V, inputs and outputs")
        axes.set_ylabel("TFLOP/s at most")
        axes.set_title(
            f"{card['name']}, stages of d{first['depth']}, batch {first['batch']}: computed, not measured", loc="left"
        )
        axes.legend(loc="lower right")
        return finished()


def name_points(axes: Axes, rows: Sequence[Row], x: Sequence[float], y: Sequence[float]) -> None:
    """Names beside the points of one size: below the slope, and above the roof or, of control and class, below it."""
    for row, a, b in zip(rows, x, y, strict=True):
        name = row["stage"].removeprefix("scale_")
        if name == "condition":
            where, align, name = (-5, 4), "right", "class"
        elif row["bound"] == "memory":
            where, align = (5, -7), "left"
        else:
            where, align = (0, -11 if name == "control" else 6), "center"
        axes.annotate(name, (a, b), where, textcoords="offset points", fontsize=6.5, color=GREY, ha=align)


# ---- Schedules and soak ----


def schedule_map(result: Result) -> bytes | None:
    """Each schedule's time against what it changes: tokens, and distance to real pictures where that was measured."""
    rows = result.of("schedule")
    panels = {"tokens_equal": "share of tokens as exact", "kid_half": "KID to held-out pictures"}
    there = {key: label for key, label in panels.items() if any(row.get(key) is not None for row in rows)}
    if not there:
        return None
    with page(0.9 + max(2.4, 0.17 * len(rows)), 1, len(there) + 1, width_ratios=[1] * len(there) + [0.75]) as (
        axes,
        finished,
    ):
        for panel, (key, label) in zip(axes, there.items(), strict=False):
            for number, row in enumerate(rows, 1):
                if row.get(key) is not None:
                    colour = COLOURS[(number - 1) % len(COLOURS)]
                    panel.plot(
                        100 * row["ratio"], row[key], "o", markersize=11, color=colour, markeredgecolor="white"
                    )
                    where = (100 * row["ratio"], row[key])
                    panel.annotate(str(number), where, ha="center", va="center", fontsize=7, color="white")
            panel.margins(0.12)
            panel.set_xlabel("time, % of exact")
            panel.set_title(label, loc="left")
        floor = next((row["kid_floor"] for row in rows if row.get("kid_floor") is not None), None)
        if floor is not None and "kid_half" in there:
            axes[len(there) - 1].axhline(floor, color=GREY, linewidth=0.9, linestyle=(0, (4, 3)))
            axes[len(there) - 1].text(
                0.98,
                floor,
                "two halves of real ones ",
                transform=axes[len(there) - 1].get_yaxis_transform(),
                ha="right",
                va="bottom",
                fontsize=6.5,
                color=GREY,
            )
        axes[-1].axis("off")
        for number, row in enumerate(rows, 1):
            y = 1 - (number - 0.5) / max(len(rows), 12)
            axes[-1].text(0, y, f"{number}  {row['schedule']}", transform=axes[-1].transAxes, va="center", fontsize=7)
        return finished()


def soak_memory(result: Result) -> bytes | None:
    """Resident memory over the pictures of each part; the warm-up is shaded."""
    rows = result.of("sample")
    parts = list(dict.fromkeys(row["part"] for row in rows))
    if not parts:
        return None
    top = 1.15e-6 * max(row["rss"] for row in rows)
    with page(2.3, 1, len(parts), sharey=True) as (panels, finished):
        for axes, part in zip(panels, parts, strict=True):
            samples = [(row["pictures"], row["rss"] / 1e6) for row in rows if row["part"] == part]
            x, y = np.array(samples, np.float64).T
            axes.axvspan(0, x[len(x) // 3], color="#f0f0f0", linewidth=0)
            axes.plot(x, y, color=BLUE, linewidth=1.2)
            axes.set_xlim(0, x[-1])
            axes.set_ylim(0, top)
            axes.set_title(part, loc="left")
            axes.set_xlabel("pictures; grey: warm-up")
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        panels[0].set_ylabel("memory of its own, MB")
        return finished()
