"""What a folder of class folders holds: its classes and images, how they are split, and what is odd about it.

    photos/               photos/              with trees of their own for training and validation
      cat/a.jpg             train/cat/a.jpg
      dog/…                 val/cat/b.jpg

A class is a sub-folder; its images may lie in folders within it. Hidden files and folders are nobody's. Names may be
of any encoding: a class is called what its folder's name says in UTF-8, else in Latin-1.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from car_train.data.images import EXTENSIONS
from car_train.errors import UserError

VAL_SHARE = 0.05
SPLITS = ("train", "val", "all")
TREES = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": None}
"""Folders that stand for a split, and which; None where they are not read."""
FEW, FEW_SHARE = 5, 0.05
"""A class is reported where it has fewer images than this, or than this share of the median class."""


class DataError(UserError, ValueError):
    """An image folder cannot be used. The message says which one and ends with the remedy."""


@dataclass(frozen=True)
class ImageFolder:
    """The images of a folder: (path, label) each, sorted by class and path.

    trees: whether train/ and val/ are given by folders; otherwise a hash of the file's name decides (`split_of`).
    left_out: files that no image will be read from, with the reason.
    odd: what looks as if the layout were not meant so, in sentences that end with a remedy.
    """

    root: Path
    class_names: tuple[str, ...]
    files: tuple[tuple[Path, int], ...]
    trees: bool
    left_out: tuple[tuple[Path, str], ...]
    odd: tuple[str, ...]

    def split(self, name: str) -> list[tuple[Path, int]]:
        """The images of "train", "val" or "all"."""
        return [(path, label) for path, label in self.files if name in ("all", self.split_of(path))]

    def split_of(self, path: Path) -> str:
        """ "train" or "val"."""
        return TREES[path.relative_to(self.root).parts[0]] or "" if self.trees else split_of(path)

    def listing(self, whole: bool = False) -> list[str]:
        """What is read, in a few lines: classes, images, what is left out and why, what is odd.

        whole: nothing is split off.
        """
        counts = Counter(label for _, label in self.files)
        train, val = (len(self.split(name)) for name in SPLITS[:2])
        by = "their folders" if self.trees else "a hash of their names"
        split = "" if whole else f"; {train} to train on, {val} to validate, by {by}"
        lines = [
            f"{len(self.files)} images of {len(self.class_names)} classes, {min(counts.values(), default=0)} to "
            f"{max(counts.values(), default=0)} each{split}"
        ]
        reasons = Counter(reason for _, reason in self.left_out)
        for reason, count in sorted(reasons.items(), key=lambda item: (-item[1], item[0])):
            examples = [shown(path.relative_to(self.root)) for path, why in self.left_out if why == reason]
            lines.append(f"left out, {reason}: {count} ({some(sorted(examples), ', ', 3)})")
        return lines + [f"warning: {sentence}" for sentence in self.odd]


def scan(root: str | Path, class_names: Sequence[str] | None = None) -> ImageFolder:
    """Look through a folder. No image is opened.

    class_names: of the training images, for a folder of validation images alone: it may lack some of them.

    Raises DataError: no such folder, no class folders, a class folder without images, a class that isn't in
    `class_names`, two classes of one name.
    """
    root = Path(root).expanduser()
    if not root.is_dir():
        raise DataError(f"{root} is not a folder; give a folder with one sub-folder of images per class")
    folders = _folders(root)
    if not folders:
        raise DataError(f"{root} has no class folders; put the images of each class in a sub-folder of its own")
    trees = [folder for folder in folders if TREES.get(folder.name)] if _are_trees(folders) else []
    per_tree = [_folders(tree) for tree in trees] if trees else [folders]
    for tree, inside in zip(trees, per_tree, strict=False):
        if not inside:
            raise DataError(f"{tree} has no class folders; put the images of each class in a sub-folder of its own")
    names = list(class_names) if class_names is not None else _names(per_tree[0] if not trees else _folders(trees[0]))
    files: list[tuple[Path, int]] = []
    left_out: list[tuple[Path, str]] = []
    found: dict[Path, list[Path]] = {}
    for i, classes in enumerate(per_tree):
        unknown = sorted(set(_names(classes)) - set(names))
        if unknown:
            raise DataError(
                f"{(trees or [root])[i]}: classes that the training images don't have: {some(unknown, ', ')}; name "
                "its folders like theirs"
            )
        for folder in classes:
            found[folder] = _look_into(folder, left_out)
            label = names.index(text_of(folder.name))
            files += [(path, label) for path in found[folder]]
        if i == 0 and class_names is None:
            _refuse_empty(root, [folder for folder in classes if not found[folder]], left_out)
    loose = [path for path in sorted(root.iterdir()) if is_image(path) and path.is_file()]
    left_out += [(path, "outside of the class folders") for path in loose]
    odd = _oddities(root, per_tree[0], found, bool(trees))
    return ImageFolder(root, tuple(names), tuple(files), bool(trees), tuple(left_out), tuple(odd))


def find_images(root: Path) -> tuple[list[str], list[tuple[Path, int]]]:
    """(class names, [(image, label)]) of a folder of class folders, both sorted; DataError as `scan`."""
    folder = scan(root)
    return list(folder.class_names), list(folder.files)


def _folders(root: Path) -> list[Path]:
    return sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))


def _are_trees(folders: Sequence[Path]) -> bool:
    """Whether they are train/ and val/, and nothing but splits."""
    names = [folder.name for folder in folders]
    return set(names) <= TREES.keys() and {TREES[name] for name in names} >= {"train", "val"}


def _names(folders: Sequence[Path]) -> list[str]:
    names = [text_of(folder.name) for folder in folders]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise DataError(f"{folders[0].parent}: two class folders are called {twice[0]!r}; rename one of them")
    return names


def _look_into(folder: Path, left_out: list[tuple[Path, str]]) -> list[Path]:
    """The images within a class folder, sorted; what else lies there is added to `left_out`."""
    images: list[Path] = []
    for path in _walk(folder, left_out):
        if path.is_symlink() and not path.is_file():
            left_out.append((path, "a link to a folder" if path.is_dir() else "a link to nothing"))
        elif is_image(path):
            images.append(path)
        else:
            left_out.append((path, f"no image by its name ({shown(path.suffix.lower()) or 'no extension'})"))
    return sorted(images)


def _walk(folder: Path, left_out: list[tuple[Path, str]]) -> Iterator[Path]:
    """Files and links within a folder that aren't hidden, unordered; folders that can't be opened are left out."""

    def closed(error: OSError) -> None:
        left_out.append((Path(error.filename), str(error.strerror).lower()))

    for place, folders, names in os.walk(folder, onerror=closed):
        folders[:] = [name for name in folders if not name.startswith(".")]
        links = [name for name in folders if os.path.islink(os.path.join(place, name))]
        yield from (Path(place, name) for name in [*names, *links] if not name.startswith("."))


def _refuse_empty(root: Path, empty: Sequence[Path], left_out: Sequence[tuple[Path, str]]) -> None:
    if not empty:
        return
    reasons = Counter(reason for path, reason in left_out if any(folder in path.parents for folder in empty))
    there = "".join(f"; {count} files left out: {reason}" for reason, count in reasons.most_common(3))
    raise DataError(
        f"{root}: class folders without images: {some([shown(p.name) for p in empty], ', ')}; add images "
        f"({', '.join(sorted(EXTENSIONS))}) or remove the folders{there}"
    )


def _oddities(root: Path, classes: Sequence[Path], found: dict[Path, list[Path]], trees: bool) -> list[str]:
    """What looks as if the layout were not meant so."""
    odd: list[str] = []
    names = [text_of(folder.name) for folder in classes]
    nested = [folder for folder in classes if found[folder] and all(p.parent != folder for p in found[folder])]
    within = sorted({p.relative_to(f).parts[0] for f in nested for p in found[f]})
    if len(classes) == 1 and len(within) > 1:
        odd.append(
            f"the only class, {names[0]!r}, is made of the folders {some(list(map(shown, within)), ', ', 3)} in it; "
            f"if these are the classes, give {shown(classes[0])}"
        )
    elif len(classes) == 1:
        odd.append(f"one class only, {names[0]!r}: --class and guidance will have nothing to choose; add classes")
    elif nested:
        odd.append(
            f"all images of {some([text_of(f.name) for f in nested], ', ', 3)} lie in folders within "
            f"({some(list(map(shown, within)), ', ', 3)}); move these up to {shown(root)} if they are classes of "
            "their own"
        )
    splits = [name for name in names if name.lower() in TREES]
    if splits and not trees:
        odd.append(f"{some(splits, ', ')} counts as a class; for splits give train/ and val/ alone, or --val")
    alike = [name for name, count in Counter(n.strip().casefold() for n in names).items() if count > 1]
    if alike:
        odd.append(
            f"class folders differ in case or spaces alone: {some(alike, ', ')}; join them if they are one class"
        )
    counts = {folder: len(found[folder]) for folder in classes}
    middle = median(counts.values())
    few = [f"{text_of(f.name)} {n}" for f, n in counts.items() if n < FEW or n < FEW_SHARE * middle]
    if few:
        odd.append(f"classes of few images: {some(few, ', ')} (median {middle:g}); add images, or leave them out")
    return odd


def is_image(path: Path) -> bool:
    """Whether a file's name is that of an image."""
    return path.suffix.lower() in EXTENSIONS and not path.name.startswith(".")


def split_of(path: Path) -> str:
    """ "train" or "val", from the file's name without folder and extension alone."""
    digest = hashlib.sha256(path.stem.encode("utf-8", "surrogateescape")).digest()
    return "val" if int.from_bytes(digest[:8], "big") < VAL_SHARE * 2**64 else "train"


def text_of(name: str) -> str:
    """A file's name as text: bytes that aren't UTF-8, which Python has as lone surrogates, are read as Latin-1."""
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return name.encode("utf-8", "surrogateescape").decode("latin-1")
    return name


def shown(path: Path | str) -> str:
    """A path for a message: on one line, whatever is in it."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text_of(str(path)))


def some(items: Sequence[str], separator: str = "\n", most: int = 10) -> str:
    """The first items and how many more there are."""
    more = f"{separator}… and {len(items) - most} more" if len(items) > most else ""
    return separator.join(items[:most]) + more
