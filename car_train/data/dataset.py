"""Images, labels and controls from a folder: class = sub-folder.

    photos/                     controls/          with control_root: the same relative paths, any image extension
      cat/a.jpg, cat/b.png        cat/a.png, cat/b.png
      dog/…                       dog/…

What an image becomes, here and in `car_runtime.controls` alike: RGBA, turned as its EXIF says, stretched to the
model's size with LANCZOS (Pillow, premultiplied), composited on white. Controls made on the fly come from that very
square. Stretching is what the runtime does to control images, so what is trained is what will be asked.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch.utils.data import Dataset
from tqdm import tqdm

from car_train.data.controls import CONTROL_TYPES, NEEDS_ALPHA, make_control, on_white
from car_train.data.folder import SPLITS, DataError, ImageFolder, is_image, scan, shown, some
from car_train.files import write_text

# Augmentation. An image with alpha may shrink and move on transparent ground, as far as it stays whole (many emoji
# fill their square); an opaque one is only zoomed into, so that no border comes into sight.
ALPHA_SCALE = (0.8, 1.05)  # size of the drawing
OPAQUE_SCALE = (1.0, 1.2)

Pixels = NDArray[np.uint8]


class ControlledImages(Dataset[dict[str, Any]]):
    """Images with labels, and with control images if asked for.

    root:         a folder of class folders, or what `folder.scan` found in it; labels follow the sorted folder names
                  (`class_names`).
    image_size:   side of the images given out, in pixels.
    split:        "train" (about 95 %), "val" (about 5 %) or "all": by a hash of the file name without extension, so
                  the split is the same on every machine, does not move when images are added, and puts equally
                  named images of different classes (one emoji in three styles) on the same side; by the folders
                  train and val where these are what `root` holds.
    control_type: one of `CONTROL_TYPES`, made on the fly after augmentation. With `control_root`: what the files
                  there show, so that a mirrored normal map has its x turned round.
    control_root: a folder with a control image for every image, but for those that its `skipped.txt` lists.
    augment:      mirror, shift and scale at random, from (seed, epoch, index) alone: a resumed run sees the same
                  images.
    preload:      decode everything once and keep it in memory (uint8 RGBA; twice the model's side at most).
    classes:      images of some classes only (`select_classes`); labels and `class_names` stay those of all.

    Items are dicts: `image` float32 [3, S, S] in [−1, 1]; `label` int; `control` uint8 tensor [S, S, 3], if there
    are controls.

    Images that cannot be read are left out and listed in a warning: at construction with `preload`, otherwise
    when met (the next image takes their place, with its own label and control). So are, for controls that need one,
    images without alpha.
    Raises DataError: no classes, an empty class folder, an empty split, unknown types, a control image missing.
    """

    def __init__(
        self,
        root: str | Path | ImageFolder,
        image_size: int,
        *,
        split: str = "train",
        control_type: str | None = None,
        control_root: str | Path | None = None,
        augment: bool = False,
        seed: int = 0,
        preload: bool = True,
        classes: str | None = None,
    ) -> None:
        if split not in SPLITS:
            raise DataError(f"no split {split!r}; choose one of: {', '.join(SPLITS)}")
        if control_type is not None and control_type not in CONTROL_TYPES:
            raise DataError(f"no control type {control_type!r}; choose one of: {', '.join(CONTROL_TYPES)}")
        folder = root if isinstance(root, ImageFolder) else scan(root)
        self.root, self.class_names = folder.root, list(folder.class_names)
        self.image_size = image_size
        self.control_type = control_type
        self.augment = augment
        self.seed = seed
        self.epoch = 0
        chosen = set(select_classes(classes, self.class_names))
        self.files = [(path, label) for path, label in folder.split(split) if label in chosen]
        if not self.files:
            raise DataError(
                f"{self.root}: none of {len(folder.files)} images is in split {split!r}; add some (about 1 in 20 is "
                "for validation), or give validation images of their own: folders train and val in --data, or --val "
                "(eval: --split all)"
            )
        self.control_files: list[Path] | None = None
        if control_root is not None:
            controls = Path(control_root).expanduser()
            without = read_skipped(controls / SKIPPED)
            self.files = [f for f in self.files if f[0].relative_to(self.root).as_posix() not in without]
            self.control_files = find_controls(self.root, controls, [path for path, _ in self.files])
        self._images: list[Pixels] | None = None
        self._controls: list[Pixels] | None = None
        if preload:
            self._preload()

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose augmentation `__getitem__` applies, before a loader is made: workers copy it."""
        self.epoch = epoch

    def fingerprint(self) -> str:
        """Hex digest of the list of images (path, label, bytes, time of change), 16 digits."""
        digest = hashlib.sha256()
        for path, label in self.files:
            status = path.stat()
            facts = f"{path.relative_to(self.root)}\0{label}\0{status.st_size}\0{status.st_mtime_ns}\n"
            digest.update(facts.encode("utf-8", "surrogateescape"))
        return digest.hexdigest()[:16]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.item(index)[1]

    def item(self, index: int) -> tuple[int, dict[str, Any]]:
        """(i, the item of image i): i is `index`, or the next that can be used. All of an item is of one image i."""
        for k in range(len(self)):
            at = (index + k) % len(self)
            try:
                image, control = self._load(at)
            except (*UNREADABLE, DataError) as error:
                warnings.warn(f"left out: {shown(self.files[at][0])}: {error}", stacklevel=3)
                continue
            rng = np.random.default_rng([self.seed, self.epoch, at])
            return at, self._item(image, control, self.files[at][1], rng)
        raise DataError(f"{self.root}: no image can be read; check the files")

    def _item(self, image: Pixels, control: Pixels | None, label: int, rng: np.random.Generator) -> dict[str, Any]:
        size = self.image_size
        if self.augment:
            box, mirror = random_box(rng, has_alpha(image))
        else:
            box, mirror = (0.0, 0.0, 1.0, 1.0), False
        rgba = crop(image, box, mirror, size)
        item: dict[str, Any] = {"image": to_float(on_white(rgba)), "label": label}
        if control is not None:
            made = crop(control, box, mirror, size)
            if mirror and self.control_type == "normal":
                made[..., 0] = 255 - made[..., 0]
            item["control"] = torch.from_numpy(made)
        elif self.control_type is not None:
            item["control"] = torch.from_numpy(make_control(rgba, self.control_type))
        return item

    def _load(self, index: int) -> tuple[Pixels, Pixels | None]:
        """(RGBA, control file's RGB if any), squares; from memory where they are preloaded."""
        if self._images is not None:
            return self._images[index], None if self._controls is None else self._controls[index]
        image = self._read(self.files[index][0], "RGBA")
        if self.control_files is not None:
            return image, self._read(self.control_files[index], "RGB")
        if self.control_type in NEEDS_ALPHA and not has_alpha(image):
            raise DataError(f"no alpha channel, which {self.control_type!r} is made from; give --control-root")
        return image, None

    def _read(self, path: Path, mode: str) -> Pixels:
        with Image.open(path) as opened:
            image = to_8_bits(ImageOps.exif_transpose(opened)).convert(mode)
        # Augmented images keep up to twice the side, so that zooming in does not blur them; the others take the
        # model's size in one step, as the runtime does it.
        side = self.image_size
        if self.augment:
            side = min(max(image.size), 2 * self.image_size)
        return np.asarray(image.resize((side, side), Image.Resampling.LANCZOS))

    def _preload(self) -> None:
        images: list[Pixels] = []
        controls: list[Pixels] = []
        kept: list[int] = []
        failed: list[str] = []
        for i, (path, _) in enumerate(tqdm(self.files, desc=f"reading {self.root.name}", unit="img", leave=False)):
            try:
                image, control = self._load(i)
            except (*UNREADABLE, DataError) as error:
                failed.append(f"{shown(path)}: {error}")
                continue
            kept.append(i)
            images.append(image)
            if control is not None:
                controls.append(control)
        if failed:
            warnings.warn(f"{len(failed)} of {len(self)} images left out:\n" + some(failed), stacklevel=3)
        if not kept:
            raise DataError(f"{self.root}: no image can be used: {failed[0]}; check the files")
        self.files = [self.files[i] for i in kept]
        if self.control_files is not None:
            self.control_files = [self.control_files[i] for i in kept]
        self._images, self._controls = images, controls or None


# What Pillow raises on damaged files.
UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)


def select_classes(chosen: str | None, names: Sequence[str]) -> list[int]:
    """Class numbers of a comma-separated list of names, patterns, numbers and ranges: "0-99", "cat,dog,17", "noto-*".

    None chooses all; a leading "!" turns the choice round ("!0-99": all but the first hundred).
    Raises DataError for a class that isn't there.
    """
    if chosen is None:
        return list(range(len(names)))
    numbers: set[int] = set()
    for part in chosen.removeprefix("!").split(","):
        first, dash, last = part.partition("-")
        matches = [i for i, name in enumerate(names) if fnmatch.fnmatchcase(name, part)]
        if part in names:
            numbers.add(names.index(part))
        elif matches:
            numbers.update(matches)
        elif part.isdigit():
            numbers.add(int(part))
        elif dash and first.isdigit() and last.isdigit() and int(first) <= int(last) < len(names):
            numbers.update(range(int(first), int(last) + 1))
        else:
            raise DataError(
                f"class {part!r} of {chosen!r} isn't there; give names, patterns, numbers up to {len(names) - 1} or "
                f"ranges, separated by commas; names: {some(names, ', ')}"
            )
    if max(numbers) >= len(names):
        raise DataError(f"class {max(numbers)} is out of range; give 0…{len(names) - 1}")
    if chosen.startswith("!"):
        numbers = set(range(len(names))) - numbers
        if not numbers:
            raise DataError(f"classes {chosen!r} leave none; leave some")
    return sorted(numbers)


SKIPPED = "skipped.txt"
"""Of a control folder: the images that `python -m car_train controls` could make no control of."""


def write_skipped(path: Path, skipped: Sequence[tuple[str, str]]) -> None:
    """List (image's relative path, reason), one a line with a tab between; a path that would break that as JSON."""
    lines = []
    for name, reason in skipped:
        plain = name.isprintable() and not name.startswith('"')
        lines.append(f"{name if plain else json.dumps(name)}\t{' '.join(reason.split())}\n")
    write_text(path, "".join(lines))


def read_skipped(path: Path) -> set[str]:
    """The relative paths that `write_skipped` listed; none where there is no list."""
    if not path.is_file():
        return set()
    names = [line.partition("\t")[0] for line in path.read_text(encoding="utf-8").split("\n")]
    return {str(json.loads(name)) if name.startswith('"') else name for name in names}


def find_controls(root: Path, control_root: Path, images: Sequence[Path]) -> list[Path]:
    """For each image under `root`, the file under `control_root` with the same path, up to the extension.

    Raises DataError, naming some, when any is missing.
    """
    if not control_root.is_dir():
        raise DataError(f"{control_root} is not a folder; give the folder of control images")
    have = {p.relative_to(control_root).with_suffix(""): p for p in sorted(control_root.rglob("*")) if is_image(p)}
    wanted = [p.relative_to(root).with_suffix("") for p in images]
    missing = [shown(w) for w in wanted if w not in have]
    if missing:
        raise DataError(
            f"{control_root} lacks {len(missing)} of {len(wanted)} control images: {some(missing, ', ')}; "
            "make them, or remove these images"
        )
    return [have[w] for w in wanted]


def to_8_bits(image: Image.Image) -> Image.Image:
    """16-bit and 32-bit grey (depth maps) from 0…65535, float grey from 0…1; Pillow alone would clip at 255."""
    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        return image
    top = 1.0 if image.mode == "F" else 65535.0
    return Image.fromarray(np.rint(np.clip(np.asarray(image, np.float64) / top, 0, 1) * 255).astype(np.uint8))


def load_control(path: str | Path) -> Image.Image:
    """A control image for the reference sampler, read as the runtime reads it.

    Turned as its EXIF says, deep grey scaled to 8 bits, transparent parts on black. Raises DataError.
    """
    try:
        with Image.open(path) as opened:
            image = to_8_bits(ImageOps.exif_transpose(opened)).convert("RGBA")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: not a readable image ({error}); give an image such as a PNG") from error
    black = Image.new("RGBA", image.size, (0, 0, 0, 255))
    return Image.alpha_composite(black, image).convert("RGB")


def has_alpha(rgba: Pixels) -> bool:
    """Whether any pixel of uint8 [H, W, 4] is not fully opaque."""
    return bool(rgba[..., 3].min() < 255)


def random_box(rng: np.random.Generator, alpha: bool) -> tuple[tuple[float, float, float, float], bool]:
    """((left, top, right, bottom), mirror): what to show, in shares of the side; with alpha, also beyond the image.

    Always four draws, so that (seed, epoch, index) means the same for every image.
    """
    u_scale, u_x, u_y, u_mirror = rng.random(4)
    low, high = ALPHA_SCALE if alpha else OPAQUE_SCALE
    side = 1 / (low + (high - low) * u_scale)
    reach = abs(1 - side) / 2
    left = (1 - side) / 2 + reach * (2 * u_x - 1)
    top = (1 - side) / 2 + reach * (2 * u_y - 1)
    return (left, top, left + side, top + side), bool(u_mirror < 0.5)


def crop(pixels: Pixels, box: tuple[float, float, float, float], mirror: bool, size: int) -> Pixels:
    """Cut a box out of a square and resize it with LANCZOS: uint8 [N, N, C] → [size, size, C].

    box: shares of the side; where it reaches beyond the image, RGBA is transparent and RGB repeats the border.
    """
    n = pixels.shape[0]
    beyond = max(0.0, -box[0], -box[1], box[2] - 1, box[3] - 1)
    pad = int(np.ceil(beyond * n - 1e-9))
    if pad:
        margins = ((pad, pad), (pad, pad), (0, 0))
        pixels = np.pad(pixels, margins) if pixels.shape[2] == 4 else np.pad(pixels, margins, mode="edge")
    left, top, right, bottom = (min(max(side * n + pad, 0), n + 2 * pad) for side in box)
    image = Image.fromarray(pixels).resize((size, size), Image.Resampling.LANCZOS, box=(left, top, right, bottom))
    out = np.array(image)
    return np.ascontiguousarray(out[:, ::-1]) if mirror else out


def to_float(rgb: Pixels) -> torch.Tensor:
    """uint8 [H, W, 3] in [0, 255] → float32 [3, H, W] in [−1, 1]."""
    return torch.from_numpy(rgb).permute(2, 0, 1).to(torch.float32).div_(127.5).sub_(1).contiguous()
