"""What a file holds next to its pixels is bounded in both readers: tags, strips, segments and blocks."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import pytest
from PIL import Image

from car_runtime import ImageError
from car_runtime.images import load_image
from car_train.data.images import ImageFileError, open_image

BYTES, NUMBERS = 7, 3
"""Types of tags: undefined, and 16-bit numbers."""


def directory(tags: list[tuple[int, int, int, int]], content: bytes = b"") -> bytes:
    """A TIFF of one directory: (tag, type, count, value or offset) each, then the content."""
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    return struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + entries + bytes(4) + content


def many_tags(count: int, size: int, kind: int = BYTES, more: tuple[tuple[int, int, int, int], ...] = ()) -> bytes:
    """Tags that all name the same bytes."""
    at = 14 + 12 * (count + len(more))
    values = size // 2 if kind == NUMBERS else size
    return directory([*more, *((40000 + i, kind, values, at) for i in range(count))], b"\7" * size)


def grey(strips: int, rows: int, pixels: int, kind: int = 4) -> tuple[tuple[int, int, int, int], ...]:
    """The tags of a TIFF of 8×8 grey pixels, which has this many strips."""
    first = ((256, 3, 1, 8), (257, 3, 1, 8), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1))
    return (*first, (273, kind, strips, pixels), (277, 3, 1, 1), (278, 4, 1, rows), (279, 4, 1, 64))


def nested() -> bytes:
    """EXIF whose second directory has the tags."""
    inner = many_tags(300, 9000)[10:]
    outer = directory([(274, 3, 1, 6), (34665, 4, 1, 38)])
    at = len(outer) + 2 + 12 * 300 + 4
    tags = b"".join(struct.pack("<HHII", 40000 + i, BYTES, 9000, at) for i in range(300))
    return outer + struct.pack("<H", 300) + tags + inner[-9004:]


def saved(kind: str, **more: object) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (16, 16), (9, 8, 7)).save(stream, kind, **more)
    return stream.getvalue()


def jpeg(*segments: tuple[int, bytes]) -> bytes:
    """A JPEG with these segments before its own, the first of which is left out, as it says a resolution."""
    own = saved("JPEG")
    after = 4 + int.from_bytes(own[4:6], "big")
    parts = (struct.pack(">BBH", 255, marker, 2 + len(content)) + content for marker, content in segments)
    return own[:2] + b"".join(parts) + own[after:]


def png(name: bytes, content: bytes) -> bytes:
    own, chunk = saved("PNG"), name + content
    return own[:33] + struct.pack(">I", len(content)) + chunk + struct.pack(">I", zlib.crc32(chunk)) + own[33:]


def gif(extension: bytes) -> bytes:
    stream = io.BytesIO()
    Image.new("P", (16, 16)).save(stream, "GIF")
    own = stream.getvalue()
    after = 13 + (3 << ((own[10] & 7) + 1) if own[10] & 0x80 else 0)
    return own[:after] + extension + own[after:]


HOSTILE = {
    "TIFF, tags of the same bytes": many_tags(300, 9000, more=grey(1, 8, 14)),
    "TIFF, tags of numbers": many_tags(300, 9000, NUMBERS, more=grey(1, 8, 14)),
    "TIFF, a strip listed 200,000 times": directory([*grey(200_000, 1, 122, NUMBERS)], bytes(400_000)),
    "JPEG, tags in its list of images": jpeg((0xE2, b"MPF\0" + many_tags(300, 9000, NUMBERS))),
    "JPEG, tags in EXIF": jpeg((0xE1, b"Exif\0\0" + many_tags(300, 9000))),
    "JPEG, tags in EXIF's second directory": jpeg((0xE1, b"Exif\0\0" + nested())),
    "JPEG, EXIF in 9,000 segments": jpeg(*[(0xE1, b"Exif\0\0a")] * 9000),
    "JPEG, junk between the segments": jpeg((0xFE, b"a")).replace(b"\xff\xfe", bytes(100_000) + b"\xff\xfe", 1),
    "PNG, tags in EXIF": png(b"eXIf", many_tags(300, 9000)),
    "PNG, tags in EXIF as text": png(
        b"zTXt",
        b"Raw profile type exif\0\0" + zlib.compress(b"\nexif\n  1\n" + many_tags(300, 9000).hex().encode()),
    ),
    "WebP, tags in EXIF": saved("WEBP", exif=many_tags(300, 9000)),
    "GIF, 9,000 comments": gif(b"!\xfe\1a\0" * 9000),
}
GOOD = {
    "TIFF": directory([*grey(8, 1, 122)], struct.pack("<8I", *range(8, 16))),
    "JPEG": jpeg(
        (0xE1, b"Exif\0\0" + directory([(274, 3, 1, 6)])), (0xE2, b"MPF\0" + many_tags(3, 90)), (0xFE, b"a")
    ),
    "GIF": gif(b"!\xfe\1a\0" * 90),
    "PNG": png(b"eXIf", many_tags(3, 90)),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_metadata_that_would_take_gigabytes_or_minutes_are_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(HOSTILE[name])
    with pytest.raises(ImageError, match=r"tags of|strips|segment|blocks"):
        load_image(tmp_path / "x")
    with pytest.raises(ImageError, match=r"tags of|strips|segment|blocks"):
        load_image(io.BytesIO(HOSTILE[name]))
    with pytest.raises(ImageFileError, match=r"tags of|strips|segment|blocks"):
        open_image(tmp_path / "x")


@pytest.mark.filterwarnings("ignore")  # Pillow's, about tags of the same bytes
@pytest.mark.parametrize("name", GOOD)
def test_ordinary_metadata_are_read(name: str, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(GOOD[name])
    assert load_image(tmp_path / "x").size == open_image(tmp_path / "x").size
