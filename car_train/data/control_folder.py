"""The controls of a whole image folder, in a folder that mirrors it: whole files, skipped ones listed, continued."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from car_train.conventions import FITS
from car_train.data.annotator import Annotator, AnnotatorError, Pixels, UnusableImageError
from car_train.data.dataset import MARKER, SKIPPED, write_skipped
from car_train.data.folder import find_images
from car_train.data.images import UNREADABLE, fitted, open_image
from car_train.files import written_aside

FORMAT = 1

DEFAULT_SIZE = 256
"""Side of the controls: that of the published models, or the image's own where that is less: beyond it
there is nothing to see. Lines of one pixel are best made at the side that the model is trained at: give `--size`."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """What became of the images. skipped: (path under the data folder, reason)."""

    made: int
    present: int
    skipped: tuple[tuple[str, str], ...]


def annotate_folder(
    data: Path,
    output: Path,
    annotator: Annotator,
    *,
    size: int | None = None,
    fit: str = FITS[0],
    limit: int | None = None,
    batch: int = 1,
    overwrite: bool = False,
) -> Report:
    """Make the control of every image under `data`, in the same place under `output`, as PNG.

    data:   a folder of class folders, as `data.find_images` reads it.
    output: absent, empty, or made by this function with the same annotator and size: what is there already is kept.
    size:   side of the controls. None: `DEFAULT_SIZE`, or the image's own if that is smaller.
    fit:    how an image of another aspect becomes a square (`images.fitted`).
    limit:  at most so many images per class, the first ones by name; None for all.
    batch:  images that a net takes at once, if they are of one size.
    overwrite: make all anew; controls that were made with other settings are removed.

    Images that cannot be read, or of which the annotator makes nothing, are skipped and listed in
    `output/skipped.txt`. Raises AnnotatorError: numbers out of range, `output` in use for something else or made with
    other settings, two images that would share a control, nothing could be made, a full disk; DataError as
    `find_images`.
    """
    for name, value in (("size", size), ("limit", limit), ("batch", batch)):
        if value is not None and value < 1:
            raise AnnotatorError(f"{name} {value} is too small; give 1 or more")
    data, output = data.expanduser(), output.expanduser()
    images = _images(data, limit)
    _check_apart(data, output)
    try:
        settings = {"format": FORMAT, **annotator.origin, "size": size or f"up to {DEFAULT_SIZE}", "fit": fit}
        _claim(output, settings, overwrite)
        report = _make_all(data, output, images, annotator, size, fit, batch, overwrite)
        if report.skipped:
            write_skipped(output / SKIPPED, report.skipped)
        else:
            (output / SKIPPED).unlink(missing_ok=True)
    except OSError as error:
        raise AnnotatorError(_cannot_write(output, error)) from error
    if report.skipped and not report.made + report.present:
        raise AnnotatorError(
            f"{data}: none of {len(images)} images could be used ({': '.join(report.skipped[0])}); see "
            f"{output / SKIPPED}"
        )
    return report


def annotate_file(
    image: Path, output: Path, annotator: Annotator, *, size: int | None = None, fit: str = FITS[0]
) -> Path:
    """Make the control of one image as the PNG file `output`, and return that.

    Raises AnnotatorError: no .png, the image itself, nothing to be made of it, a folder that can't be written;
    ImageFileError.
    """
    if output.suffix.lower() != ".png" or output.resolve() == image.resolve():
        raise AnnotatorError(f"{output} can't be the map of {image}; give another file, *.png")
    control = annotator(read_image(image, size, fit))
    try:
        _write_png(output, control)
    except OSError as error:
        raise AnnotatorError(_cannot_write(output, error)) from error
    return output


def _images(data: Path, limit: int | None) -> list[Path]:
    """Paths under `data`. Raises AnnotatorError where two differ in their extension alone."""
    taken: dict[int, int] = {}
    images: list[Path] = []
    for path, label in find_images(data)[1]:
        taken[label] = taken.get(label, 0) + 1
        if limit is None or taken[label] <= limit:
            images.append(path.relative_to(data))
    seen: dict[Path, Path] = {}
    for image in images:
        other = seen.setdefault(image.with_suffix(""), image)
        if other != image:
            raise AnnotatorError(f"{data}: {other} and {image} would share one control; rename one of them")
    return images


def _check_apart(data: Path, output: Path) -> None:
    inside, around = output.resolve(), data.resolve()
    if inside == around or around in inside.parents or inside in around.parents:
        raise AnnotatorError(
            f"{output} and the images in {data} lie within each other; give a folder of its own for the controls"
        )


def _claim(output: Path, settings: dict[str, Any], overwrite: bool) -> None:
    """Make the folder and its marker, or see that it is ours and made with the same settings."""
    marker = output / MARKER
    if output.exists() and not output.is_dir():
        raise AnnotatorError(f"{output} is not a folder; choose another one")
    output.mkdir(parents=True, exist_ok=True)
    # What a killed run left; in a folder without a marker nothing else may be ours.
    for remains in output.rglob(".*.part") if marker.exists() else output.glob(f".{MARKER}*.part"):
        remains.unlink()
    if not marker.exists():
        if any(output.iterdir()):
            raise AnnotatorError(
                f"{output} holds other files (no {MARKER}); choose another folder, or empty this one"
            )
        _write(marker, json.dumps(settings, indent=2).encode() + b"\n")
        return
    try:
        found = json.loads(marker.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("not an object")
    except ValueError as error:
        raise AnnotatorError(
            f"{marker} cannot be read ({error}); remove {output}, then make the controls anew"
        ) from None
    # As JSON gives it back: tuples have become lists.
    settings = json.loads(json.dumps(settings))
    differ = sorted(key for key in found.keys() | settings.keys() if found.get(key) != settings.get(key))
    if not differ:
        return
    if not overwrite:
        was, now = ({key: s.get(key) for key in differ} for s in (found, settings))
        raise AnnotatorError(
            f"{output} was made with other settings: {json.dumps(was)}, now {json.dumps(now)}; "
            "add --overwrite to make all anew, or choose another folder"
        )
    # First the controls, then the marker: an interruption leaves no control under settings that didn't make it.
    for old in output.rglob("*.png"):
        old.unlink()
    _write(marker, json.dumps(settings, indent=2).encode() + b"\n")


def _make_all(
    data: Path,
    output: Path,
    images: Sequence[Path],
    annotator: Annotator,
    size: int | None,
    fit: str,
    batch: int,
    overwrite: bool,
) -> Report:
    made, present = 0, 0
    skipped: list[tuple[str, str]] = []
    with tqdm(total=len(images), desc=f"{annotator.control_type} of {data.name}", unit="img") as bar:
        for group in _groups(images, max(batch, annotator.at_once)):
            waiting = [p for p in group if overwrite or not _is_whole(output / p.with_suffix(".png"))]
            present += len(group) - len(waiting)
            loaded: dict[Path, Pixels] = {}
            for image in waiting:
                read = _try_to_read(data / image, size, fit)
                if isinstance(read, str):
                    skipped.append((image.as_posix(), read))
                else:
                    loaded[image] = read
            for image, control in _annotate(annotator, loaded):
                if isinstance(control, UnusableImageError):
                    skipped.append((image.as_posix(), str(control)))
                else:
                    _write_png(output / image.with_suffix(".png"), control)
                    made += 1
            bar.update(len(group))
    return Report(made=made, present=present, skipped=tuple(skipped))


def _annotate(annotator: Annotator, images: dict[Path, Pixels]) -> Iterator[tuple[Path, Pixels | UnusableImageError]]:
    """All at once; one by one where an image among them cannot be annotated, to find out which."""
    try:
        yield from zip(images, annotator.batch(list(images.values())), strict=True)
        return
    except UnusableImageError as error:
        if len(images) == 1:
            yield next(iter(images)), error
            return
    for path, image in images.items():
        yield from _annotate(annotator, {path: image})


def _groups(images: Sequence[Path], size: int) -> Iterator[Sequence[Path]]:
    for start in range(0, len(images), size):
        yield images[start : start + size]


def read_image(path: Path, size: int | None, fit: str = FITS[0]) -> Pixels:
    """RGBA square as `data.ControlledImages` shows it, uint8 [S, S, 4]; size as in `annotate_folder`."""
    image = open_image(path).convert("RGBA")
    side = size or min(DEFAULT_SIZE, min(image.size) if fit == "crop" else max(image.size))
    return np.asarray(fitted(image, side, fit))


def _try_to_read(path: Path, size: int | None, fit: str) -> Pixels | str:
    """The image, or why it cannot be read, in one line."""
    try:
        return read_image(path, size, fit)
    except UNREADABLE as error:
        return " ".join(str(error).split()) or type(error).__name__


def _is_whole(png: Path) -> bool:
    """Whether the control is there; the checksums inside reveal a damaged one."""
    try:
        with Image.open(png, formats=["PNG"]) as image:
            image.verify()
    except UNREADABLE:  # also where there is no such file
        return False
    return True


def _write_png(path: Path, control: Pixels) -> None:
    grey = bool((control == control[..., :1]).all())
    buffer = BytesIO()
    Image.fromarray(control[..., 0] if grey else control).save(buffer, "PNG")
    path.parent.mkdir(parents=True, exist_ok=True)
    _write(path, buffer.getvalue())


def _write(path: Path, content: bytes) -> None:
    with written_aside(path) as file:
        file.write_bytes(content)


def _cannot_write(output: Path, error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{output}: the disk is full; free some space, then run the same command: it continues"
    return f"{error.filename or output}: {error.strerror or error}; make it writable, or choose another folder"
