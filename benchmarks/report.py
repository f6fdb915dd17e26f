"""One document, with diagrams, of what the benchmarks measured.

    python -m benchmarks.report results.jsonl -o docs/performance.md --images docs/images
    python -m benchmarks.report cpu.jsonl gpu.jsonl -o performance.md --images images

The files hold results as the benchmarks append them with `-o`, one JSON object a line (`benchmarks.harness.machine`);
what `benchmarks.training` prints last may be appended by hand. Of results of one benchmark, machine, device and
subject (plan, model or preset) the newest counts; each of these is a section of its own. Several of
`benchmarks.controlnet` are joined: of every comparison the newest counts. A line may be given a "note" by hand, text
that stands above its figures. The document says of every section on which machine, with which versions, from which
commit and by which commands it was measured, and what was computed or quoted instead. The same input gives the same
document and the same diagrams.

Diagrams are named after the document: `performance-….png`. Ones of an earlier report by that name that are no longer
shown are removed. Everything is written aside and renamed.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.analysis import report_plots as plots
from benchmarks.analysis.report_results import (
    Result,
    Row,
    checked,
    percent,
    plan_name,
    plural,
    read,
    seconds,
    signed,
    times,
)
from benchmarks.harness.machine import PACKAGES, BenchmarkError, markdown_table
from car_train.files import written_aside

LAST = "What isn't measured"


def shown(rows: Sequence[Row], columns: Mapping[str, str | tuple[str, Callable[[Any], Any]]]) -> str:
    """A table: key → heading, or heading and how a value is shown. Columns that are null in all rows are left out."""
    kept = {k: c for k, c in columns.items() if any(row.get(k) is not None for row in rows)}

    def cell(row: Row, key: str, column: str | tuple[str, Callable[[Any], Any]]) -> Any:
        value = row.get(key)
        return value if value is None or isinstance(column, str) else column[1](value)

    names = {k: c if isinstance(c, str) else c[0] for k, c in kept.items()}
    return markdown_table([{names[k]: cell(row, k, c) for k, c in kept.items()} for row in rows])


TIME = ("p50", seconds)
MB: Callable[[float], str] = lambda value: f"{value / 1e6:,.0f}"  # noqa: E731 - a column's way to show bytes


# ---- Diagrams ----


class Figures:
    """The diagrams of a document, by file name; a reference to each for the text."""

    def __init__(self, stem: str, link: str) -> None:
        self.stem, self.files, self._link = stem, dict[str, bytes](), link

    def add(self, result: Result, number: int, kind: str, caption: str, content: bytes | None) -> list[str]:
        """Lines that show it; none where there is nothing to draw."""
        if content is None:
            return []
        name = f"{self.stem}-{result.benchmark}-{number}-{kind}.png"
        self.files[name] = content
        return ["", f"![{caption}]({self._link}{name})", ""]


# ---- Sections ----

INT8 = (
    " *int8*: the plan's int8 form (`--weights int8`), opt-in; `python -m benchmarks.schedules --int8` measures what "
    "it does to pictures."
)


def latency(result: Result, number: int, figures: Figures) -> Iterator[str]:
    ours = result.of("end_to_end")
    model, s = result.settings["model"], result.settings
    made_up = " Weights are made up, which changes no time." if s["made_up_weights"] else ""
    yield (
        f"CAR of depth {model['depth']}, width {model['width']}, {model['image_size']}×{model['image_size']} pixels, "
        f"{s['tokens']} tokens, guidance {s['cfg']:g}, {plural(s['threads'], 'thread')}. Control image in host "
        f"memory → RGB in host memory, {s['warmup']} + {s['runs']} rounds, all in turn.{made_up}"
    )
    yield from figures.add(
        result, number, "pictures", "Seconds for a picture, of each candidate", plots.picture_bars([result])
    )
    yield shown(
        ours,
        {
            "candidate": "candidate",
            "batch": "batch",
            "p50": TIME,
            "p95": ("p95", seconds),
            "images_per_s": "pictures/s",
            "speedup": ("against the loop, fp32", times),
            "speedup_bf16": ("against its bf16 autocast", times),
            "batch_gain": ("pictures/s, against its first batch", times),
            "tokens_equal": ("tokens equal", percent),
            "of_limit": ("of the limit", percent),
        },
    )
    yield ""
    yield (
        "*published way*: the authors' loop in eager PyTorch on the same weights. *tokens equal*: to that loop in "
        "float32, from the same seed; one token that differs changes all that follow. *of the limit*: the time that "
        "this machine needs for the matrix products alone or for reading what has to be read, ÷ the measured time."
        + (INT8 if any(row["precision"] == "int8" for row in ours) else "")
    )
    yield ""
    yield "#### Where the time goes"
    yield from figures.add(result, number, "stages", "Seconds of each stage, stacked", plots.stage_stacks(result))
    yield from figures.add(
        result, number, "limit", "Each stage against the machine's limit", plots.against_limit(result)
    )
    yield from folded(
        "All stages in numbers",
        stage_table([row for row in result.of("stage") if row["batch"] == s["batch"][0]]),
    )
    yield from details("A further seed on the same control and class", next_seed(result))
    yield from details("Starting and memory, each in a process of its own", starts(result))
    yield from details("The machine's limit, by PyTorch's matrix products at this picture's sizes", limits(result))


def stage_table(rows: Sequence[Row]) -> str:
    return shown(
        rows,
        {
            "candidate": "candidate",
            "stage": "stage",
            "p50": TIME,
            "share": ("share", percent),
            "gflop": "GFLOP",
            "limit_s": ("limit", seconds),
            "bound": "bound by",
            "of_limit": ("of the limit", percent),
        },
    )


def folded(heading: str, text: str) -> Iterator[str]:
    """What only some readers want to see, behind a line to click on."""
    yield from ("", "<details>", f"<summary>{heading}</summary>", "", text, "", "</details>")


def details(heading: str, table: str | None) -> Iterator[str]:
    if table:
        yield from ("", f"#### {heading}", "", table)


def next_seed(result: Result) -> str:
    columns: dict[str, Any] = {"candidate": "candidate", "p50": TIME, "ratio": ("of a new control's", percent)}
    return shown(result.of("next_seed"), columns) if result.of("next_seed") else ""


def starts(result: Result) -> str:
    columns: dict[str, Any] = {
        "candidate": "candidate",
        "import_s": ("import", seconds),
        "open_s": ("open", seconds),
        "first_image_s": ("first picture", seconds),
        "cold_start_s": ("car-run, start to PNG", seconds),
        "peak_rss": ("peak memory, MB", MB),
        "rss_less_weights": ("less the weights, MB", MB),
        "plan_bytes": ("plan, MB", MB),
    }
    return shown(result.of("start"), columns) if result.of("start") else ""


def limits(result: Result) -> str:
    columns = {
        "dtype": "type",
        "threads": "threads",
        "gemm_gflops": "GFLOP/s",
        "gemm_gflops_best": "best size, GFLOP/s",
        "memory_gbs": "memory, GB/s",
    }
    return shown(result.of("limit"), columns) if result.of("limit") else ""


def controlnet(result: Result, number: int, figures: Figures) -> Iterator[str]:
    s = result.settings
    ours = s["ours"]
    yield (
        f"Ours (depth {ours['depth']}, {ours['image_size']}×{ours['image_size']}) and theirs ({s['theirs']}) in "
        f"turn, one picture at a time, {rounds(result)}, {plural(s['threads'], 'thread')}. All "
        "weights are made up: what is compared is time, and nothing is said about quality. Compared are only equals: "
        "eager with eager, compiled with compiled, engine with engine, in the same precision."
    )
    if any(row["candidate"].endswith(", int8") for row in result.of("ratio")):
        yield ""
        yield (
            "Where *ours* is int8 it is the plan's int8 form, opt-in, which multiplies eight-bit numbers, and theirs "
            "is not: these rows say what is gained by it, not how equals compare."
        )
    if any(without_engine(row) for row in result.of("ratio")):
        yield ""
        yield (
            "Theirs has no engine on this device: beside ours, which has one, stands what its users run, PyTorch, "
            "eager or compiled (column *theirs*). Of equals are the rows whose tier is eager or compiled."
        )
    if any(row["scaled"] for row in result.of("end_to_end")):
        yield ""
        yield (
            "*scaled*: fewer steps were timed than a picture has (column *timed*), and their time was multiplied to "
            "the whole number; every step does the same work."
        )
    yield from figures.add(
        result, number, "pictures", "Seconds for a picture, of each method", plots.picture_bars([result])
    )
    yield "Theirs ÷ ours, the median of the ratios within one round:"
    yield ""
    yield shown(
        result.of("ratio"),
        {
            "method": "method",
            "steps": "steps",
            "size": ("their pixels", lambda size: f"{size}²"),
            "tier": "tier",
            "precision": "precision",
            "candidate": "ours",
            "against": "theirs",
            "times_ours": ("times as long as ours", times),
            "p10": "p10",
            "p90": "p90",
            "scaled": ("scaled", yes),
        },
    )
    yield ""
    yield shown(
        result.of("end_to_end"),
        {
            "method": "method",
            "candidate": "candidate",
            "tier": "tier",
            "precision": "precision",
            "size": ("pixels", lambda size: f"{size}²"),
            "steps": "steps",
            "timed_steps": "timed",
            "p50": TIME,
            "p95": ("p95", seconds),
            "text_s": ("text", seconds),
            "control_s": ("control", seconds),
            "step_s": ("a step", seconds),
            "decode_s": ("decoder", seconds),
        },
    )
    published = [row for row in result.of("parameters") if row.get("published")]
    if published:
        yield ""
        parts = ", ".join(f"{row['part']} {row['parameters'] / 1e6:,.1f} M" for row in published)
        yield f"Parameters, equal to the published networks': {parts}."


def rounds(result: Result) -> str:
    """How often was measured, in all runs that were joined."""
    runs = dict.fromkeys((r.settings["warmup"], r.settings["runs"]) for r in (*result.parts, result))
    return " or ".join(f"{warmup} + {timed}" for warmup, timed in sorted(runs)) + " rounds"


def without_engine(ratio: Row) -> bool:
    """Whether ours is an engine and theirs is PyTorch."""
    return bool(ratio["tier"] == "engine" != ratio["against"])


def yes(value: bool) -> str:
    return "yes" if value else "no"


def growth(result: Result, number: int, figures: Figures) -> Iterator[str]:
    measured = result.of("measured")
    if measured:
        yield "#### Measured"
        yield ""
        yield "Control image in host memory → RGB in host memory, guided; each row in a process of its own."
        yield from figures.add(
            result, number, "measured", "Measured seconds for a picture", plots.growth_measured(result)
        )
        yield shown(
            measured,
            {
                "model": "model",
                "image_size": ("pixels", lambda size: f"{size}²"),
                "backend": "backend",
                "precision": "precision",
                "batch": "batch",
                "p50": ("p50 of a batch", seconds),
                "images_per_s": ("a picture", lambda rate: seconds(1 / rate)),
                "gflop": ("TFLOP", lambda g: g / 1e3),
                "of_limit": ("of the limit", percent),
                "memory_bytes": ("memory, MB", MB),
            },
        )
        yield ""
    yield "#### Computed: an RTX 4090 at best"
    yield ""
    yield (
        "**Nothing in this part was measured.** Operations and bytes are counted in the graphs of each model; each "
        "stage takes at least its operations or its bytes at the card's rates by its maker, whichever is longer. No "
        "implementation of these graphs can be faster there, and a real one is slower. 1024×1024 has no published "
        "model: its scales are assumed."
    )
    yield from figures.add(
        result, number, "floor", "Least time of a picture by size, depth and batch", plots.growth_floors(result)
    )
    yield from figures.add(
        result, number, "roofline", "Roofline of an RTX 4090, computed", plots.growth_roofline(result)
    )
    yield shown(
        result.of("size"),
        {
            "image_size": ("pixels", lambda size: f"{size}²"),
            "tokens": "tokens",
            "sides": "sides of the scales",
            "published": ("published", yes),
        },
    )
    yield ""
    yield floor_table(result)
    yield ""
    yield "What a batch holds in memory, computed. *Scores*: of one block at the largest scale, where not fused."
    yield ""
    yield memory_table(result)
    yield ""
    yield "#### Quoted: what others published for an RTX 4090"
    yield ""
    yield shown(
        result.of("quoted"),
        {
            "method": "method",
            "image_size": ("pixels", lambda size: f"{size}²"),
            "precision": "precision",
            "steps": "steps",
            "seconds": ("time", seconds),
            "source": "source",
        },
    )


def by_size(result: Result, question: str, value: Callable[[Row], str]) -> str:
    """Computed rows as a table: a row for each size and depth, a column for each precision and batch."""
    rows: dict[tuple[int, int], dict[str, str]] = {}
    for row in result.of(question):
        if row.get("stage", "image") == "image":
            cells = rows.setdefault((row["image_size"], row["depth"]), {})
            cells["pixels"], cells["model"] = f"{row['image_size']}²", f"d{row['depth']}"
            cells[f"{row['precision']}, batch {row['batch']}"] = value(row)
    return markdown_table(list(rows.values()))


def floor_table(result: Result) -> str:
    return "Least time of a batch, computed:\n\n" + by_size(result, "floor", lambda row: seconds(row["floor_s"]))


def memory_table(result: Result) -> str:
    def value(row: Row) -> str:
        parts = (row[key] / 1e9 for key in ("weight_bytes", "kv_bytes", "score_bytes"))
        return "{:.2f} + {:.2f} + {:.2f}".format(*parts)

    return "Weights + K/V + scores, GB:\n\n" + by_size(result, "memory", value)


def schedules(result: Result, number: int, figures: Figures) -> Iterator[str]:
    yield (
        "What a shortened scale loop costs and what it changes, beside the exact one. *KID* is the distance to real "
        "held-out pictures; its floor is what two halves of the real pictures differ by. *F1*: Canny edges of the "
        "picture against the control, one pixel of tolerance."
        + (" *int8*: the exact loop of the plan's int8 form." if _has_int8(result) else "")
    )
    yield from figures.add(
        result, number, "schedules", "Time and change of each schedule", plots.schedule_map(result)
    )
    yield shown(
        result.of("schedule"),
        {
            "schedule": "schedule",
            "flags": ("flags", lambda flags: f"`{flags}`" if flags else ""),
            "p50": TIME,
            "ratio": ("of exact's time", percent),
            "tokens_equal": ("tokens equal", percent),
            "kid_half": "KID",
            "kid_floor": "its floor",
            "f1": "F1",
            "f1_change": "F1, change",
            "f1_change_error": "± standard error",
            "pictures": "pictures",
        },
    )


def _has_int8(result: Result) -> bool:
    return any(row["schedule"] == "int8" for row in result.of("schedule"))


def soak(result: Result, number: int, figures: Figures) -> Iterator[str]:
    s = result.settings
    verdict = "All passed." if all(row.get("passed", True) for row in result.rows) else "**Not all passed.**"
    yield (
        f"{s['images']} pictures by one thread, the same calls by {plural(s['threads'], 'thread')} at once, "
        f"{s['opens']} openings of the plan. After the first third of each part the median of the process's own "
        f"memory may grow by {100 * s['tolerance']:g} % from one half to the other, and an opening may leave as "
        f"large a part of what an open plan holds. {verdict}"
    )
    yield from figures.add(result, number, "memory", "Memory over pictures", plots.soak_memory(result))
    yield shown(
        result.of("memory"),
        {
            "part": "part",
            "samples": "samples",
            "rss_first": ("first half, MB", MB),
            "rss_last": ("second half, MB", MB),
            "growth": ("growth", signed),
            "bytes_per_picture": ("bytes a picture", lambda b: f"{b:,.0f}"),
            "passed": ("passed", yes),
        },
    )
    yield ""
    columns = {"part": "part", "calls": "calls", "pictures": "pictures", "different": "gave another picture"}
    yield shown(result.of("pictures"), columns)
    yield ""
    for left in result.of("reopening"):
        yield (
            f"An open plan holds {left['rss_held'] / 1e6:,.0f} MB; each of {left['openings']} openings left "
            f"{left['bytes_per_opening'] / 1e6:.2f} MB ({signed(left['left'])}). After the first closing there were "
            f"{left['descriptors_first']} file descriptors and {left['threads_first']} threads, after the last "
            f"{left['descriptors_last']} and {left['threads_last']}."
        )


def training(result: Result, number: int, figures: Figures) -> Iterator[str]:
    s = result.settings
    yield (
        f"One step (forward, backward, AdamW) at width {s['width']}, {s['tokens']} tokens, "
        f"{s['pixels']}×{s['pixels']} pixels, batch {s['batch']}, {s['precision']}. *plain* is what the published "
        "code does; the rows between tell what each change is worth alone. All find the same loss."
    )
    yield ""
    yield shown(
        result.rows,
        {
            "stage": "stage",
            "variant": "step",
            "step_p50": ("p50", seconds),
            "images_per_s": "pictures/s",
            "speedup": ("against plain", times),
            "speedup_p10": "p10",
            "speedup_p90": "p90",
            "peak_rss": ("peak memory, MB", MB),
        },
    )


Section = Callable[[Result, int, Figures], Iterator[str]]
SECTIONS: dict[str, tuple[str, Section]] = {
    "latency": ("A picture", latency),
    "controlnet": ("Beside ControlNet, T2I-Adapter and LCM", controlnet),
    "growth": ("Size, depth and batch", growth),
    "schedules": ("Shorter schedules", schedules),
    "soak": ("Hundreds of pictures", soak),
    "training": ("A training step", training),
}
"""Benchmark → heading and text, in the document's order."""


# ---- In short ----


def headlines(result: Result) -> Iterator[tuple[str, str]]:
    """What to know of a result before all else: (what, figure)."""
    if result.benchmark == "latency":
        yield from latency_headlines(result)
    elif result.benchmark == "controlnet":
        yield from controlnet_headlines(result)
    elif result.benchmark == "growth":
        yield from growth_headlines(result)
    elif result.benchmark == "soak":
        (alone, *_), pictures = result.of("memory"), result.of("pictures")
        differing, made = (sum(row[key] for row in pictures) for key in ("different", "pictures"))
        yield (
            f"memory over {result.settings['images']} pictures, {result.subject}",
            f"{signed(alone['growth'])}; "
            + (
                f"**{differing} calls gave another one**"
                if differing
                else f"every request gave the same, {made} in all"
            ),
        )
    elif result.benchmark == "schedules":
        # One that stops early draws the same tokens as far as it goes, which says nothing of what it lacks.
        whole = [
            r for r in result.of("schedule") if "--stop-after" not in r["flags"] and r["tokens_equal"] is not None
        ]
        faster = [r for r in whole if r["ratio"] < 1 and r["schedule"] != "int8"]
        for row in sorted(faster, key=lambda r: -r["tokens_equal"])[:1]:
            yield (
                f"the shorter schedule that changes least, {row['schedule']} ({result.subject})",
                f"{percent(row['ratio'])} of the time, {percent(row['tokens_equal'])} of the tokens as exact",
            )
        for row in (r for r in whole if r["schedule"] == "int8"):
            quality = f"; KID {row['kid_half']:.3f}, exact {whole[0]['kid_half']:.3f}" if row["kid_half"] else ""
            equal = f"{percent(row['tokens_equal'])} of the tokens as exact"
            yield (
                f"the plan's int8 form ({result.subject})",
                f"{percent(row['ratio'])} of the time, {equal}{quality}",
            )
    else:
        for row in result.rows:
            if row["variant"] == "ours":
                yield f"training step, {row['stage']}, {result.subject}", f"{times(row['speedup'])} against plain"


def latency_headlines(result: Result) -> Iterator[tuple[str, str]]:
    first = [r for r in result.of("end_to_end") if r["batch"] == result.settings["batch"][0]]
    ours = [r for r in first if r["backend"] is not None]
    plan, size = plan_name(result.settings["plan"]), result.settings["model"]["image_size"]
    # What rounds more stands beside what rounds less, not in its place.
    for precision in dict.fromkeys(r["precision"] for r in ours):
        best = min((r for r in ours if r["precision"] == precision), key=lambda r: r["p50"] / r["batch"])
        against = [
            f"{times(best[key])} against {name}"
            for key, name in (("speedup", "the published loop in float32"), ("speedup_bf16", "its bf16 autocast"))
            if best.get(key) is not None
        ]
        yield (
            f"a picture of {plan}, {size}×{size}, batch {best['batch']}, on {best['candidate']}",
            "; ".join(
                [f"**{seconds(best['p50'])}**", *against, f"{percent(best['of_limit'])} of the machine's limit"]
            ),
        )


def controlnet_headlines(result: Result) -> Iterator[tuple[str, str]]:
    tiers = [
        tier for tier in ("engine", "compiled", "eager") if any(row["tier"] == tier for row in result.of("ratio"))
    ]
    # The fastest tier measured, and in it our fastest engine; of several of theirs, that which is nearest to ours.
    fastest: dict[tuple[Any, ...], Row] = {}
    for row in result.of("ratio"):
        key = (row["method"], row["steps"], row["size"], row["precision"], row["against"])
        equals = row["tier"] == tiers[0] and not row["candidate"].endswith(", int8")
        if equals and (key not in fastest or row["times_ours"] > fastest[key]["times_ours"]):
            fastest[key] = row
    chosen: dict[tuple[Any, ...], Row] = {}
    for (*of, _precision, _against), row in fastest.items():
        if tuple(of) not in chosen or row["times_ours"] < chosen[tuple(of)]["times_ours"]:
            chosen[tuple(of)] = row
    for (method, steps, size), row in chosen.items():
        scaled = ", scaled" if row["scaled"] else ""
        tier = f"{row['against']} PyTorch" if without_engine(row) else row["tier"]
        yield (
            f"{method}, {steps} steps, {size}×{size}, {tier}, {row['precision']}",
            f"**{times(row['times_ours'])}** as long as ours ({row['candidate']}){scaled}",
        )
    for row in result.of("ratio"):
        if row["candidate"].endswith(", int8") and row["method"] == "ControlNet":
            yield (
                f"ControlNet, {row['steps']} steps, {row['size']}×{row['size']}, {row['tier']}, {row['precision']}, "
                "beside our int8 plan",
                f"**{times(row['times_ours'])}** as long as ours ({row['candidate']})"
                + (", scaled" if row["scaled"] else ""),
            )


def growth_headlines(result: Result) -> Iterator[tuple[str, str]]:
    for row in result.of("measured"):
        if row["batch"] == 1:
            size = row["image_size"]
            yield (
                f"a picture of {row['model']}, {size}×{size}, on {row['backend']}, {row['precision']}",
                f"**{seconds(row['p50'])}**",
            )
    floors = {
        (r["image_size"], r["depth"]): r for r in result.of("floor") if (r["stage"], r["batch"]) == ("image", 1)
    }
    for size in sorted({size for size, _ in floors}):
        depths = sorted(depth for s, depth in floors if s == size)
        parts = (f"d{depth} {seconds(floors[size, depth]['floor_s'])}" for depth in sorted({depths[0], depths[-1]}))
        precision = floors[size, depths[0]]["precision"]
        yield f"computed, not measured: the least an RTX 4090 needs at {size}×{size}, {precision}", ", ".join(parts)


# ---- The document ----


def document(results: Sequence[Result], figures: Figures, title: str) -> str:
    """All of it as Markdown."""
    lines = [f"# {title}", "", *introduction(), "", "## In short", ""]
    points = [(r, point) for r in results for point in checked(r, lambda r: list(headlines(r)))]
    points = [(r, (what, f"{figure}; see its note" if any(notes(r)) else figure)) for r, (what, figure) in points]
    lines.append(
        markdown_table([{"what": what, "figure": figure, "machine": r.short_place} for r, (what, figure) in points])
    )
    sections = list(numbered(results))
    lines += ["", "## Contents", "", *contents(sections), ""]
    for heading, members in sections:
        lines += [f"## {heading}", ""]
        for number, result in members:
            body = checked(result, partial(body_of, number=number, figures=figures))
            lines += [f"### {subheading(result)}", "", *notes(result), *body, "", *provenance(result), ""]
    lines += [f"## {LAST}", "", *unmeasured(results), ""]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines))


def body_of(result: Result, number: int, figures: Figures) -> list[str]:
    """A result's text, by its benchmark; its diagrams go to `figures`."""
    _, section = SECTIONS[result.benchmark]
    return list(section(result, number, figures))


def notes(result: Result) -> list[str]:
    """Each that is there, a paragraph."""
    texts = dict.fromkeys(r.note for r in (*result.parts, result) if r.note)
    return [line for text in texts for line in (f"**Note:** {text}", "")]


def introduction() -> list[str]:
    return [
        "How fast pictures come, what they cost, and what that is compared with. Written by `python -m "
        "benchmarks.report` from the results of the benchmarks; under each section stand the machine, the versions, "
        "the commit and the command. p50 is the median and p95 the time that 95 % stay below; ratios are medians of "
        "the ratios within one round, in which all took turns on the same machine. 1 GFLOP is 10⁹ multiplications or "
        "additions, 1 MB is 10⁶ bytes. What was computed or quoted, and not measured, is labelled so.",
    ]


def numbered(results: Sequence[Result]) -> Iterator[tuple[str, list[tuple[int, Result]]]]:
    """Sections with their results, which are numbered within each."""
    for benchmark, (heading, _) in SECTIONS.items():
        members = [r for r in results if r.benchmark == benchmark]
        if members:
            yield heading, list(enumerate(members, 1))


def subheading(result: Result) -> str:
    return f"{result.subject} — {result.short_place}"


def contents(sections: Sequence[tuple[str, list[tuple[int, Result]]]]) -> Iterator[str]:
    seen: dict[str, int] = {}

    def link(heading: str) -> str:
        """As GitHub makes anchors: equal ones are numbered."""
        base = anchor(heading)
        seen[base] = seen.get(base, -1) + 1
        return f"[{heading}](#{base}{f'-{seen[base]}' if seen[base] else ''})"

    for heading, members in sections:
        yield f"- {link(heading)}"
        yield from (f"    - {link(subheading(result))}" for _, result in members)
    yield f"- {link(LAST)}"


def anchor(heading: str) -> str:
    """GitHub's: lower case, spaces to hyphens, punctuation dropped."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def provenance(result: Result) -> list[str]:
    """Machine, versions, commit and command of each run under a section."""
    runs = sorted((*result.parts, result), key=lambda r: r.time)
    blocks = [provenance_of(r) for r in runs]
    lines = blocks[0]
    for before, block in pairwise(blocks):
        # What a run shares with the one before isn't told again.
        lines += [">", *(block if block[:1] != before[:1] else block[1:])]
    return lines


def provenance_of(result: Result) -> list[str]:
    m = result.machine
    parts = [
        str(m.get("cpu") or "unknown processor"),
        plural(m.get("cores"), "core"),
        f"{m['ram'] / 1e9:.0f} GB" if m.get("ram") else None,
        m.get("gpu"),
        m.get("os"),
    ]
    versions = [f"{name} {m[name]}" for name in ("python", *PACKAGES) if m.get(name)]
    when = f"{result.time:%Y-%m-%d %H:%M} UTC"
    return [
        f"> {'; '.join(part for part in parts if part)}.  ",
        f"> {', '.join(versions)}; commit {m.get('commit') or 'unknown'}; {when}.  ",
        f"> `{m.get('command') or 'unknown command'}`",
    ]


def unmeasured(results: Sequence[Result]) -> Iterator[str]:
    """What a reader may miss here."""
    there = {r.benchmark for r in results}
    for benchmark, (heading, _) in SECTIONS.items():
        if benchmark not in there:
            yield f"- {heading}: no result was given (`python -m benchmarks.{benchmark} --help`)."
    if all(r.device == "cpu" for r in results):
        yield "- Any GPU. Figures for one are computed or quoted, and labelled so."
    if {"latency", "controlnet"} & there:
        yield "- Quality. Where weights are made up, times hold and pictures say nothing."
    if "controlnet" in there and any(row["scaled"] for r in results for row in r.of("end_to_end") if "scaled" in row):
        yield "- All steps of the slower methods: rows with *scaled* were multiplied from fewer."
    yield "- Power, and several users at once on one machine."


def write(output: Path, images: Path, text: str, figures: Figures) -> None:
    """Diagrams, then the document, each aside and renamed; then earlier diagrams of its name are removed."""
    output.parent.mkdir(parents=True, exist_ok=True)
    images.mkdir(parents=True, exist_ok=True)
    contents_of = {images / name: content for name, content in figures.files.items()}
    for path, content in {**contents_of, output: text.encode("utf-8")}.items():
        with written_aside(path) as file:
            file.write_bytes(content)
    for old in images.glob(f"{figures.stem}-*.png"):
        if old.name not in figures.files:
            old.unlink()


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("results", type=Path, nargs="+", help="files of results, one JSON object a line")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the document, .md")
    parser.add_argument("--images", type=Path, required=True, help="folder of its diagrams")
    parser.add_argument("--title", default="Performance", help="(default: Performance)")
    args = parser.parse_args(argv)
    if args.output.suffix != ".md":
        parser.error(f"-o {args.output}: give a file that ends with .md")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        results = read(args.results)
        link = Path(os.path.relpath(args.images, args.output.parent)).as_posix()
        figures = Figures(args.output.stem, "" if link == "." else f"{link}/")
        write(args.output, args.images, document(results, figures, args.title), figures)
    except (BenchmarkError, OSError) as error:
        print(f"benchmarks.report: error: {error}", file=sys.stderr)
        return 2
    print(args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
