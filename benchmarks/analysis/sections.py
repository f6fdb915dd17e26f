"""The text and tables of `benchmarks.report`: a section for each benchmark's results, and the tables at its top."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from benchmarks.analysis import plots
from benchmarks.analysis.columns import (
    GEMM,
    LATENCY,
    RATIOS,
    SCHEDULE_CHANGES,
    SCHEDULE_TIMES,
    THEIRS,
    TRAINING,
)
from benchmarks.analysis.results import Result, Row, checked, plan_name
from benchmarks.harness.tables import markdown_table, percent, plural, seconds, table, times, yes


class Figures:
    """The diagrams of a document, by file name; a reference to each for the text."""

    def __init__(self, stem: str, link: str) -> None:
        self.stem, self.files, self._link = stem, dict[str, bytes](), link

    def add(self, result: Result, number: int, caption: str, content: bytes) -> str:
        """The line that shows a diagram."""
        name = f"{self.stem}-{result.benchmark}-{number}.png"
        self.files[name] = content
        return f"![{caption}]({self._link}{name})"


def paragraphs(*texts: str) -> Iterator[str]:
    """Each that isn't empty, with an empty line after it."""
    for text in texts:
        if text:
            yield from (text, "")


# ---- Latency ----


def latency(result: Result, number: int, figures: Figures) -> Iterator[str]:
    ours = result.of("end_to_end")
    model, s = result.settings["model"], result.settings
    _, columns = LATENCY["end_to_end"]
    yield from paragraphs(
        f"CAR of depth {model['depth']}, width {model['width']}, {model['image_size']}×{model['image_size']} pixels, "
        f"{s['tokens']} tokens, guidance {s['cfg']:g}, {plural(s['threads'], 'thread')}. Control image in host "
        f"memory → RGB in host memory, {s['warmup']} + {s['runs']} rounds, all in turn."
        + (" Weights are random, which changes no time." if s["random_weights"] else ""),
        figures.add(result, number, "Seconds for an image, of each candidate", plots.latency_bars(result)),
        table(ours, columns),
        "*published way*: the authors' loop in eager PyTorch on the same weights. *tokens equal*: to that loop in "
        "float32, from the same seed; one token that differs changes all that follow. *vs. PyTorch's GEMM rate*: the "
        "time of the matrix products alone by PyTorch on this machine (or of reading what has to be read, if that is "
        "longer) ÷ the measured time; faster kernels than PyTorch's exceed 100 %.",
        "*int8*: the plan's INT8 form (`--weights int8`), opt-in; `python -m benchmarks.schedules --int8` measures "
        "what it changes in images."
        if any(row["precision"] == "int8" for row in ours)
        else "",
    )
    for question in ("next_seed", "start", "limit"):
        heading, columns = LATENCY[question]
        if result.of(question):
            yield from paragraphs(f"#### {heading}", table(result.of(question), columns))
    yield from paragraphs("#### Where the time goes: p50 of each stage", stage_table(result))


def stage_table(result: Result) -> str:
    """A row for each stage, a column for each candidate, at the first batch size."""
    rows: dict[str, Row] = {}
    for row in result.of("stage"):
        if row["batch"] == result.settings["batch"][0]:
            cells = rows.setdefault(row["stage"], {"stage": row["stage"], "GFLOP": row["gflop"]})
            cells[row["candidate"]] = seconds(row["p50"])
    return markdown_table(list(rows.values()))


# ---- ControlNet ----


def controlnet(result: Result, number: int, figures: Figures) -> Iterator[str]:
    s = result.settings
    ours, ratios = s["ours"], result.of("ratio")
    runs = dict.fromkeys((r.settings["warmup"], r.settings["runs"]) for r in (*result.parts, result))
    rounds = " or ".join(f"{warmup} + {timed}" for warmup, timed in sorted(runs)) + " rounds"
    yield from paragraphs(
        f"Ours (depth {ours['depth']}, {ours['image_size']}×{ours['image_size']}) and theirs ({s['theirs']}) in "
        f"turn, one image at a time, {rounds}, {plural(s['threads'], 'thread')}. All weights are random: what is "
        "compared is time, and nothing is said about quality. Compared are only equals: eager with eager, compiled "
        "with compiled, engine with engine, in the same precision.",
        "Where *ours* is int8 it is the plan's INT8 form, opt-in, and theirs is not: these rows say what it gains, "
        "not how equals compare."
        if any(row["candidate"].endswith(", int8") for row in ratios)
        else "",
        "Theirs has no engine on this device: ours, which has one, is compared with what its users run, PyTorch, "
        "eager or compiled (column *theirs*). Of equals are the rows whose tier is eager or compiled."
        if any(without_engine(row) for row in ratios)
        else "",
        "*scaled*: fewer steps were timed than an image has (column *timed*), and their time was multiplied to the "
        "whole number; every step does the same work."
        if any(row["scaled"] for row in ratios)
        else "",
        figures.add(
            result, number, "How many times as long as ours others take", plots.ratio_bars(list(fastest(ratios)))
        ),
        "Theirs ÷ ours, the median of the ratios within one round, and their spread:",
        table(ratios, RATIOS),
        table([row for row in result.of("end_to_end") if row["whose"] == "theirs"], THEIRS),
    )
    published = [row for row in result.of("parameters") if row.get("published")]
    if published:
        parts = ", ".join(f"{row['part']} {row['parameters'] / 1e6:,.1f} M" for row in published)
        yield f"Parameters, equal to the published networks': {parts}."


def without_engine(ratio: Row) -> bool:
    """Whether ours is an engine and theirs is PyTorch."""
    return bool(ratio["tier"] == "engine" != ratio["against"])


def fastest(ratios: Sequence[Row]) -> Iterator[Row]:
    """The ratios to our fastest floating-point candidate, one for each of theirs and each precision."""
    best: dict[tuple[Any, ...], Row] = {}
    for row in ratios:
        key = tuple(row[k] for k in ("tier", "method", "size", "steps", "precision", "against"))
        if not row["candidate"].endswith(", int8") and (
            key not in best or row["times_ours"] > best[key]["times_ours"]
        ):
            best[key] = row
    yield from best.values()


# ---- Schedules and training ----


def schedules(result: Result, number: int, figures: Figures) -> Iterator[str]:
    rows = result.of("schedule")
    floor = {"schedule": "real images (noise floor)", "kid_half": rows[0].get("kid_floor")}
    yield from paragraphs(
        "What a shortened scale loop costs and what it changes, against the exact one. *KID* is the distance to real "
        "held-out images; its floor is what two halves of the real images differ by. *F1*: Canny edges of the image "
        "against the control, one pixel of tolerance."
        + (" *int8*: the exact loop of the plan's INT8 form." if any(r["schedule"] == "int8" for r in rows) else ""),
        table(rows, SCHEDULE_TIMES),
        table([*rows, floor] if floor["kid_half"] is not None else rows, SCHEDULE_CHANGES),
    )


def training(result: Result, number: int, figures: Figures) -> Iterator[str]:
    s = result.settings
    yield from paragraphs(
        f"One step (forward, backward, AdamW) at width {s['width']}, {s['tokens']} tokens, "
        f"{s['pixels']}×{s['pixels']} pixels, batch {s['batch']}, {s['precision']}. *plain* is what the published "
        "code does; the rows between show what each change is worth alone. All find the same loss.",
        table(result.rows, TRAINING),
    )


Section = Callable[[Result, int, Figures], Iterator[str]]
SECTIONS: dict[str, tuple[str, Section]] = {
    "latency": ("An image", latency),
    "controlnet": ("ControlNet, T2I-Adapter and LCM", controlnet),
    "schedules": ("Shorter schedules", schedules),
    "training": ("A training step", training),
}
"""Benchmark → heading and text, in the document's order."""


# ---- In short ----


def in_short(results: Sequence[Result]) -> Iterator[str]:
    """A table for each benchmark of what to know before all else."""
    for heading, benchmark, rows_of in (
        ("Time of an image", "latency", latency_headlines),
        ("How many times as long as ours others take, like with like", "controlnet", controlnet_headlines),
        ("The shorter schedule that changes least", "schedules", schedules_headlines),
        ("A training step, ours vs. plain", "training", training_headlines),
    ):
        rows = []
        for result in results:
            if result.benchmark == benchmark:
                note = " (see its note)" if any(r.note for r in (*result.parts, result)) else ""
                found: list[Row] = checked(result, partial(_listed, rows_of))
                rows += [{**row, "machine": result.short_place + note} for row in found]
        if rows:
            yield from paragraphs(f"{heading}:", markdown_table(rows))


def _listed(rows_of: Callable[[Result], Iterator[Row]], result: Result) -> list[Row]:
    return list(rows_of(result))


def latency_headlines(result: Result) -> Iterator[Row]:
    """Our fastest of each precision: what rounds more has a row of its own."""
    s = result.settings
    ours = [r for r in result.of("end_to_end") if r["batch"] == s["batch"][0] and r["backend"] is not None]
    for precision in dict.fromkeys(r["precision"] for r in ours):
        best = min((r for r in ours if r["precision"] == precision), key=lambda r: r["p50"])
        yield {
            "plan": plan_name(s["plan"]),
            "pixels": f"{s['model']['image_size']}²",
            "batch": best["batch"],
            "on": best["candidate"],
            "time": seconds(best["p50"]),
            "vs. loop, fp32": None if best["speedup"] is None else times(best["speedup"]),
            "vs. loop, bf16": None if best["speedup_bf16"] is None else times(best["speedup_bf16"]),
            GEMM[0]: percent(best["of_limit"]),
        }


def controlnet_headlines(result: Result) -> Iterator[Row]:
    """Rows of the fastest tier: our fastest candidate vs. the one of theirs that comes nearest, and our INT8 ones."""
    ratios = result.of("ratio")
    tier = next(t for t in ("engine", "compiled", "eager") if any(row["tier"] == t for row in ratios))
    chosen: dict[tuple[Any, ...], Row] = {}
    for row in fastest([row for row in ratios if row["tier"] == tier]):
        key = row["method"], row["steps"], row["size"]
        if key not in chosen or row["times_ours"] < chosen[key]["times_ours"]:
            chosen[key] = row
    with_int8 = [r for r in ratios if r["candidate"].endswith(", int8") and r["method"] == "ControlNet"]
    for row in (*chosen.values(), *with_int8):
        yield {
            "method": row["method"],
            "steps": row["steps"],
            "pixels": f"{row['size']}²",
            "theirs": f"{row['against']} PyTorch" if without_engine(row) else row["tier"],
            "precision": row["precision"],
            "ours": row["candidate"],
            "times as long": times(row["times_ours"]),
            "scaled": yes(row["scaled"]),
        }


def schedules_headlines(result: Result) -> Iterator[Row]:
    """One that stops early is none: its tokens are the same as far as it goes, which doesn't show what it lacks."""
    whole = [r for r in result.of("schedule") if "--stop-after" not in r["flags"] and r["tokens_equal"] is not None]
    faster = [r for r in whole if r["ratio"] < 1 and r["schedule"] != "int8"]
    least = sorted(faster, key=lambda r: -float(r["tokens_equal"]))[:1]
    for row in [*least, *(r for r in whole if r["schedule"] == "int8")]:
        yield {
            "plan": result.subject,
            "schedule": row["schedule"],
            "vs. exact's time": percent(row["ratio"]),
            "tokens as exact": percent(row["tokens_equal"]),
            "KID": row["kid_half"],
            "exact's KID": whole[0]["kid_half"],
        }


def training_headlines(result: Result) -> Iterator[Row]:
    for row in result.rows:
        if row["variant"] == "ours":
            yield {"stage": row["stage"], "model": result.subject, "vs. plain": times(row["speedup"])}
