"""What an image file holds next to its pixels, looked at before Pillow reads it.

A few thousand tags can all name the same bytes, a strip of a TIFF can be listed a million times, and blocks of no
content can go on for megabytes: from a small file Pillow then makes gigabytes, or minutes. `car_train` has the same
code in `data/image_metadata.py`; `tests/test_twins.py` holds the two together.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Mapping
from typing import IO, Any

MAX_STRIPS = 128 * 1024
"""Strips or tiles of a TIFF: as many tiles of 16×16 as 32 Mpixel have. Each becomes a tuple and starts a decoder."""
MAX_TAGS = 128 * 1024 * 1024
"""Bytes of all tags of a TIFF or of EXIF, which also must not be more than it has itself, or 64 KiB."""
MAX_NUMBERS = 1024 * 1024
"""Of these, bytes of numbers, which become objects of up to 40 times the size. A palette of 16 bits has 0.4 MB."""
MAX_EXIF = 1024 * 1024
"""Bytes of a JPEG's EXIF; one segment has 64 KB."""
MAX_BLOCKS = 8 * 1024
"""Segments before a JPEG's pixels, blocks before a GIF's; an ICC profile may take 255."""
MAX_JUNK = 64 * 1024
"""Bytes before the pixels that belong to nothing."""

_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8}
"""Bytes of a value by a tag's type."""
_TEXTS = (1, 2, 7)
"""Types whose values stay bytes."""
_OFFSETS, _STRIPS = (273, 324), (273, 279, 324, 325)
"""Tags: where strips and tiles are, and these with their lengths."""
_DIRECTORIES = (34665, 34853, 40965)
"""Tags that lead to further directories: EXIF, GPS, interoperability."""
_OFFSET_TYPES = (3, 4, 13, 16)
"""Types of an offset."""
_BARE = frozenset((0xC8, *range(0xD0, 0xDA), *range(0xF0, 0xFE)))
"""Markers of JPEG after which Pillow skips no content."""


def check_metadata(file: IO[bytes]) -> None:
    """Look at an image file of any kind. Raises ValueError where what it holds next to its pixels is too much."""
    file.seek(0)
    head = file.read(4)
    if head[:2] in (b"II", b"MM"):
        _check_directories(file, file.seek(0, io.SEEK_END))
    elif head[:2] == b"\xff\xd8":
        _check_jpeg(file)
    elif head[:3] == b"GIF":
        _check_gif(file)
    file.seek(0)


def check_exif(info: Mapping[Any, Any]) -> None:
    """Look at the EXIF of an image that Pillow opened, by its `info`, before it is read. Raises ValueError."""
    exif, raw = info.get("exif"), info.get("Raw profile type exif")
    if not exif and isinstance(raw, str):
        exif = bytes.fromhex("".join(raw.split("\n")[3:]))
    if isinstance(exif, bytes):
        _check_blob(exif)


def _check_blob(exif: bytes) -> None:
    while exif.startswith(b"Exif\0\0"):
        exif = exif[6:]
    if exif[:2] in (b"II", b"MM"):
        _check_directories(io.BytesIO(exif), len(exif))


def _check_directories(file: IO[bytes], length: int) -> None:
    """The directories of a TIFF or of EXIF, and what their tags take together."""
    file.seek(0)
    head = file.read(16)
    order, large = "<" if head[:2] == b"II" else ">", head[2:3] == b"+"
    width = 8 if large else 4
    number, entry = struct.Struct(order + "LQ"[large]), struct.Struct(order + ("HHQ8s" if large else "HHL4s"))
    left, total, numbers = [head[width : 2 * width].ljust(width, b"\0")], 0, 0
    for _ in range(8):  # of which there are up to four
        if not left:
            return
        file.seek(min(number.unpack(left.pop())[0], length))
        count = int.from_bytes(file.read(8 if large else 2), "little" if order == "<" else "big")
        entries = file.read(min(count, 65536) * entry.size)
        for tag, kind, values, data in entry.iter_unpack(entries[: len(entries) // entry.size * entry.size]):
            size = values * _SIZES.get(kind, 0)
            total += size if size > width else 0
            numbers += size if size > width and kind not in _TEXTS and tag not in _STRIPS else 0
            if tag in _DIRECTORIES and size:
                left.append(_offset(order, kind, values, data))
            if tag in _OFFSETS and values > MAX_STRIPS:
                raise ValueError(f"{values} strips or tiles, over {MAX_STRIPS}")
        if count > 65536 or total > min(max(length, 65536), MAX_TAGS) or numbers > MAX_NUMBERS:
            raise ValueError(f"{count} tags of {total} bytes, {numbers} of numbers")
    if left:
        raise ValueError("over 8 directories of tags")


def _offset(order: str, kind: int, values: int, data: bytes) -> bytes:
    """Where a tag leads to, as wide as `data`."""
    if values != 1 or kind not in _OFFSET_TYPES or (used := _SIZES[kind]) > len(data):
        raise ValueError(f"a directory of tags at {values} values of type {kind}")
    return data[:used].ljust(len(data), b"\0") if order == "<" else data[:used].rjust(len(data), b"\0")


def _check_jpeg(file: IO[bytes]) -> None:
    """The segments before the pixels, of which EXIF and the list of images (MPF) hold directories."""
    file.seek(2)
    exif, read, junk = b"", 0, 0
    for _ in range(MAX_BLOCKS):
        while (byte := file.read(1)) and not (byte == b"\xff" and (kind := file.read(1)) not in (b"\0", b"\xff")):
            if byte == b"\xff" and kind == b"\xff":  # padding: a marker may begin with it
                file.seek(-1, io.SEEK_CUR)
            junk += 1
            if junk > MAX_JUNK:
                raise ValueError(f"over {MAX_JUNK} bytes that belong to no segment")
        if not byte or kind in (b"\xda", b""):
            _check_blob(exif)
            return
        if kind[0] in _BARE:
            continue
        content = file.read(max(int.from_bytes(file.read(2), "big") - 2, 0))
        if (kind, content[:4]) not in ((b"\xe1", b"Exif"), (b"\xe2", b"MPF\0")):
            continue
        read += len(content)
        exif += content if kind == b"\xe1" and not exif else content[6:] if kind == b"\xe1" else b""
        if read > MAX_EXIF:
            raise ValueError(f"over {MAX_EXIF} bytes of EXIF")
        _check_blob(content.removeprefix(b"MPF\0"))
    raise ValueError(f"over {MAX_BLOCKS} segments before the pixels")


def _check_gif(file: IO[bytes]) -> None:
    """The extensions before the first image."""
    file.seek(0)
    head = file.read(13)
    if len(head) == 13 and head[10] & 0x80:
        file.seek(3 << ((head[10] & 7) + 1), io.SEEK_CUR)
    junk = blocks = 0
    while (kind := file.read(1)) and kind not in b",;":
        if kind != b"!":
            junk += 1
        else:
            file.read(1)
            while blocks <= MAX_BLOCKS and (length := file.read(1)) and length[0]:
                file.seek(length[0], io.SEEK_CUR)
                blocks += 1
            blocks += 1
        if blocks > MAX_BLOCKS or junk > MAX_JUNK:
            raise ValueError(f"over {MAX_BLOCKS} blocks before the first image")
