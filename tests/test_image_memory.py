"""The largest image of each kind that is let in is read in at most 1 GB, by runtime and training alike."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image, features

from car_runtime import images as runtime
from car_train.data import images as train

LARGE, DENSE = (8192, 8192), (8192, 4096)
PEAK_MB = 1000
EXIF = Image.Exif()
EXIF[0x0112] = 6
_READ = """
import sys
reader, path = sys.argv[1:]
if reader == "runtime":
    from car_runtime.images import drawn_on_ground, fitted, open_image
    fitted(drawn_on_ground(open_image(path), (0, 0, 0))[0], 64, "crop", (0, 0, 0))
else:
    from car_train.data.images import fitted, open_map
    fitted(open_map(path, (0, 0, 0)), 64)
print(next(int(line.split()[1]) // 1024 for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def _new(mode: str, size: tuple[int, int], value: object, kind: str, **more: object) -> Callable[[Path], None]:
    return lambda path: Image.new(mode, size, value).save(path, kind, **more)  # type: ignore[arg-type]


KINDS: dict[str, Callable[[Path], None]] = {
    "PNG RGB": _new("RGB", LARGE, (9, 8, 7), "PNG", exif=EXIF, compress_level=1),
    "PNG 16 bits": _new("I;16", LARGE, 900, "PNG", compress_level=1),
    "PNG 16 bits, transparent": _new("I;16", DENSE, 900, "PNG", transparency=900, compress_level=1),
    "PNG palette": _new("P", LARGE, 3, "PNG", compress_level=1),
    "PNG palette, transparent": _new("P", DENSE, 3, "PNG", transparency=3, compress_level=1),
    "PNG RGBA": _new("RGBA", DENSE, (9, 8, 7, 6), "PNG", exif=EXIF, compress_level=1),
    "PNG LA": _new("LA", DENSE, (9, 8), "PNG", exif=EXIF, compress_level=1),
    "PNG 1 bit": _new("1", LARGE, 1, "PNG"),
    "JPEG CMYK": _new("CMYK", LARGE, (1, 2, 3, 4), "JPEG", progressive=True, exif=EXIF),
    "TIFF CMYK": _new("CMYK", DENSE, (1, 2, 3, 4), "TIFF", compression="tiff_lzw"),
    "TIFF float": _new("F", DENSE, 0.5, "TIFF", compression="tiff_lzw"),
    "TIFF RGBA": _new("RGBA", DENSE, (1, 2, 3, 4), "TIFF", compression="tiff_lzw", exif=EXIF),
    "WebP RGBA": _new("RGBA", DENSE, (1, 2, 3, 4), "WEBP", lossless=True, method=0, exif=EXIF),
    "BMP RGB": _new("RGB", LARGE, (1, 2, 3), "BMP"),
    "GIF of two frames": _new("P", LARGE, 1, "GIF", save_all=True, append_images=[Image.new("P", (8192, 8192), 2)]),
}
if features.check("avif"):
    KINDS["AVIF RGBA"] = _new("RGBA", DENSE, (1, 2, 3, 4), "AVIF", speed=10, exif=EXIF)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of memory is read from /proc")
@pytest.mark.parametrize("kind", KINDS)
def test_the_largest_image_of_a_kind_takes_at_most_1_gb(kind: str, tmp_path: Path) -> None:
    KINDS[kind](tmp_path / "x")
    for reader in ("runtime", "train"):
        read = [sys.executable, "-c", _READ, reader, str(tmp_path / "x")]
        done = subprocess.run(read, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert int(done.stdout) <= PEAK_MB, reader


@pytest.mark.parametrize(("mode", "kind"), [("RGBA", "PNG"), ("LA", "PNG"), ("RGB", "WEBP"), ("F", "TIFF")])
def test_limits_are_by_mode_in_both_readers(
    mode: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new(mode, (20, 20)).save(tmp_path / "x", kind)
    for module, read, error in (
        (runtime, runtime.load_image, runtime.ImageError),
        (train, train.open_image, train.ImageFileError),
    ):
        read(tmp_path / "x")
        monkeypatch.setattr(module, "MAX_PIXELS_DENSE", 399)
        with pytest.raises(error, match="over 399 pixels"):
            read(tmp_path / "x")
        monkeypatch.setattr(module, "MAX_BYTES", 10)
        with pytest.raises(error, match="over 10"):
            read(tmp_path / "x")
