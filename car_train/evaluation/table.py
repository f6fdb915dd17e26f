"""An evaluation's report for people, as lines of text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Report = dict[str, Any]


def table(report: Report) -> str:
    """The report for people, as lines of text."""
    data, model = report["data"], report.get("plan") or report["checkpoint"]
    steered = model["control"]
    real = f"{data['pictures']} images of {data['name']}, split {data['split']}" if data["name"] else "no real images"
    if data.get("reference"):
        real = f"the reference {data['reference']}"
    name = f"{model['name']}{f' ({steered})' if steered else ''}"
    if "samples" in report:
        drawn = report["samples"]
        lines = [f"{name}: {drawn['images']} images in {drawn['file']} ({drawn['drawn']} drawn) and {real}"]
    else:
        lines = [f"{name} on {real}, {len(report['classes'])} classes", ""]
        lines += _reconstruction_lines(report["reconstruction"])
    if "teacher_forced" in report:
        rows = {_title(k, steered): v for k, v in report["teacher_forced"].items()}
        names: tuple[str, ...] = ("loss", "accuracy", "loss_last", "accuracy_last")
        lines += _block("teacher forced (nats, share; last scale)", names, rows)
    for part, names in (
        ("distribution", ("kid", "kid_std", "fid", "precision", "recall", "inception_score")),
        ("inception", ("fid", "sfid", "inception_score", "inception_score_std", "precision", "recall")),
    ):
        if part in report:
            about = report[part]
            rows = {_title(k, steered): v for k, v in about.items() if isinstance(v, dict) and k != "floor"}
            lines += _block(f"against the real images, {about['network']} ({about['input']})", names, rows)
    if "floor" in report.get("distribution", {}):
        about = report["distribution"]
        rows = {_title(k, steered): v for k, v in about.items() if isinstance(v, dict)}
        names = ("kid_half", "kid_half_std", "fid_half", "fid_half_std", "precision_half", "recall_half")
        lines += _block(f"one half against the other, {about['halvings']} random halvings", names, rows)
    if "text" in report:
        names = ("read_letters", "read_words", "drawn_letters", "drawn_words")
        rows = {f"{size} pixels": row for size, row in report["text"].items()}
        lines += _block("text read after the tokenizer, and as it was drawn; by height of a letter", names, rows)
    if "control" in report:
        control = report["control"]
        rows = {_title(k, steered): v for k, v in control.items() if isinstance(v, dict)}
        lines += _block(f"following the control ({control['made_by']})", tuple(control["generated"]), rows)
    lines += ["", *(f"note: {note}" for note in report["notes"])] if report["notes"] else []
    seconds = ", ".join(f"{name} {value:.0f}" for name, value in report["seconds"].items())
    return "\n".join([*lines, "", f"seconds: {seconds}"])


def _title(source: str, steered: str | None) -> str:
    titles = {
        "model": f"with {steered}" if steered else "transformer",
        "generated": f"drawn with {steered}" if steered else "drawn",
        "base": "without control",
        "reconstruction": "reconstruction",
        "truth": "real image",
        "shuffled": "another's control",
        "floor": "real images",
        "generated_over_base": "with / without",
    }
    return titles[source]


def _reconstruction_lines(part: Report) -> list[str]:
    one = f"PSNR {_number(part['psnr'])} dB (of the pooled error {_number(part['psnr_pooled'])}), "
    one += f"SSIM {_number(part['ssim'])}, L1 {_number(part['l1'])}"
    one += f", perceptual {_number(part['perceptual'])}" if "perceptual" in part else ""
    codes = f"{part['codes_used']:.1%} of the codes used, perplexity {part['perplexity']:.0f}; per scale "
    per_scale = zip(part["codes_used_per_scale"], part["perplexity_per_scale"], strict=True)
    codes += ", ".join(f"{used:.1%} {size:.0f}" for used, size in per_scale)
    return [f"reconstruction  {one}", f"                {codes}"]


def _block(title: str, names: Sequence[str], rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A heading, the names of the columns and one line of numbers for each row."""
    heads = [name.removesuffix("_half").replace("_half_std", "_std").replace("_", " ") for name in names]
    widths = [max(9, len(head)) for head in heads]
    out = ["", title, " " * 24 + "  ".join(h.rjust(w) for h, w in zip(heads, widths, strict=True))]
    for label, numbers in rows.items():
        cells = (_number(numbers.get(name)).rjust(w) for name, w in zip(names, widths, strict=True))
        out.append(f"  {label:<22}" + "  ".join(cells))
    return out


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"
