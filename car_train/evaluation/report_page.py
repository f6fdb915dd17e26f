"""What a report says and how it is laid out: header, samples and curves on A4 landscape, or the same as HTML."""

from __future__ import annotations

import base64
import dataclasses
import html
import io
import json
import math
import os
import textwrap
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_pdf import PdfPages
from matplotlib.figure import Figure
from PIL import Image

from car_train.config import FUSIONS, TRANSFORMERS
from car_train.evaluation.report import STAGES, Run, summary
from car_train.evaluation.report_curves import (
    COLOURS,
    GREY,
    MARGIN,
    NAMES,
    STYLE,
    draw_curves,
    run_labels,
    smooth,
    smoothing,
)
from car_train.training.trainer import TrainOptions

A4 = (11.69, 8.27)  # inches, landscape
DPI = 160

# In the header already, or without meaning for the result.
NOT_LISTED = frozenset(
    "data output steps batch keep threads workers preload token_root validate_every save_every tensorboard".split()
)

# "steps" has a column of its own; the rest is without meaning for the result.
NOT_COMPARED = NOT_LISTED - {"data", "batch"}

LINE = 0.162  # inches from one line of the header to the next
TEXT = 7.5  # points
LETTER = 0.062  # inches: mean width of a letter of that size
TITLE_HEIGHT = 0.42  # inches
SHEETS = 4
"""Sample sheets shown in a comparison; more would be too small to see anything."""


def render(stages: Sequence[Sequence[Run]], suffix: str) -> bytes:
    """The file's content: a page for each group of runs of one stage.

    PDF and HTML have pages; in a PNG they are below each other. ReportError: a run has nothing to draw.
    """
    with mpl.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # a folder's name may be in any script
        mpl.rcdefaults()  # a report does not depend on anyone's matplotlibrc
        mpl.rcParams.update(STYLE)
        if suffix == ".html":
            return make_html(stages).encode("utf-8")
        file = io.BytesIO()
        if suffix == ".pdf":
            with PdfPages(file, metadata={"CreationDate": None}) as document:
                for runs in stages:
                    document.savefig(make_page(runs), dpi=DPI)
            return file.getvalue()
        pages = [_raster(make_page(runs)) for runs in stages]
        whole = Image.new("RGB", (pages[0].width, sum(page.height for page in pages)))
        for i, page in enumerate(pages):
            whole.paste(page, (0, i * page.height))
        whole.save(file, "PNG")
        return file.getvalue()


def _raster(page: Figure) -> Image.Image:
    file = io.BytesIO()
    # A Figure made without pyplot draws with Agg and needs no display.
    page.savefig(file, format="png", dpi=DPI)
    return Image.open(file).convert("RGB")


def facts(run: Run) -> list[tuple[str, str]]:
    """The header's lines, (name, text); what the run doesn't tell is left out."""
    rows = [(name, text) for name, text in _sizes(run) if text]
    if run.parameters:
        total, trained = run.parameters.get("total"), run.parameters.get("trainable")
        rows.append(("parameters", ", ".join(_parameter_words(total, trained))))
    if "data" in run.options or run.pictures:
        name = Path(str(run.options.get("data", ""))).name
        counts = [f"{n:,} {split}" for split, n in run.pictures.items()]
        rows.append(("pictures", " · ".join(part for part in (name, ", ".join(counts)) if part)))
    rows.append(("steps", _steps(run)))
    rate = run.images_per_second()
    processes = f" · {run.processes} processes" if run.processes > 1 else ""
    rows.append(("time", duration(run.seconds) + (f" · {rate:.3g} pictures/s" if rate else "") + processes))
    changed = changed_options(run.options)
    if changed:
        rows.append(("options", ", ".join(f"{k} {v}" for k, v in changed.items())))
    elif not run.options:
        rows.append(("options", "not recorded (the run has no run.json)"))
    if run.damaged:
        rows.append(("log", f"{run.damaged} unreadable {'line' if run.damaged == 1 else 'lines'} left out"))
    return rows


def _sizes(run: Run) -> Iterable[tuple[str, str]]:
    if run.config is None:
        return
    tokenizer, base, branch = run.config.vqvae, run.config.var, run.config.car
    sides = ", ".join(map(str, tokenizer.sides))
    yield "images", f"{tokenizer.image_size}×{tokenizer.image_size}, {tokenizer.tokens} tokens, sides {sides}"
    if run.stage == "vqvae":
        levels = " ".join(str(tokenizer.channels * m) for m in tokenizer.multipliers)
        yield "codebook", f"{tokenizer.vocab:,} codes of {tokenizer.latent_channels} channels"
        yield "CNN", f"channels {levels}, residual blocks per level: {tokenizer.res_blocks}"
    elif base is not None:
        shared = ", shared AdaLN" if base.shared_aln else ""
        yield "transformer", f"depth {base.depth}, width {base.C}, heads {base.H}{shared}, {base.classes} classes"
        if branch is not None and run.stage == "car":
            widths = f" {' '.join(map(str, branch.encoder_widths))}" if branch.encoder == "conv" else ""
            parts = [branch.control_type, f"encoder {branch.encoder}{widths}"]
            # The published model's are not worth a word.
            parts += [f"transformer {branch.transformer}"] if branch.transformer != TRANSFORMERS[0] else []
            parts += [f"fusion {branch.fusion}"] if branch.fusion != FUSIONS[0] else []
            yield "control", ", ".join(parts)


def _parameter_words(total: int | None, trained: int | None) -> Iterable[str]:
    if trained:
        yield f"{count(trained)} trained"
    if total and total != trained:
        yield f"{count(total)} in all"


def _steps(run: Run) -> str:
    steps, batch = run.options.get("steps"), run.options.get("batch")
    text = f"{run.step:,}" + (f" of {steps:,}" if isinstance(steps, int) and steps != run.step else "")
    if isinstance(batch, int):
        text += f" · batch {batch}"
        if run.pictures.get("train"):
            text += f" · {run.step * batch / run.pictures['train']:.1f} epochs"
    return text


def changed_options(options: dict[str, Any]) -> dict[str, str]:
    """Options that are not the trainer's defaults, as text, without those that the header has anyway."""
    if not options:
        return {}
    defaults = {
        field.name: field.default
        for field in dataclasses.fields(TrainOptions)
        if field.default is not dataclasses.MISSING
    }
    return {
        name: _short(_option(value))
        for name, value in options.items()
        if name not in NOT_LISTED and (name not in defaults or _option(defaults[name]) != _option(value))
    }


def _option(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ",".join(map(_option, value))
    if isinstance(value, bool) or value is None:
        return {True: "on", False: "off", None: "none"}[value]
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def differences(runs: Sequence[Run]) -> list[str]:
    """For each run what sets it apart from the others: options and sizes that are not the same in all."""
    tables = []
    for run in runs:
        config = json.loads(run.config.to_json()) if run.config else {}
        sizes = {k: v for part in config.values() if isinstance(part, dict) for k, v in part.items()}
        tables.append({k: _option(v) for k, v in {**sizes, **run.options}.items() if k not in NOT_COMPARED})
    known = [table for table, run in zip(tables, runs, strict=True) if run.options] or tables
    names = [k for k in dict.fromkeys(k for t in known for k in t) if len({t.get(k) for t in known}) > 1]
    return [", ".join(f"{k} {_short(t[k])}" for k in names if k in t) for t in tables]


def _short(value: str) -> str:
    """A path by its last part."""
    return Path(value).name if os.sep in value else value


def figures(run: Run) -> list[tuple[str, str, str, str]]:
    """(metric, newest training value, newest validation value, best validation value and its step), as text."""
    told = summary(run)
    rows = []
    for name in run.metrics():
        if name in ("step", "seconds", "lr") or name.startswith(("val_", "codes_used_")):
            continue
        steps, values = run.series(name)
        train = smooth(values, smoothing(len(steps)))[-1] if f"val_{name}" in told["best"] else values[-1]
        best = told["best"].get(f"val_{name}")
        last = (told["last"] or {}).get(f"val_{name}")
        rows.append(
            (
                NAMES.get(name, name.replace("_", " ")),
                _value(name, train),
                _value(name, last),
                f"{_value(name, best['value'])} @ {best['step']:,}" if best else "",
            )
        )
    return rows


def _value(metric: str, value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return "" if value is None else "–"
    if metric.startswith(("accuracy", "codes_used")):
        return f"{100 * value:.1f} %"
    return f"{value:.2f} dB" if metric == "psnr" else f"{value:.3f}" if abs(value) >= 0.1 else f"{value:.3g}"


def count(number: int) -> str:
    """A number of parameters for people: 987, 12.3 k, 4.56 M, 2.01 G."""
    for size, unit in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)


def duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "time not recorded"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def newest_sheet(run: Run) -> tuple[Image.Image, int] | None:
    """(sample sheet, its step), the newest that can be read; None if there is none."""
    for path in sorted(run.folder.glob("samples-*.png"), reverse=True):
        step = path.stem.removeprefix("samples-")
        try:
            with Image.open(path) as opened:
                image = opened.convert("RGB")
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            continue  # torn by a kill: an older one does
        return image, int(step) if step.isdigit() else run.step
    return None


def wrap_sheet(image: Image.Image, picture: int, aspect: float) -> Image.Image:
    """A sheet of one row of columns, cut into as many bands as show the pictures largest in a box of this aspect.

    picture: width of a column in pixels. aspect: the box's width ÷ height.
    """
    columns, gap = max(1, image.width // picture), max(2, picture // 8)

    def scale(bands: int) -> float:
        width, height = -(-columns // bands) * picture, bands * (image.height + gap) - gap
        return min(aspect / width, 1 / height)

    bands = max(range(1, columns + 1), key=scale)
    per_band = -(-columns // bands)
    bands = -(-columns // per_band)
    page = Image.new("RGB", (per_band * picture, bands * (image.height + gap) - gap), "white")
    for band in range(bands):
        left = band * per_band * picture
        part = image.crop((left, 0, min(left + page.width, columns * picture), image.height))
        page.paste(part, (0, band * (image.height + gap)))
    return page


@dataclass(frozen=True)
class Box:
    """A part of the page, inches from its upper left corner."""

    left: float
    top: float
    width: float
    height: float


def make_page(runs: Sequence[Run]) -> Figure:
    """The whole page, A4 landscape: header, samples, curves."""
    page = Figure(figsize=A4)
    _text(page, MARGIN, MARGIN - 0.08, _title(runs), fontsize=13, fontweight="bold")
    header = _one_header if len(runs) == 1 else _comparison_header
    draw_curves(page, runs, top=header(page, runs))
    return page


def _title(runs: Sequence[Run]) -> str:
    return f"{STAGES[runs[0].stage]}  ·  " + (runs[0].name if len(runs) == 1 else f"{len(runs)} runs compared")


def _text(page: Figure, x: float, y: float, text: str, **style: Any) -> None:
    """Text whose upper edge is y inches below the page's."""
    width, height = page.get_size_inches()
    page.text(x / width, 1 - y / height, text, **{"va": "top", "fontsize": TEXT, **style})


def _one_header(page: Figure, runs: Sequence[Run]) -> float:
    """Facts, figures and samples side by side; returns where they end, in inches from above."""
    (run,) = runs
    top = y = MARGIN + TITLE_HEIGHT - 0.1
    for name, text in facts(run):
        _text(page, MARGIN, y, name, color=GREY)
        for line in textwrap.wrap(text, int(3.3 / LETTER)):
            _text(page, MARGIN + 0.85, y, line)
            y += LINE
    end = _figures_table(page, run, 4.8, top)
    bottom = max(y, end, top + 1.9)
    sheet = newest_sheet(run)
    if sheet is not None:
        _draw_sheet(page, run, sheet, Box(8.3, top, A4[0] - MARGIN - 8.3, bottom - top), GREY)
    return bottom


def _figures_table(page: Figure, run: Run, left: float, y: float) -> float:
    """Newest and best value of each metric; returns where the table ends."""
    ends = (left + 1.6, left + 2.2, left + 3.2)  # of the columns of numbers
    rows = figures(run)
    validated = any(row[2] for row in rows)
    for x, text in zip(ends, ("training", "validation", "best @ step")[: 3 if validated else 1], strict=False):
        _text(page, x, y, text, color=GREY, ha="right")
    for name, *values in rows:
        y += LINE
        _text(page, left, y, name, color=GREY)
        for x, text in zip(ends, values, strict=True):
            _text(page, x, y, text, ha="right")
    return y + LINE


def _comparison_header(page: Figure, runs: Sequence[Run]) -> float:
    """A table of the runs, and what sets each apart, beside the newest samples of the first ones."""
    head, *rows = _comparison_rows(runs)
    columns = (MARGIN + 2.05, *(MARGIN + 2.05 + 0.78 * i for i in range(1, len(head))))
    top = y = MARGIN + TITLE_HEIGHT - 0.1
    for x, text in zip(columns, head, strict=True):
        above, _, below = text.rpartition("\n")
        _text(page, x, y, above, color=GREY, ha="right")
        _text(page, x, y + LINE, below, color=GREY, ha="right")
    y += 2 * LINE
    for i, (label, row, apart) in enumerate(zip(run_labels(runs), rows, differences(runs), strict=True)):
        _text(page, MARGIN, y, "■", color=COLOURS[i])
        _text(page, MARGIN + 0.15, y, textwrap.shorten(label, int(1.3 / LETTER), placeholder="…"), fontweight="bold")
        for x, text in zip(columns, row, strict=True):
            _text(page, x, y, text, ha="right")
        y += LINE
        for line in textwrap.wrap(apart, int(6.9 / LETTER * TEXT / 6.5))[:2]:
            _text(page, MARGIN + 0.15, y, line, color=GREY, fontsize=6.5)
            y += LINE * 0.9
        y += 0.05
    bottom = max(y, top + 1.6)
    sheets = [(i, run, sheet) for i, run in enumerate(runs) if (sheet := newest_sheet(run)) is not None][:SHEETS]
    across = 2 if len(sheets) > 2 else 1
    width, height = (A4[0] - MARGIN - 8.2) / across, (bottom - top) / -(-len(sheets) // across or 1)
    for place, (i, run, sheet) in enumerate(sheets):
        box = Box(8.2 + place % across * width, top + place // across * height, width - 0.06, height - 0.06)
        _draw_sheet(page, run, sheet, box, COLOURS[i], most_columns=8)
    return bottom


def _comparison_rows(runs: Sequence[Run]) -> list[tuple[str, ...]]:
    """Head and one row a run, as text."""
    measures = ("psnr", "loss", "codes_used") if runs[0].stage == "vqvae" else ("loss", "accuracy", "accuracy_last")
    shown = [m for m in measures if any(f"val_{m}" in run.metrics() for run in runs)]
    labels = {"accuracy_last": "best acc.,\nlast scale", "codes_used": "most codes\nin use"}
    best_of = [labels.get(m, f"best\n{NAMES.get(m, m)}") for m in shown]
    head = ("trained", "steps", "time", "pictures/s", *best_of)
    rows = [head]
    for run in runs:
        told, rate = summary(run), run.images_per_second()
        trained = run.parameters.get("trainable")
        best = [told["best"].get(f"val_{m}") for m in shown]
        rows.append(
            (
                count(trained) if trained else "–",
                f"{run.step:,}",
                duration(run.seconds),
                f"{rate:.3g}" if rate else "–",
                *(_value(m, b["value"]) if b else "–" for m, b in zip(shown, best, strict=True)),
            )
        )
    return rows


def _draw_sheet(
    page: Figure, run: Run, sheet: tuple[Image.Image, int], box: Box, colour: str, most_columns: int | None = None
) -> None:
    """The newest samples, as large as the box allows, under a line that says what they are."""
    image, step = sheet
    rows = _sheet_rows(run, image)
    picture = run.config.vqvae.image_size if run.config else image.height
    if most_columns is not None:
        image = image.crop((0, 0, min(image.width, most_columns * picture), image.height))
    caption = ("Samples at step" if box.width > 2 else "Step") + f" {step:,}" + (f": {rows}" if rows else "")
    _text(page, box.left, box.top, caption, color=colour)
    room = Box(box.left, box.top + LINE, box.width, box.height - LINE)
    wrapped = wrap_sheet(image, picture, room.width / room.height)
    scale = min(room.width / wrapped.width, room.height / wrapped.height)
    width, height = wrapped.width * scale, wrapped.height * scale
    page_width, page_height = page.get_size_inches()
    axes = page.add_axes(
        (
            room.left / page_width,
            1 - (room.top + height) / page_height,
            width / page_width,
            height / page_height,
        )
    )
    axes.set_axis_off()
    axes.imshow(np.asarray(wrapped), aspect="auto", interpolation="lanczos")


def _sheet_rows(run: Run, image: Image.Image) -> str:
    """What the rows of a sheet are, where their number is the one that the stage's own sheets have."""
    rows = {
        "vqvae": ("picture", "reconstruction"),
        "var": ("drawn", "picture"),
        "car": ("control", "drawn", "picture"),
    }
    known = rows[run.stage]
    if run.config is None or image.height != len(known) * run.config.vqvae.image_size:
        return ""
    return " / ".join(known)


def make_html(stages: Sequence[Sequence[Run]]) -> str:
    """The same pages for a browser: tables as tables, curves as SVG, samples as they are; one file, no script."""
    title = html.escape(" · ".join(run.name for runs in stages for run in runs))
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{CSS}</style></head>\n<body>{''.join(map(_html_section, stages))}</body></html>\n"
    )


def _html_section(runs: Sequence[Run]) -> str:
    figure = Figure(figsize=(A4[0], 5.4))
    draw_curves(figure, runs, top=0)
    drawing = io.StringIO()
    # A salt for each stage: the drawings' names within one document must not be the same.
    with mpl.rc_context({"svg.hashsalt": runs[0].stage}):
        figure.savefig(drawing, format="svg", dpi=DPI, metadata={"Date": None})
    svg = drawing.getvalue()
    svg = svg[svg.index("<svg") :]
    tables = _html_facts(runs[0]) if len(runs) == 1 else _html_comparison(runs)
    sheets = "".join(_html_sheet(run, label) for run, label in zip(runs, run_labels(runs), strict=True))
    return f"<section>\n<h1>{html.escape(_title(runs))}</h1>\n{tables}\n{sheets}\n{svg}</section>\n"


CSS = """
@page { size: A4 landscape; margin: 10mm }
body { font: 13px/1.45 "DejaVu Sans", Verdana, sans-serif; max-width: 1120px; margin: 1.5em auto; padding: 0 1em }
section { break-after: page; margin-bottom: 3em }
h1 { font-size: 20px; margin: 0 0 .6em }
.side { display: flex; gap: 3em; align-items: flex-start; flex-wrap: wrap }
table { border-collapse: collapse; margin-bottom: 1em }
th { font-weight: normal; color: #6b6b6b; text-align: left; vertical-align: top }
th, td { padding: .1em .9em .1em 0; max-width: 34em }
td.n, th.n { text-align: right }
figure { margin: 0 0 1em } figcaption { color: #6b6b6b }
figure img { max-width: 100%; image-rendering: auto }
svg { width: 100%; height: auto }
"""


def _html_facts(run: Run) -> str:
    rows = "".join(f"<tr><th>{html.escape(k)}</th><td>{html.escape(v)}</td></tr>" for k, v in facts(run))
    head = "".join(f'<th class="n">{text}</th>' for text in ("training", "validation", "best @ step"))
    return (
        f'<div class="side"><table>{rows}</table><table><tr><th></th>{head}</tr>'
        + "".join(_html_row(row[0], row[1:]) for row in figures(run))
        + "</table></div>"
    )


def _html_comparison(runs: Sequence[Run]) -> str:
    head, *rows = _comparison_rows(runs)
    cells = "".join(f'<th class="n">{html.escape(text)}</th>' for text in head).replace("\n", "<br>")
    aparts = differences(runs)
    lines = [f"<tr><th></th>{cells}<th>{'differs in' if any(aparts) else ''}</th></tr>"]
    for i, (label, row, apart) in enumerate(zip(run_labels(runs), rows, aparts, strict=True)):
        swatch = f'<span style="color:{COLOURS[i]}">■</span> '
        lines.append(_html_row(label, row, swatch, f"<td>{html.escape(apart)}</td>"))
    return f"<table>{''.join(lines)}</table>"


def _html_row(name: str, values: Sequence[str], before: str = "", after: str = "") -> str:
    cells = "".join(f'<td class="n">{html.escape(v)}</td>' for v in values)
    return f"<tr><th>{before}{html.escape(name)}</th>{cells}{after}</tr>"


def _html_sheet(run: Run, label: str) -> str:
    sheet = newest_sheet(run)
    if sheet is None:
        return ""
    image, step = sheet
    file = io.BytesIO()
    image.save(file, "PNG")
    rows = _sheet_rows(run, image)
    caption = f"{label}: samples at step {step:,}" + (f": {rows}" if rows else "")
    data = base64.b64encode(file.getvalue()).decode("ascii")
    return (
        f'<figure><figcaption>{html.escape(caption)}</figcaption><img alt="samples" '
        f'src="data:image/png;base64,{data}"></figure>'
    )
