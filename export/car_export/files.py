"""Outputs are whole or absent: everything the exporter writes is made next to its place and renamed into it."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path

from car_export.errors import ExportError, OutputError
from car_runtime.format.manifest import MANIFEST
from car_train.files import folder_aside, one_writer, written_aside


@contextlib.contextmanager
def plan_written_aside(output: Path) -> Iterator[Path]:
    """A folder next to a plan's place, which goes there when the block is done and is gone if it fails.

    Raises ExportError where something else stands in the plan's place, or nothing can be written; BusyError where
    another process writes it.
    """
    if output.exists() and not (output / MANIFEST).is_file():
        raise ExportError(f"{output} exists and is not a plan; remove it or choose another name")
    try:
        with one_writer(output), folder_aside(output) as aside:
            yield aside
    except OSError as error:
        raise ExportError(
            f"{output}: could not be written ({error}); free some space or choose another folder"
        ) from error


def write_file(path: Path, data: bytes | memoryview) -> None:
    """Write a file next to its place and rename it, so that no reader sees half of it. Raises OutputError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_aside(path) as aside:
            aside.write_bytes(data)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        remedy = f"free {len(data) / 1e6:.0f} MB there" if full else "check the folder and its permissions"
        raise OutputError(f"{path} could not be written ({error.strerror}); {remedy}") from error
