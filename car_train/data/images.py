"""One reader of image files for training, evaluation, sampling and controls, and how an image becomes a square.

The rules are those of `car_runtime.images`, so that a file means in training what it means at run time;
`tests/test_reading.py` holds the two together:

- EXIF orientation is applied; of an animation the first frame is taken, of a TIFF the first page.
- 16-bit and 32-bit integer grey is scaled from 0…65535 to 0…255, floating-point grey from 0…1, never from the image's
  own range: two depth maps must stay comparable. Values outside are refused.
- Transparent parts of an image show white, those of a map the ground of its convention. Where a map's strokes have
  the ground's colour, they are drawn in its opposite.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from car_train.conventions import FITS
from car_train.data.image_metadata import check_exif, check_metadata
from car_train.errors import UserError

_AVIF = ("AVIF",) if find_spec("PIL.AvifImagePlugin") else ()  # from Pillow 11.3 on
FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", *_AVIF)
"""What is tried on a file, by Pillow's names; nothing that hands it to another program, as EPS to Ghostscript."""
EXTENSIONS = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"})
MAX_PIXELS, MAX_PIXELS_DENSE = 64 * 1024 * 1024, 32 * 1024 * 1024
"""Of an image; of one with transparency, which is composited, or of a format whose decoder holds whole canvases."""
DENSE_FORMATS = ("WEBP", "TIFF", "AVIF")
MAX_BYTES = 256 * 1024 * 1024
"""Of a file: some decoders read all of it first. With these limits, reading takes at most 1 GB."""
STRIP_PIXELS = 1024 * 1024
CONTRAST = 8
"""Grey levels from which on two are distinguished."""


class ImageFileError(UserError, ValueError):
    """An image file that cannot be read. The message names it and ends with the remedy."""


UNREADABLE = (ImageFileError, OSError, ValueError, SyntaxError, Image.DecompressionBombError)
"""What reading a damaged file raises, by `open_image` or by Pillow alone."""


def open_image(path: str | Path) -> Image.Image:
    """An image file decoded, upright and in 8 bits: RGBA where anything is transparent, else RGB.

    Raises ImageFileError.
    """
    try:
        _check_file(path)
        with open(path, "rb") as file:
            check_metadata(file)
        with Image.open(path, formats=FORMATS) as opened:
            _check_pixels(opened, path)
            opened.load()
            check_exif(opened.info)
            ImageOps.exif_transpose(opened, in_place=True)
            grey = opened.mode in ("I", "F") or opened.mode.startswith("I;16")
            image = _grey_to_8_bits(opened, path) if grey else opened
            mode = "RGBA" if image.has_transparency_data else "RGB"
            return image if image.mode == mode else image.convert(mode)
    except ImageFileError:
        raise
    except MemoryError:
        raise
    except Exception as error:  # decoders of damaged files raise almost anything: struct.error, KeyError …
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ImageFileError(f"{path}: not a readable image ({reason}); give an image such as a PNG") from error


def _check_file(path: str | Path) -> None:
    """A regular file, as a FIFO would be waited for, and not too long. Raises ImageFileError and OSError."""
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):
        raise ImageFileError(f"{path}: not a file; give an image such as a PNG")
    if found.st_size > MAX_BYTES:
        raise ImageFileError(f"{path}: {found.st_size} bytes, over {MAX_BYTES}; make it smaller first")


def _check_pixels(image: Image.Image, path: str | Path) -> None:
    dense = image.has_transparency_data or image.format in DENSE_FORMATS
    limit = MAX_PIXELS_DENSE if dense else MAX_PIXELS
    if image.width * image.height > limit:
        raise ImageFileError(
            f"{path}: {image.width}×{image.height} ({image.format} {image.mode}), over {limit} pixels; "
            "make it smaller first"
        )


def _grey_to_8_bits(image: Image.Image, path: str | Path) -> Image.Image:
    """16-bit and 32-bit grey from 0…65535, float grey from 0…1; Pillow's own conversion clips at 255.

    A grey level that the file declares transparent becomes alpha.
    """
    top = 1.0 if image.mode == "F" else 65535.0
    ends = np.array([(grey.min(), grey.max()) for _, grey in _strips(image)])
    low, high = float(ends[:, 0].min()), float(ends[:, 1].max())
    if not (low >= 0 and high <= top):
        raise ImageFileError(
            f"{path}: grey values {low:g}…{high:g}, outside 0…{top:g}; save it as 8-bit or 16-bit grey"
        )
    clear = image.info.get("transparency")
    small = Image.new("L", image.size)
    alpha = Image.new("L", image.size) if isinstance(clear, int) else None
    for at, grey in _strips(image):
        small.paste(Image.fromarray(np.rint(grey * (255 / top)).astype(np.uint8)), at)
        if alpha is not None:
            alpha.paste(Image.fromarray(np.where(grey == clear, 0, 255).astype(np.uint8)), at)
    if alpha is not None:
        small.putalpha(alpha)
    return small


def _strips(image: Image.Image) -> Iterator[tuple[tuple[int, int], NDArray[np.float64]]]:
    """Rows of a grey image from above, about a million pixels at a time, and where each strip starts."""
    rows = max(1, STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(image.height, top + rows)))
        yield (0, top), np.asarray(strip, np.float64)


def on_ground(image: Image.Image, ground: Sequence[int]) -> Image.Image:
    """An image of `open_image` as RGB, with `ground` where it is transparent."""
    if image.mode != "RGBA":
        return image.convert("RGB")
    return Image.alpha_composite(Image.new("RGBA", image.size, (*ground, 255)), image).convert("RGB")


def open_map(path: str | Path, ground: Sequence[int]) -> Image.Image:
    """A control map as RGB, on the ground of its convention. Raises ImageFileError.

    Black strokes on transparency say all that they say in the alpha channel: where compositing leaves one colour
    (within `CONTRAST`), alpha is drawn in the ground's opposite instead.
    """
    image = open_image(path)
    flat = on_ground(image, ground)
    if image.mode != "RGBA" or not _plain(flat):
        return flat
    alpha = image.getchannel("A")
    if _plain(alpha):
        return flat
    ink = Image.new("RGB", image.size, tuple(255 - level for level in ground))
    return Image.composite(ink, Image.new("RGB", image.size, tuple(ground)), alpha)


def _plain(image: Image.Image) -> bool:
    """Whether all pixels have one colour, within `CONTRAST`."""
    pixels = np.asarray(image).reshape(image.width * image.height, -1)
    return bool((pixels.max(axis=0).astype(int) - pixels.min(axis=0) < CONTRAST).all())


def fitted(image: Image.Image, size: int, fit: str = FITS[0], margin: Sequence[int] = (255, 255, 255)) -> Image.Image:
    """An image RGB or RGBA as a square of `size` pixels, by LANCZOS; untouched where it is one already.

    fit:    "crop", its middle; "pad", all of it, centred; "stretch", all of it, distorted.
    margin: what "pad" adds, RGB; transparent where the image has alpha.
    """
    if image.size == (size, size):
        return image
    width, height = image.size
    if fit == "pad":
        longer = max(width, height)
        inner = (max(1, round(width * size / longer)), max(1, round(height * size / longer)))
        square = Image.new(image.mode, (size, size), (*margin, 0)[: len(image.getbands())])
        square.paste(image.resize(inner, Image.Resampling.LANCZOS), ((size - inner[0]) // 2, (size - inner[1]) // 2))
        return square
    if fit == "crop":
        edge = min(width, height)
        left, top = (width - edge) // 2, (height - edge) // 2
        # Not as `box` of resize, whose filter looks beyond it.
        image = image.crop((left, top, left + edge, top + edge))
    return image.resize((size, size), Image.Resampling.LANCZOS)
