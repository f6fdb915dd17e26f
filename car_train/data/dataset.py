"""Images, labels and controls from a folder: class = sub-folder.

    photos/                     controls/          with control_root: the same relative paths, any image extension
      cat/a.jpg, cat/b.png        cat/a.png, cat/b.png
      dog/…                       dog/…

What an image becomes, here and in `car_runtime.controls` alike: turned as its EXIF says, brought to the model's
square (`images.fitted`: its middle, by default) with LANCZOS (Pillow, premultiplied), composited on white.
Controls made on the fly come from that very square; control files are read as the runtime reads them.

Augmentation of a photo is the published one: resized until its shorter side is 1.125 times the model's, then a random
square of the model's size, from wherever in the image, mirrored or not. An image with transparent parts is a drawing:
it stays whole, and moves and shrinks on its ground.
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
from PIL import Image
from torch.utils.data import Dataset
from tqdm import tqdm

from car_train.conventions import CONTROL_TYPES, FITS, PRESETS, ControlConvention
from car_train.data.controls import NEEDS_ALPHA, make_control, on_white
from car_train.data.folder import SPLITS, DataError, ImageFolder, is_image, scan, shown, some
from car_train.data.images import UNREADABLE, fitted, open_image, open_map
from car_train.data.strokes import LINES, drop_strokes
from car_train.files import write_text

DRAWING_SCALE = (0.8, 1.05)
"""Size of an augmented drawing: it stays whole, and many emoji fill their square."""
PHOTO_SCALE = 1.125
"""Shorter side of a photo, in sides of the model, before a square is cut out of it at random."""
SAME_ASPECT = 0.02
"""Image and control are of one aspect within this share: sizes are rounded."""

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
    convention:   how these are made and read; default: the published one of `control_type`.
    fit:          how an image of another aspect becomes a square: "crop", "pad" or "stretch".
    control_root: a folder with a control image for every image, but for those that its `skipped.txt` lists.
    augment:      mirror, shift and scale at random, from (seed, epoch, index) alone: a resumed run sees the same
                  images.
    flip:         whether augmentation mirrors, every other time.
    preload:      decode everything once and keep it in memory (uint8 RGBA; twice the model's side at most).
    drop_strokes: share of the images whose control loses some of its lines (`strokes.drop_strokes`), by the same
                  random numbers.
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
        flip: bool = True,
        seed: int = 0,
        preload: bool = True,
        classes: str | None = None,
        convention: ControlConvention | None = None,
        fit: str = FITS[0],
        drop_strokes: float = 0.0,
    ) -> None:
        if split not in SPLITS:
            raise DataError(f"no split {split!r}; choose one of: {', '.join(SPLITS)}")
        if control_type is not None and control_type not in CONTROL_TYPES:
            raise DataError(f"no control type {control_type!r}; choose one of: {', '.join(CONTROL_TYPES)}")
        if fit not in FITS:
            raise DataError(f"no fit {fit!r}; choose one of: {', '.join(FITS)}")
        folder = root if isinstance(root, ImageFolder) else scan(root)
        self.root, self.class_names = folder.root, list(folder.class_names)
        self.image_size = image_size
        self.fit = fit
        self.convention = convention or (None if control_type is None else PRESETS[control_type])
        self.control_type = control_type
        self.drop_strokes = drop_strokes
        if drop_strokes and (self.convention is None or self.convention.polarity not in LINES):
            raise DataError(
                f"drop_strokes is {drop_strokes:g}, but {control_type or 'an image without control'} has no lines to "
                "drop; leave it out, or take canny, hed or sketch"
            )
        self.augment, self.flip = augment, flip
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
            self.control_fit = fit_of(controls)
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
        box, window, mirror = (0.0, 0.0, 1.0, 1.0), None, False
        if self.augment and image.shape[2] == 4:
            box, mirror = random_box(rng)
        elif self.augment:
            window, mirror = random_window(rng, image.shape[:2], size)
        mirror = mirror and self.flip
        shown = crop(image, box, mirror, size) if window is None else cut(image, window, mirror, size)
        item: dict[str, Any] = {"image": to_float(on_white(shown)), "label": label}
        if control is not None:
            made = crop(control, box, mirror, size) if window is None else cut(control, window, mirror, size)
            if mirror and self.control_type == "normal":
                made[..., 0] = 255 - made[..., 0]
            item["control"] = torch.from_numpy(made)
        elif self.control_type is not None:
            assert self.convention is not None
            item["control"] = torch.from_numpy(make_control(shown, self.convention))
        if self.drop_strokes and rng.random() < self.drop_strokes:
            assert self.convention is not None
            lines = drop_strokes(item["control"].numpy(), self.convention.polarity, rng)
            item["control"] = torch.from_numpy(lines)
        return item

    def _load(self, index: int) -> tuple[Pixels, Pixels | None]:
        """(RGB, or RGBA where anything is transparent; the control file's RGB if any) of one size.

        Squares, but for photos to be augmented. From memory where they are preloaded.
        """
        if self._images is not None:
            return self._images[index], None if self._controls is None else self._controls[index]
        image = open_image(self.files[index][0])
        drawing = image.mode == "RGBA" and np.min(image.getchannel("A").getextrema()) < 255
        image = image if drawing else image.convert("RGB")
        if self.control_files is not None:
            ground = self.convention.ground if self.convention else (0, 0, 0)
            control = open_map(self.control_files[index], ground)
            image = as_its_control(image, control, self.fit, self.control_fit)
            return self._sized(image, drawing), self._sized(control, drawing, ground)
        if self.control_type in NEEDS_ALPHA and not drawing:
            raise DataError(f"no alpha channel, which {self.control_type!r} is made from; give --control-root")
        return self._sized(image, drawing), None

    def _sized(self, image: Image.Image, drawing: bool, margin: Sequence[int] = (255, 255, 255)) -> Pixels:
        """What `_item` starts from, uint8 [H, W, C]."""
        size, edge = self.image_size, min(image.size) if self.fit == "crop" else max(image.size)
        if not self.augment:  # in one step, as the runtime does it
            return np.asarray(fitted(image, size, self.fit, margin))
        if drawing:  # up to twice the side, so that zooming in does not blur it
            return np.asarray(fitted(image, min(edge, 2 * size), self.fit, margin))
        side = round(PHOTO_SCALE * size)
        if self.fit != "crop":
            return np.asarray(fitted(image, side, self.fit, margin))
        width, height = (max(side, round(length * side / edge)) for length in image.size)
        return np.asarray(image.resize((width, height), Image.Resampling.LANCZOS))

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
        elif part.isdecimal():
            numbers.add(int(part))
        elif dash and first.isdecimal() and last.isdecimal() and int(first) <= int(last) < len(names):
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


MARKER, SKIPPED = "controls.json", "skipped.txt"
"""Of a control folder: how `python -m car_train controls` made it, and the images that it has no control of."""


def write_skipped(path: Path, skipped: Sequence[tuple[str, str]]) -> None:
    """List (image's relative path, reason), one a line with a tab between; a path that would break that as JSON."""
    lines = []
    for name, reason in skipped:
        plain = name.isprintable() and not name.startswith('"')
        lines.append(f"{name if plain else json.dumps(name)}\t{shown(' '.join(reason.split()))}\n")
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
    files = (p for p in sorted(control_root.rglob("*")) if is_image(p) and (p.is_file() or not p.exists()))
    have = {p.relative_to(control_root).with_suffix(""): p for p in files}
    wanted = [p.relative_to(root).with_suffix("") for p in images]
    missing = [shown(w) for w in wanted if w not in have]
    if missing:
        raise DataError(
            f"{control_root} lacks {len(missing)} of {len(wanted)} control images: {some(missing, ', ')}; "
            "make them, or remove these images"
        )
    return [have[w] for w in wanted]


def has_alpha(rgba: Pixels) -> bool:
    """Whether any pixel of uint8 [H, W, 4] is not fully opaque."""
    return bool(rgba[..., 3].min() < 255)


def as_its_control(image: Image.Image, control: Image.Image, fit: str, made: str | None) -> Image.Image:
    """The part of an image that its control shows: all of it, or the square that `controls` made the control of.

    fit: how squares are made here. made: how `controls` made them; None where nobody says.
    DataError where the control has another aspect.
    """
    aspect, wanted = (one.width / one.height for one in (image, control))
    if fit == "stretch" or abs(aspect / wanted - 1) <= SAME_ASPECT:
        return image
    if fit == made and abs(wanted - 1) <= SAME_ASPECT:
        return fitted(image, min(image.size) if fit == "crop" else max(image.size), fit)
    raise DataError(
        f"its control has {control.width}×{control.height} pixels, the image {image.width}×{image.height}: another "
        f"aspect; make it of the whole image, or anew by `python -m car_train controls --fit {fit}`"
    )


def fit_of(control_root: Path) -> str | None:
    """How `python -m car_train controls` made squares of the images; None where something else made the folder."""
    try:
        fit = json.loads((control_root / MARKER).read_text(encoding="utf-8"))["fit"]
    except (OSError, ValueError, KeyError, TypeError):  # version 0.1.0 stretched, and didn't say so
        return None
    return str(fit)


def random_window(rng: np.random.Generator, shape: tuple[int, ...], size: int) -> tuple[tuple[int, int], bool]:
    """((left, top), mirror): a square of `size` pixels anywhere within an image [H, W]; four draws, too."""
    _, u_x, u_y, u_mirror = rng.random(4)
    height, width = shape
    return (int(u_x * (width - size + 1)), int(u_y * (height - size + 1))), bool(u_mirror < 0.5)


def cut(pixels: Pixels, window: tuple[int, int], mirror: bool, size: int) -> Pixels:
    """A `random_window` of uint8 [H, W, C] → [size, size, C]."""
    left, top = window
    out = pixels[top : top + size, left : left + size]
    return np.ascontiguousarray(out[:, ::-1] if mirror else out)


def random_box(rng: np.random.Generator) -> tuple[tuple[float, float, float, float], bool]:
    """((left, top, right, bottom), mirror): what to show of a drawing, in shares of the side, also beyond it.

    Always four draws, so that (seed, epoch, index) means the same for every image.
    """
    u_scale, u_x, u_y, u_mirror = rng.random(4)
    low, high = DRAWING_SCALE
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
