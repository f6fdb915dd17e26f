"""Files that a command writes: each is another one, and none is an input."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from car_runtime.errors import OutputError


def check_distinct(outputs: Iterable[tuple[str, Path]], inputs: Iterable[Path]) -> None:
    """Raise OutputError if an output, given with its flag, is an input or another output, by whatever name.

    Links are followed, and a link is also a file of its own: writing replaces it, not what it leads to.
    """
    taken: dict[str, tuple[str | None, Path]] = {place: (None, path) for path in inputs for place in _places(path)}
    for flag, path in outputs:
        for place in _places(path):
            if place not in taken:
                continue
            other, first = taken[place]
            if other is None:
                raise OutputError(f"the output {str(path)!r} would replace the input; choose another {flag}")
            raise OutputError(f"{str(path)!r} of {flag} is the file {str(first)!r} of {other}; choose another {flag}")
        taken.update(dict.fromkeys(_places(path), (flag, path)))


def _places(path: Path) -> set[str]:
    """The file that a path leads to, and the name itself, as absolute paths."""
    return {os.path.normcase(place) for place in (_resolved(path), _resolved(path.parent) / path.name)}


def _resolved(path: Path) -> Path:
    try:
        return path.resolve()
    except (OSError, RuntimeError, ValueError):  # a circle of links, a null character: writing will say so
        return path.absolute()
