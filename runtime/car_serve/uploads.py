"""Images in, by the runtime's one reader, and images out."""

from __future__ import annotations

import base64
import binascii
import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from car_runtime import ImageError
from car_runtime.images import open_image, opened_header
from car_serve.errors import ServeError, bad_request


def from_base64(text: str, param: str) -> bytes:
    """The bytes of base64, with or without the head of a data URL. Raises ServeError (400)."""
    if text.startswith("data:"):
        text = text.partition(",")[2]
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise bad_request(f"{param} is not base64; encode the image file's bytes", param) from error


def to_base64(data: bytes) -> str:
    """Bytes as base64 text."""
    return base64.b64encode(data).decode()


def decode(data: bytes, param: str, max_pixels: int) -> Image.Image:
    """An uploaded image, RGB or RGBA. Its size is looked at before its pixels are decoded.

    Raises ServeError: 413 too large, 400 no image.
    """
    check_size(data, param, max_pixels)
    try:
        return open_image(io.BytesIO(data))
    except ImageError as error:
        raise bad_request(str(error).replace("the image on the input stream", param), param) from error


def check_size(data: bytes, param: str, max_pixels: int) -> None:
    """Raise ServeError (413) for an image of more pixels; none of them is decoded."""
    try:
        with opened_header(io.BytesIO(data)) as header:
            width, height = header.size
    except Image.DecompressionBombError as error:
        raise _too_large(param, "far too large", max_pixels) from error
    except Exception:  # of whatever kind: the reader below says what is wrong in words
        width = height = 0
    if width * height > max_pixels:
        raise _too_large(param, f"{width}×{height}", max_pixels)


def _too_large(param: str, size: str, most: int) -> ServeError:
    return ServeError(413, "too_large", f"{param} is {size}, over {most} pixels; make it smaller first", param=param)


def webp(pixels: NDArray[np.uint8]) -> bytes:
    """A preview, uint8 [H, W, 3], as WebP; a small one, which is looked at enlarged, without loss."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "WEBP", quality=80, method=0, lossless=max(pixels.shape) <= 128)
    return stream.getvalue()
