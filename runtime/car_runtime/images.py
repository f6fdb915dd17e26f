"""Images in and out: controls and photos read safely, results written so that nothing half-made is ever left.

Everything read becomes 8-bit RGB here, once, and all else in the package takes that. `car_train.data.images` reads
training's files by the same rules; `tests/test_reading.py` holds the two together.
"""

from __future__ import annotations

import errno
import io
import math
import os
import stat
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, ImageOps, PngImagePlugin, UnidentifiedImageError

from car_runtime.errors import ImageError, OutputError
from car_runtime.format.manifest import Scale
from car_runtime.image_metadata import check_exif, check_metadata
from car_runtime.system.cpu import usable_cores
from car_runtime.system.files import write_atomically

MAX_PIXELS = 64 * 1024 * 1024
"""Checked on the header, before anything is decoded: RGB of this size is 256 MB, as Pillow stores it."""
MAX_PIXELS_DENSE = 32 * 1024 * 1024
"""Of images with transparency, which are composited, and of formats whose decoders hold whole canvases."""
DENSE_FORMATS = ("WEBP", "TIFF", "AVIF")
MAX_BYTES = 256 * 1024 * 1024
"""Of a file: some decoders read all of it first. With these limits, reading takes at most 1 GB."""
MAX_PROFILE = 1024 * 1024
"""Bytes of an ICC profile that is kept; cameras' have some 500 to 4,000."""
STRIP_PIXELS = 1024 * 1024
RESIZING_THREADS = 8
RESIZED_APART = 192
"""Side in pixels from which resizing a control image to all scales takes longer than starting threads."""
MIN_EDGE = 8
"""A control image smaller than this says nothing about where things are."""
BLACK, WHITE = (0, 0, 0), (255, 255, 255)
_AVIF = ("AVIF",) if find_spec("PIL.AvifImagePlugin") else ()  # from Pillow 11.3 on
FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", *_AVIF)
"""What is tried on a file, by Pillow's names; nothing that hands it to another program, as EPS to Ghostscript."""
CONTRAST = 8
"""Grey levels from which on two are distinguished."""

Source: TypeAlias = "str | os.PathLike[str] | IO[bytes] | Image.Image | NDArray[Any]"


def load_image(source: Source, *, background: tuple[int, int, int] = BLACK) -> Image.Image:
    """Any image as 8-bit RGB: a path, an open binary file, a PIL image, or a uint8 array [H, W] or [H, W, 1|3|4].

    - EXIF orientation is applied; of an animation the first frame is taken, of a TIFF the first page.
    - Transparent parts show `background`: black by default, which is "nothing here" in edge maps and "far" in depth.
    - 16-bit and 32-bit integer grey (depth maps) is scaled from 0…65535 to 0…255, floating-point grey from 0…1, never
      from the image's own range: two depth maps must stay comparable.

    Raises ImageError: not there, not an image, damaged, over 64 Mpixel (32 with transparency, or of WebP, TIFF and
    AVIF) or 256 MiB, an edge under 8 pixels, values out of range.
    """
    return on_ground(open_image(source), background)


def open_image(source: Source) -> Image.Image:
    """An image decoded, upright and in 8 bits: RGBA where anything is transparent, else RGB.

    Sources, rules and errors as for `load_image`.
    """
    name = _name(source)
    with _explained(name):
        if isinstance(source, Image.Image):
            return _decoded(source, name)
        if isinstance(source, np.ndarray):
            return _decoded(_from_array(source), name)
        with opened_header(_checked_file(source, name)) as image:
            return _decoded(image, name, ours=True)


def opened_header(source: str | os.PathLike[str] | IO[bytes]) -> Image.Image:
    """An image of which no pixel is decoded yet. Raises what Pillow raises, and ValueError for too much metadata."""
    if isinstance(source, (str, os.PathLike)):
        with open(source, "rb") as file:
            check_metadata(file)
    else:
        source = source if source.seekable() else io.BytesIO(source.read())
        check_metadata(source)
    return Image.open(source, formats=FORMATS)


def text_chunks(source: Source) -> dict[str, str]:
    """The text of a PNG file by keyword; {} for other kinds of file. Limits and errors as for `load_image`."""
    name = _name(source)
    with _explained(name), opened_header(_checked_file(source, name)) as image:
        _check_size(image, name)
        image.load()  # chunks may stand after the pixels
        return {str(keyword): str(text) for keyword, text in getattr(image, "text", {}).items()}


def colour_profile(image: Image.Image) -> bytes | None:
    """The ICC profile of an image of `open_image`; None where its file had none, or one of other colours than RGB."""
    profile = image.info.get("icc_profile")
    usable = isinstance(profile, bytes) and len(profile) <= MAX_PROFILE and profile[16:20] == b"RGB "
    return profile if usable else None


def on_ground(image: Image.Image, ground: Sequence[int]) -> Image.Image:
    """An image of `open_image` as RGB, with `ground` where it is transparent."""
    if image.mode != "RGBA":
        return image.convert("RGB")
    return Image.alpha_composite(Image.new("RGBA", image.size, (*ground, 255)), image).convert("RGB")


def drawn_on_ground(image: Image.Image, ground: Sequence[int]) -> tuple[Image.Image, bool]:
    """The same for a map, and whether its strokes had the ground's colour.

    Black strokes on transparency say all that they say in the alpha channel: where compositing leaves one colour
    (within `CONTRAST`), alpha is drawn in the ground's opposite instead.
    """
    flat = on_ground(image, ground)
    if image.mode != "RGBA" or not _plain(flat):
        return flat, False
    alpha = image.getchannel("A")
    if _plain(alpha):
        return flat, False
    ink = Image.new("RGB", image.size, tuple(255 - level for level in ground))
    return Image.composite(ink, Image.new("RGB", image.size, tuple(ground)), alpha), True


def _plain(image: Image.Image) -> bool:
    """Whether all pixels have one colour, within `CONTRAST`."""
    pixels = np.asarray(image).reshape(image.width * image.height, -1)
    return bool((pixels.max(axis=0).astype(int) - pixels.min(axis=0) < CONTRAST).all())


def _name(source: Source) -> str:
    if isinstance(source, (str, os.PathLike)):
        return repr(os.fspath(source))
    if isinstance(source, (Image.Image, np.ndarray)):
        return "the image"
    if hasattr(source, "read"):
        return "the image on the input stream"
    raise ImageError(f"{type(source).__name__} is not an image; give a path, a PIL image or a uint8 array")


def _decoded(image: Image.Image, name: str, *, ours: bool = False) -> Image.Image:
    """`ours`: nobody else has the image, which need not be copied then."""
    _check_size(image, name)
    image.load()
    check_exif(image.info)
    if ours:
        ImageOps.exif_transpose(image, in_place=True)
    else:
        image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = _grey_to_8_bits(image, name)
    mode = "RGBA" if image.has_transparency_data else "RGB"
    return image if image.mode == mode else image.convert(mode)


def _checked_file(source: Any, name: str) -> Any:
    """A file by its path: a regular one, or the shell's pipe, as others would be waited for; and not too long."""
    if not isinstance(source, (str, os.PathLike)):
        return source
    if source == "":  # Pillow before 11 takes it for a file object
        raise FileNotFoundError
    found = os.stat(source)
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, "it is a directory", os.fspath(source))
    piped = stat.S_ISFIFO(found.st_mode) and os.fspath(source).startswith(("/dev/", "/proc/"))  # a shell's <(…)
    if not (stat.S_ISREG(found.st_mode) or piped):
        raise ImageError(f"{name} is not a file; give an image file")
    if not piped and found.st_size <= MAX_BYTES:
        return source
    if piped:  # which says no size
        with open(source, "rb") as pipe:
            data = pipe.read(MAX_BYTES + 1)
        if len(data) <= MAX_BYTES:
            return io.BytesIO(data)
    raise ImageError(f"{name} has over {MAX_BYTES} bytes; make it smaller first")


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Turn whatever opening or decoding raises into one ImageError that says what to do."""
    try:
        yield
    except ImageError:
        raise
    except FileNotFoundError as error:
        raise ImageError(f"there is no image {name}; check the path") from error
    except IsADirectoryError as error:
        raise ImageError(f"{name} is a directory; give an image file") from error
    except PermissionError as error:
        raise ImageError(f"{name} may not be read; check its permissions") from error
    except UnidentifiedImageError as error:
        raise ImageError(f"{name} is not an image that can be read; give a PNG, JPEG, WebP or TIFF file") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(f"{name} has over {MAX_PIXELS} pixels; make it smaller first") from error
    except MemoryError:
        raise
    except (
        Exception
    ) as error:  # decoders of damaged files raise almost anything: struct.error, KeyError, SyntaxError …
        cause = (str(error) or type(error).__name__).splitlines()[0]
        raise ImageError(f"{name} is truncated, damaged or of a rare kind ({cause}); save it as 8-bit PNG") from error


def _check_size(image: Image.Image, name: str) -> None:
    width, height = image.size
    dense = image.has_transparency_data or image.format in DENSE_FORMATS
    limit = MAX_PIXELS_DENSE if dense else MAX_PIXELS
    if width * height > limit:
        kind = f" ({image.format} {image.mode})" if dense and image.format else ""
        raise ImageError(f"{name} is {width}×{height}, over {limit} pixels{kind}; make it smaller first")
    if min(width, height) < MIN_EDGE:
        raise ImageError(f"{name} is {width}×{height} pixels, under {MIN_EDGE} on an edge; give a larger image")


def _from_array(array: NDArray[Any]) -> Image.Image:
    good = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (1, 3, 4))
    if array.dtype != np.uint8 or not good:
        raise ImageError(
            f"the image array is {array.dtype} {list(array.shape)}; give uint8 [H, W], [H, W, 3] or [H, W, 4]"
        )
    if 0 in array.shape:
        raise ImageError(f"the image array is empty, {list(array.shape)}; give at least {MIN_EDGE}×{MIN_EDGE} pixels")
    return Image.fromarray(array[:, :, 0] if array.ndim == 3 and array.shape[2] == 1 else array)


def _grey_to_8_bits(image: Image.Image, name: str) -> Image.Image:
    """Pillow's own conversion clips at 255, which turns a 16-bit depth map all white.

    A grey level that the file declares transparent becomes alpha.
    """
    top = 1.0 if image.mode == "F" else 65535.0
    low, high = _grey_range(image)
    if not (low >= 0 and high <= top):
        raise ImageError(
            f"{name} has grey values {low:g}…{high:g}, outside 0…{top:g}; save it as 8-bit or 16-bit grey"
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


def _grey_range(image: Image.Image) -> tuple[float, float]:
    """The smallest and the largest level; NaN where there is one."""
    ends = np.array([(grey.min(), grey.max()) for _, grey in _strips(image)])
    return float(ends[:, 0].min()), float(ends[:, 1].max())


def _strips(image: Image.Image) -> Iterator[tuple[tuple[int, int], NDArray[np.float64]]]:
    """Rows of a grey image from above, about a million pixels at a time, and where each strip starts."""
    rows = max(1, STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(image.height, top + rows)))
        yield (0, top), np.asarray(strip, np.float64)


def control_pyramid(image: Image.Image, scales: Sequence[Scale]) -> list[NDArray[np.uint8]]:
    """A control image at every scale, uint8 [control_size, control_size, 3] each, by Pillow's default filter.

    image: RGB, square, of the model's size (see `fitted`), which the published weights' scales were made from. Large
    ones are resized on several threads: next to a GPU's steps the time on one would show.
    """

    def resized(scale: Scale) -> NDArray[np.uint8]:
        return np.asarray(image.resize((scale.control_size, scale.control_size)), np.uint8)

    threads = min(RESIZING_THREADS, usable_cores())
    if threads == 1 or image.width < RESIZED_APART:
        return [resized(scale) for scale in scales]
    with ThreadPoolExecutor(threads) as pool:  # the largest first, so that none waits for it at the end
        return list(pool.map(resized, reversed(scales)))[::-1]


def fitted(image: Image.Image, size: int, fit: str, margin: Sequence[int]) -> Image.Image:
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


def contact_sheet(images: Sequence[NDArray[np.uint8]], gap: int = 4) -> NDArray[np.uint8]:
    """Images of one size, uint8 [H, W, 3], on white: up to five in one row, more in a near-square block.

    Small images are enlarged by a whole factor, to about 128 pixels: a sheet is for looking at.
    """
    factor = max(1, 128 // images[0].shape[0])
    width, height = images[0].shape[1] * factor, images[0].shape[0] * factor
    columns = len(images) if len(images) <= 5 else math.ceil(math.sqrt(len(images)))
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), WHITE)
    for i, image in enumerate(images):
        enlarged = Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS)
        sheet.paste(enlarged, (i % columns * (width + gap), i // columns * (height + gap)))
    return np.array(sheet)


def labelled_sheet(
    images: Sequence[NDArray[np.uint8]],
    rows: Sequence[str],
    columns: Sequence[str],
    title: str,
    corner: Image.Image | None = None,
) -> NDArray[np.uint8]:
    """Images of one size, uint8 [H, W, 3], row by row, with a label at each row and column, uint8 [H', W', 3].

    Labels may have several lines. `title` stands above everything, `corner` before it, such as the control. Raises
    OutputError for a sheet of over `MAX_PIXELS`.
    """
    font = _font()
    factor, gap = max(1, 128 // images[0].shape[0]), 4
    height, width = images[0].shape[0] * factor, images[0].shape[1] * factor
    names, heads = (
        [_shortened(label, font, limit) for label in labels] for labels, limit in ((rows, 240), (columns, width))
    )
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))

    def size_of(text: str) -> tuple[int, int]:
        left, top, right, bottom = measure.multiline_textbbox((0, 0), text, font=font)
        return math.ceil(right - min(left, 0)), math.ceil(bottom - min(top, 0)) + 6

    side = 64 if corner is not None else 0
    above = max(side, size_of(title)[1]) + gap
    left, top = max(size_of(name)[0] for name in names) + 2 * gap, above + max(size_of(head)[1] for head in heads)
    total = (
        max(left + len(columns) * (width + gap), side + size_of(title)[0] + 3 * gap),
        top + len(rows) * (height + gap),
    )
    if total[0] * total[1] > MAX_PIXELS:
        raise OutputError(f"the sheet would have {total[0]}×{total[1]} pixels, over {MAX_PIXELS}; show fewer images")
    sheet = Image.new("RGB", total, WHITE)
    draw = ImageDraw.Draw(sheet)
    if corner is not None:
        sheet.paste(corner.convert("RGB").resize((side, side), Image.Resampling.LANCZOS), (gap, gap))
    draw.multiline_text((side + 2 * gap, gap), title, fill=BLACK, font=font)
    for column, head in enumerate(heads):
        draw.multiline_text((left + column * (width + gap), above), head, fill=BLACK, font=font)
    for row, name in enumerate(names):
        draw.multiline_text((gap, top + row * (height + gap) + gap), name, fill=BLACK, font=font)
    for i, image in enumerate(images):
        enlarged = Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS)
        row, column = divmod(i, len(columns))
        sheet.paste(enlarged, (left + column * (width + gap), top + row * (height + gap)))
    return np.array(sheet)


def _font() -> Any:
    """Pillow's own font, scaled where it has FreeType."""
    try:
        return ImageFont.load_default(size=13)
    except ImportError:
        return ImageFont.load_default()


def _shortened(text: str, font: Any, width: int) -> str:
    """Each line of a text cut to so many pixels."""
    lines = []
    for line in text.split("\n"):
        whole, kept = line, line
        while kept and font.getlength(kept if kept == whole else kept + "…") > width:
            kept = kept[:-1]
        lines.append(kept if kept == whole else kept + "…")
    return "\n".join(lines)


def png_bytes(
    image: NDArray[np.uint8],
    metadata: Mapping[str, object] | None = None,
    profile: bytes | None = None,
    *,
    level: int = 6,
) -> bytes:
    """A uint8 [H, W, 3] image as PNG, with `metadata` as text chunks (tEXt; iTXt where Latin-1 does not do).

    profile: ICC profile of its colours. level: zlib's, 1 fast … 9 small.
    """
    info = PngImagePlugin.PngInfo()
    for key, value in (metadata or {}).items():
        info.add_text(key, str(value))
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "PNG", pnginfo=info, icc_profile=profile, compress_level=level)
    return stream.getvalue()


def check_writable(path: str | os.PathLike[str]) -> None:
    """See that a file could be written there before minutes are spent on it. Raises OutputError."""
    path = Path(path)
    try:
        if path.is_dir():
            raise OutputError(f"the output {str(path)!r} is a directory; give a file name in it")
        if not path.parent.is_dir():
            raise OutputError(f"the output's directory {str(path.parent)!r} does not exist; create it first")
        # Trying is the one test that read-only mounts, access lists and the superuser do not fool.
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise OutputError(f"cannot write {str(path)[:200]!r} ({why}); choose another place") from error


def write_files(contents: Mapping[Path, bytes]) -> None:
    """Write all of the files or none: each aside in its own directory, then renamed. Raises OutputError."""
    try:
        write_atomically(contents)
    except OSError as error:
        raise OutputError(f"cannot write {error.filename!r} ({error.strerror}); choose another place") from error
