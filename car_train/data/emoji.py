"""The data set `emoji`: 27 classes, `<style>-<group>`, as in `noto-animals-nature`.

3 styles (Fluent 3D, Noto, Twemoji) × the 9 groups of Unicode, less `Component` (5 bare skin-tone swatches). RGBA;
Noto and Twemoji are 64×64 as published, Fluent is resized from 256×256 to 128×128 (LANCZOS). An image is
`<emoji name>.<code points>.png` and is called the same in every style, so that a split by name keeps all drawings of
an emoji on one side. Skin-tone variants are left out: they are recolourings of 323 of the 386 images of People &
Body, and would make that group 60 % of the set (2,261 of 3,781 images per style) while teaching little.
"""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from car_train.data.download import members
from car_train.data.image_package import DatasetError, ImagePackage, copy_licence

FLUENT_SIDE = 128

LAYOUT = 1
PACKAGES: Mapping[str, ImagePackage] = {
    "fluent": ImagePackage(
        name="@lobehub/fluent-emoji-3d",
        version="1.1.0",
        sha256="c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
        title="Fluent Emoji (3D)",
        copyright="Copyright (c) Microsoft Corporation; packaged by LobeHub",
        licence="MIT",
        licence_url="https://github.com/microsoft/fluentui-emoji/blob/main/LICENSE",
    ),
    "noto": ImagePackage(
        name="emoji-datasource-google",
        version="16.0.0",
        sha256="fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
        title="Noto Emoji v2.048",
        copyright="Copyright Google LLC; packaged by Cal Henderson (emoji-data)",
        licence="Apache-2.0",
        licence_url="https://www.apache.org/licenses/LICENSE-2.0.txt",
    ),
    "twemoji": ImagePackage(
        name="emoji-datasource-twitter",
        version="16.0.0",
        sha256="f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
        title="Twemoji v16.0.1",
        copyright="Copyright Twitter, Inc and other contributors; packaged by Cal Henderson (emoji-data)",
        licence="CC-BY-4.0",
        licence_url="https://creativecommons.org/licenses/by/4.0/legalcode.txt",
    ),
}
CHANGES = {
    "fluent": f"resized to {FLUENT_SIDE}×{FLUENT_SIDE}, converted to PNG, renamed",
    "noto": "renamed",
    "twemoji": "renamed",
}
"""What was done to the published images, by style; for the attribution."""


def lay_out(tarballs: Mapping[str, Path], root: Path, limit: int | None) -> Counter[str]:
    """Classes `<style>-<group>`. Names and groups of all styles come from the Noto package's `emoji_pretty.json`."""
    table = _emoji_table(tarballs["noto"])
    emoji = {point_key(entry["unified"]): entry for entry in table if entry["category"] != "Component"}
    counts: Counter[str] = Counter()
    for style, tarball in tarballs.items():
        seen: set[str] = set()
        # Images of one style come in the order of their names, so that `limit` keeps the same ones everywhere.
        images = sorted(_emoji_images(style, tarball), key=lambda item: item[0])
        for stem, data in tqdm(images, desc=style, unit="img"):
            code = point_key(stem)
            # Not in the table: a skin tone, or Component. Seen: a second spelling of the same code points.
            if code not in emoji or code in seen:
                continue
            label = f"{style}-{_slug(emoji[code]['category'])}"
            if limit is not None and counts[label] >= limit:
                continue
            folder = root / label
            folder.mkdir(exist_ok=True)
            image = Image.open(io.BytesIO(data)).convert("RGBA")
            if style == "fluent":
                image = image.resize((FLUENT_SIDE, FLUENT_SIDE), Image.Resampling.LANCZOS)
            image.save(folder / f"{_slug(emoji[code]['short_name'])}.{code}.png")
            seen.add(code)
            counts[label] += 1
        copy_licence(tarball, root / f"LICENSE-{style}.txt", PACKAGES[style])
    return counts


def _emoji_table(tarball: Path) -> list[dict[str, Any]]:
    for _, data in members(tarball, "package/emoji_pretty.json", ""):
        table: list[dict[str, Any]] = json.loads(data())
        return table
    raise DatasetError(f"{tarball} holds no package/emoji_pretty.json; fetch again")


def _emoji_images(style: str, tarball: Path) -> Iterator[tuple[str, bytes]]:
    """(file name without extension, encoded image) of each emoji in one style's package."""
    prefix, suffix = {
        "fluent": ("package/assets/", ".webp"),
        "noto": ("package/img/google/64/", ".png"),
        "twemoji": ("package/img/twitter/64/", ".png"),
    }[style]
    for path, data in members(tarball, prefix, suffix):
        yield Path(path).stem, data()


def point_key(unified: str) -> str:
    """Code points as one key for all packages: lower case, without U+FE0F, which some leave out.

    At least four digits each: Fluent holds `23-…` as well as `0023-…`.
    """
    return "-".join(point.zfill(4) for point in unified.lower().split("-") if point != "fe0f")


def _slug(text: str) -> str:
    """`Animals & Nature` → `animals-nature`, `+1` → `plus1`: letters, digits, - and _, safe on every file system."""
    words = "".join(c if c.isalnum() or c in "_-" else " " for c in text.lower().replace("+", "plus")).split()
    return "-".join(words)
