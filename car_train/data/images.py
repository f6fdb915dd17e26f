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

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from car_train.conventions import FITS
from car_train.errors import UserError

_AVIF = ("AVIF",) if find_spec("PIL.AvifImagePlugin") else ()  # from Pillow 11.3 on
FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", *_AVIF)
"""What is tried on a file, by Pillow's names; nothing that hands it to another program, as EPS to Ghostscript."""
EXTENSIONS = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"})
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
        with Image.open(path, formats=FORMATS) as opened:
            image = ImageOps.exif_transpose(opened)
            if image.mode in ("I", "F") or image.mode.startswith("I;16"):
                image = _grey_to_8_bits(image, path)
            return image.convert("RGBA" if image.has_transparency_data else "RGB")
    except ImageFileError:
        raise
    except MemoryError:
        raise
    except Exception as error:  # decoders of damaged files raise almost anything: struct.error, KeyError …
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ImageFileError(f"{path}: not a readable image ({reason}); give an image such as a PNG") from error


def _grey_to_8_bits(image: Image.Image, path: str | Path) -> Image.Image:
    """16-bit and 32-bit grey from 0…65535, float grey from 0…1; Pillow's own conversion clips at 255.

    A grey level that the file declares transparent becomes alpha.
    """
    top = 1.0 if image.mode == "F" else 65535.0
    grey = np.asarray(image, np.float64)
    low, high = float(grey.min()), float(grey.max())
    if not (low >= 0 and high <= top):
        raise ImageFileError(
            f"{path}: grey values {low:g}…{high:g}, outside 0…{top:g}; save it as 8-bit or 16-bit grey"
        )
    small = Image.fromarray(np.rint(grey * (255 / top)).astype(np.uint8))
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        small.putalpha(Image.fromarray(np.where(grey == clear, 0, 255).astype(np.uint8)))
    return small


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
