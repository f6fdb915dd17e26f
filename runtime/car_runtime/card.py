"""A plan's card: `README.md` and `card.png`, as a hub shows them, made of the plan itself.

What it says comes from the manifest and from running the plan here: its goldens' verdict, and images for the goldens'
own control image. Only the licence has to be given.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from car_runtime import __version__
from car_runtime.config import GenerationConfig
from car_runtime.errors import RequestError, printable
from car_runtime.format.facts import plan_facts
from car_runtime.format.goldens import read_all_goldens
from car_runtime.format.manifest import Manifest, read_manifest
from car_runtime.hub import CARD_FILES
from car_runtime.images import contact_sheet, png_bytes
from car_runtime.plan import open_plan
from car_runtime.verify import verify

SEEDS = 4
"""Images for each control image on the card."""
NAMES = 24
"""Class names on the card."""
_LICENCE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,60}", re.ASCII)


def card(
    path: str | os.PathLike[str],
    *,
    licence: str | None = None,
    backend: str = "auto",
    threads: int | None = None,
) -> dict[str, bytes]:
    """The card's files, name → bytes. The plan is opened, compared with its goldens, and draws a few images.

    licence: of the weights, as the hub writes it, such as "mit" or "cc-by-4.0"; None: the card says that none is.

    Raises RequestError (licence), and as `car_runtime.verify.verify`.
    """
    if licence is not None and not _LICENCE.fullmatch(licence):
        raise RequestError(f"the licence is {licence[:60]!r}; give an identifier in lower case, such as mit or other")
    root = Path(path)
    manifest = read_manifest(root)
    report = verify(root, backend, threads=threads, warmup=0, runs=1)
    sheet = _sheet(root, manifest, backend, threads)
    text = "\n".join(_lines(root, manifest, report, licence)) + "\n"
    return dict(zip(CARD_FILES, (text.encode(), png_bytes(sheet)), strict=True))


def _sheet(root: Path, manifest: Manifest, backend: str, threads: int | None) -> NDArray[np.uint8]:
    """A row for each golden control image (of a plan without branches: one row without): it, and seeds 0, 1, …"""
    found = read_all_goldens(root, manifest)
    shown = [one for one in found if one.control is not None] or found
    rows = []
    with open_plan(root, backend, threads=threads) as plan:
        for one in shown:
            config = GenerationConfig(control=one.source, label=one.label, seed=0, n=SEEDS)
            first = [] if one.control is None else [one.control]
            rows.append(contact_sheet([*first, *plan.generate(config).images]))
    return np.concatenate(rows)


def _lines(root: Path, manifest: Manifest, report: Mapping[str, Any], licence: str | None) -> Iterator[str]:
    facts, model = plan_facts(root), manifest.model
    yield "---"
    if licence is not None:
        yield f"license: {licence}"
    yield from ("library_name: car-deploy", "pipeline_tag: image-to-image")
    yield from ("tags:", "- car", "- var", "- controllable-generation", "---", "")
    yield from (f"# {_text(manifest.name)}", "", f"![{_caption(manifest)}]({CARD_FILES[1]})", "")
    yield (
        f"A plan of car-deploy: {'CAR' if model.control_type else 'VAR'}, {model.image_size}×{model.image_size} "
        f"pixels in {len(manifest.scales)} scales, {model.classes} classes. It runs with numpy and one engine, "
        "without PyTorch."
    )
    yield from (
        "",
        "```sh",
        "pip install 'car-deploy[cpu,hub]'",
        f"car-run -e hf:ORG/NAME{_usage(manifest)}",
        "```",
        "",
    )
    yield from _table(facts)
    yield from _conventions(manifest)
    yield from _verdict(report)
    yield from ("", "## Licence", "", _licence(licence))
    if manifest.provenance:
        yield from ("", "## Provenance", "", "| what | value |", "|---|---|")
        yield from (f"| {_text(name)} | {_text(value)} |" for name, value in manifest.provenance.items())


def _caption(manifest: Manifest) -> str:
    kind = manifest.model.control_type
    return f"{'Control images on the left, and ' if kind else ''}images of seeds 0 to {SEEDS - 1}, not selected"


def _usage(manifest: Manifest) -> str:
    control = " --control control.png" if manifest.model.control_type else ""
    return f"{control} --class 0 -o out.png"


def _table(facts: Mapping[str, Any]) -> Iterator[str]:
    model, precision, sampling = facts["model"], facts["precision"], facts["sampling"]
    names = facts["class_names"] or []
    yield from ("| | |", "|---|---|")
    rows = {
        "size": f"{facts['bytes'] / 1e6:.1f} MB, plan format {facts['format']}",
        "base": f"depth {model['depth']}, width {model['width']}, {model['vocab']} codes, {facts['tokens']} tokens",
        "precision": f"computes in {precision['compute']}, weights in {precision['weights']}",
        "sampling": f"guidance {sampling['cfg']:g}, top-k {sampling['top_k']}, top-p {sampling['top_p']:g}",
        "classes": f"{facts['classes']}"
        + (f": {', '.join(map(_text, names[:NAMES]))}{', …' if len(names) > NAMES else ''}" if names else ""),
    }
    yield from (f"| {name} | {value} |" for name, value in rows.items())


def _conventions(manifest: Manifest) -> Iterator[str]:
    if manifest.model.control_type is None:
        return
    yield from ("", "## Control images", "", "| branch | annotator | looks at | polarity | ground | not square |")
    yield "|---|---|---|---|---|---|"
    for name, one in manifest.model.conventions.items():
        if one is None:
            yield f"| {_text(name)} | of no known convention | | | | |"
            continue
        polarity = f"{one.polarity}, {'/'.join(one.axes)}" if one.axes else one.polarity
        limits = f" {one.thresholds[0]}, {one.thresholds[1]}" if one.thresholds else ""
        ground = ", ".join(map(str, one.ground))
        yield (
            f"| {_text(name)} ({_text(one.control_type)}) | {_text(one.annotator)}{limits} | {one.colour} "
            f"| {polarity} | {ground} | {one.fit} |"
        )


def _verdict(report: Mapping[str, Any]) -> Iterator[str]:
    backend = f"{report['backend']['name']}, car-deploy {__version__}, {report['time'][:10]}"
    verdict = "agrees with" if report["passed"] else "DIFFERS from"
    yield from ("", "## Verified", "", f"The plan {verdict} what PyTorch computed at its export ({backend}):", "")
    yield from ("| check | value | bound | |", "|---|---|---|---|")
    for check in report["checks"]:
        value = "not finite" if check["value"] is None else f"{check['value']:.3g}"
        yield (
            f"| {check['name']} | {value} | {check['bound']} {check['limit']:.3g} | "
            f"{'pass' if check['passed'] else 'FAIL'} |"
        )


def _licence(licence: str | None) -> str:
    if licence is None:
        return "No licence of the weights is stated; ask who made them before you use or pass them on."
    return f"The weights are under `{licence}`. The code of car-deploy is under MIT."


def _text(value: str) -> str:
    """A text of the plan as Markdown shows it, as one line of plain letters."""
    return re.sub(r"([\\`*_\[\]<>|#&!$~])", r"\\\1", printable(value))[:300]
