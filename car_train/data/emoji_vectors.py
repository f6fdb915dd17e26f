"""The data set `emoji` at any size: four styles of emoji drawn from vectors, classes `<style>-<group>`.

    python -m car_train data emoji --size 128        # ~/.cache/car/data/emoji-128

4 styles (Noto, Twemoji, Fluent shaded and Fluent flat) × the 9 groups of Unicode. Every image is drawn at the size
asked for by resvg, RGBA, so that its alpha channel is an exact mask. An image is `<emoji name>.png` and is called the
same in every style, so that a split by name keeps all drawings of an emoji on one side. (Some 30 emoji have another
name in Fluent than in Noto and Twemoji.)

Of 14,336 icons 6,816 are images here: 7,179 are skin-tone variants, and 341 are in no group: other names of icons
that are there. With `--skin-tones` the variants are there too, of the emoji that are trained on: the folders are then
train/ and val/, and val/ is what is held out without the option.
"""

from __future__ import annotations

import io
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from car_train.data.download import members
from car_train.data.folder import split_of
from car_train.data.image_package import DatasetError, ImagePackage, copy_licence

SIZES = (32, 512)
"""Pixels of a side, least and most."""

PACKAGES: Mapping[str, ImagePackage] = {
    "noto": ImagePackage(
        name="@iconify-json/noto",
        version="1.2.9",
        sha256="3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
        title="Noto Emoji",
        copyright="Copyright Google LLC; packaged by Iconify",
        licence="Apache-2.0",
        licence_url="https://www.apache.org/licenses/LICENSE-2.0.txt",
    ),
    "twemoji": ImagePackage(
        name="@iconify-json/twemoji",
        version="1.2.5",
        sha256="19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7",
        title="Twemoji",
        copyright="Copyright Twitter, Inc and other contributors; packaged by Iconify",
        licence="CC-BY-4.0",
        licence_url="https://creativecommons.org/licenses/by/4.0/legalcode.txt",
    ),
    "fluent": ImagePackage(
        name="@iconify-json/fluent-emoji",
        version="1.2.7",
        sha256="8044210dbf11e016d4de85f15d01a243423bd832457e7e2491df1b751c0e272b",
        title="Fluent Emoji (color)",
        copyright="Copyright (c) Microsoft Corporation; packaged by Iconify",
        licence="MIT",
        licence_url="https://github.com/microsoft/fluentui-emoji/blob/main/LICENSE",
    ),
    "flat": ImagePackage(
        name="@iconify-json/fluent-emoji-flat",
        version="1.2.6",
        sha256="7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
        title="Fluent Emoji (flat)",
        copyright="Copyright (c) Microsoft Corporation; packaged by Iconify",
        licence="MIT",
        licence_url="https://github.com/microsoft/fluentui-emoji/blob/main/LICENSE",
    ),
}
CHANGES = dict.fromkeys(PACKAGES, "rendered to PNG at one size, renamed")
"""What was done to the published images, by style; for the attribution."""
GROUPS_OF = {"fluent": "flat"}
"""Style → style whose package has its groups, where its own has none: both Fluent sets have the same names."""
_TONE = re.compile(r"-(tone[1-5](-[1-5])?|(medium-)?(light|dark)(-skin-tone)?|medium(-skin-tone)?)\b.*$")


def lay_out(
    tarballs: Mapping[str, Path], root: Path, limit: int | None, size: int, tones: bool = False
) -> Counter[str]:
    """Render every style at `size` pixels into class folders; returns the images per class.

    tones: with the skin-tone variants, and the classes in folders train/ and val/.

    Raises DatasetError without resvg-py, or for a package that has other contents.
    """
    counts: Counter[str] = Counter()
    for style, tarball in tarballs.items():
        icons, groups = _json(tarball, "icons.json"), _groups(tarballs[GROUPS_OF.get(style, style)])
        for name in tqdm(sorted(name for name in icons["icons"] if name in groups), desc=style, unit="img"):
            is_tone = _is_tone(name, icons["icons"])
            split = split_of(Path(f"{_base(name, icons['icons']) if is_tone else name}.png"))
            if is_tone and (not tones or split == "val"):
                continue
            label = f"{style}-{groups[name]}"
            if limit is not None and counts[label] >= limit:
                continue
            folder = root / split / label if tones else root / label
            folder.mkdir(parents=True, exist_ok=True)
            rendered(icons, name, size).save(folder / f"{name}.png")
            counts[label] += 1
        copy_licence(tarball, root / f"LICENSE-{style}.txt", PACKAGES[style])
    return counts


def rendered(icons: Mapping[str, Any], name: str, size: int) -> Image.Image:
    """One icon of an Iconify set, RGBA, `size` pixels on its longer side, centred on a transparent square."""
    try:
        import resvg_py
    except ImportError as error:
        raise DatasetError(
            "resvg-py draws the vectors and is not installed; pip install 'car-deploy[lab]'"
        ) from error
    icon = icons["icons"][name]
    left, top = icon.get("left", icons.get("left", 0)), icon.get("top", icons.get("top", 0))
    width, height = icon.get("width", icons.get("width", 16)), icon.get("height", icons.get("height", 16))
    side = max(width, height)
    # A square view of the icon, which is what centres it.
    box = f"{left - (side - width) / 2:g} {top - (side - height) / 2:g} {side:g} {side:g}"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box}" width="{side:g}" height="{side:g}">'
    png = resvg_py.svg_to_bytes(
        svg_string=f"{head}{icon['body']}</svg>", width=size, height=size, skip_system_fonts=True
    )
    return Image.open(io.BytesIO(bytes(png))).convert("RGBA")


def _is_tone(name: str, icons: Mapping[str, Any]) -> bool:
    """Whether this is a skin-tone variant of another icon of the set."""
    return "skin-tone" in name or (_TONE.search(name) is not None and _TONE.sub("", name) in icons)


def _base(name: str, icons: Mapping[str, Any]) -> str:
    """The emoji that a skin-tone variant is one of: its longest beginning that is an icon without a tone."""
    words = _TONE.sub("", name).split("-")
    for count in range(len(words), 0, -1):
        if (start := "-".join(words[:count])) in icons:
            return start
    return "-".join(words)


def _groups(tarball: Path) -> dict[str, str]:
    """Icon name → group, as a class is called: `animals-nature`."""
    categories = _json(tarball, "metadata.json").get("categories", {})
    return {name: _slug(group) for group, names in categories.items() if group != "Component" for name in names}


def _slug(group: str) -> str:
    return "-".join(re.findall(r"[a-z0-9]+", group.lower()))


def _json(tarball: Path, file: str) -> dict[str, Any]:
    for data in _readers(tarball, f"package/{file}"):
        found: dict[str, Any] = json.loads(data)
        return found
    raise DatasetError(f"{tarball} holds no package/{file}; fetch again")


def _readers(tarball: Path, path: str) -> Iterator[bytes]:
    for _, data in members(tarball, path, ""):
        yield data()
