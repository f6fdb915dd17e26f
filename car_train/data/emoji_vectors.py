"""The data set `emoji` at any size: four styles of emoji drawn from vectors, classes `<style>-<group>`.

    python -m car_train data emoji --size 128        # ~/.cache/car/data/emoji-128

4 styles (Noto, Twemoji, Fluent shaded and Fluent flat) × the 9 groups of Unicode. Every image is drawn at the size
asked for by resvg, RGBA, so that its alpha channel is an exact mask. The folders are train/ and val/, and val/ has
the emoji that the set of published sizes (`emoji.py`) validates on, in all styles: a model of one set may start from
a model of the other.

Of 14,336 icons 6,750 are images here: 7,179 are skin-tone variants, 341 are in no group (other names of icons that
are there), and of 66 no code point is known (33 emoji have a name in Fluent that neither Noto nor Twemoji has). With
`--skin-tones` the variants are in train/ too.
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
from car_train.data.emoji import point_key
from car_train.data.image_package import DatasetError, ImagePackage, copy_licence

SIZES = (32, 512)
"""Pixels of a side, least and most."""

LAYOUT = 2
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
CODED = ("noto", "twemoji")
"""Styles whose packages say which code points a name has; Fluent's names are theirs."""
HELD_OUT = frozenset(
    """
    0030-20e3 00a9 1f18e 1f1e6-1f1e9 1f1e6-1f1ec 1f1e6-1f1fa 1f1e7-1f1ea 1f1e7-1f1ec 1f1e7-1f1f8 1f1ec-1f1e9
    1f1ed-1f1f2 1f1f2-1f1f4 1f1f3-1f1e6 1f1f5-1f1f8 1f1ff-1f1f2 1f23a 1f30e 1f31b 1f32c 1f333 1f341 1f358 1f37b
    1f3a3 1f3b8 1f3ca-200d-2642 1f3d2 1f3e6 1f3e8 1f3ef 1f3f9 1f401 1f449 1f44c 1f460 1f466 1f468-200d-1f3ed
    1f46e-200d-2640 1f476 1f487-200d-2642 1f48c 1f491 1f497 1f4d2 1f500 1f506 1f50c 1f510 1f53a 1f54c 1f551
    1f575-200d-2640 1f57a 1f617 1f619 1f61b 1f62a 1f635 1f642-200d-2195 1f64d-200d-2640 1f681 1f6b8 1f6c5 1f6cf
    1f7e0 1f7e2 1f912 1f917 1f944 1f945 1f991 1f994 1f9b9 1f9c1 1f9cc 1f9cf 1f9d1-200d-1f393 1f9d6
    1f9d9-200d-2642 1fa76 1fa94 1faa3 1fae9 2199 2602 2626 2695 26bd 2764-200d-1fa79
    """.split()
)
"""Code points (`point_key`) of the emoji that the set `emoji` validates on."""
_TONE = re.compile(r"-(tone[1-5](-[1-5])?|(medium-)?(light|dark)(-skin-tone)?|medium(-skin-tone)?)\b.*$")


def lay_out(
    tarballs: Mapping[str, Path], root: Path, limit: int | None, size: int, tones: bool = False
) -> Counter[str]:
    """Render every style at `size` pixels into class folders; returns the images per class.

    tones: with the skin-tone variants.

    Raises DatasetError without resvg-py, or for a package that has other contents.
    """
    counts: Counter[str] = Counter()
    codes = {name: code for style in CODED for code, name in _json(tarballs[style], "chars.json").items()}
    for style, tarball in tarballs.items():
        icons, groups = _json(tarball, "icons.json"), _groups(tarballs[GROUPS_OF.get(style, style)])
        for name in tqdm(sorted(name for name in icons["icons"] if name in groups), desc=style, unit="img"):
            is_tone = _is_tone(name, icons["icons"])
            code = codes.get(_base(name, icons["icons"]) if is_tone else name)
            if code is None:
                continue
            split = "val" if point_key(code) in HELD_OUT else "train"
            if is_tone and (not tones or split == "val"):
                continue
            label = f"{style}-{groups[name]}"
            if limit is not None and counts[label] >= limit:
                continue
            folder = root / split / label
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
