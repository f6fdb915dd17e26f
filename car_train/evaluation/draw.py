"""Drawing the images of an evaluation in processes of their own; a stopped one goes on from what is drawn.

Next to samples.npz stands the folder `.samples.npz.parts` until all is measured; one without an image goes at once:

    settings.json      what they depend on: an evaluation with `--resume` and other settings is refused
    controls/7.png     the control of real image 7
    process-0.jsonl    what a process is to draw, one request a line: the jobs of `car-run batch`
    process-0/         its images, each written whole; moved to images/ when it is done, or by the next start
    images/0000031.png image 31 of all
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from car_train.evaluation.options import EvaluationError, require
from car_train.evaluation.targets import Target, first_error
from car_train.files import one_writer, write_text, written_aside
from car_train.streams import ending_with_this_process

BATCH = 32
"""Images that are read at once."""
POLL = 0.5
"""Seconds between looks at how far the processes are."""

Pixels = NDArray[np.uint8]
Request = dict[str, Any]


def control_of(request: Request) -> Path:
    """The control image of a request, whichever branch it is for."""
    return next(Path(value) for key, value in request.items() if key.partition(":")[0] == "control")


def read_png(file: Path) -> Pixels:
    """uint8 [H, W, 3]."""
    with Image.open(file, formats=["PNG"]) as opened:
        return np.asarray(opened.convert("RGB"))


def parts_of(samples: Path) -> Path:
    return samples.parent / f".{samples.name}.parts"


@contextmanager
def drawing(samples: Path, settings: dict[str, Any], requests: Sequence[Request], resume: bool) -> Iterator[Drawing]:
    """A Drawing that no other process draws at the same time, and that leaves no folder but for `resume`.

    Raises BusyError.
    """
    with one_writer(samples):
        parts = Drawing(samples, settings, requests, resume)
        try:
            yield parts
        except BaseException:
            if not any(parts.images_folder.iterdir()):
                parts.remove()
            raise
        parts.remove()


class Drawing:
    """The images of one evaluation, in a folder."""

    def __init__(self, samples: Path, settings: dict[str, Any], requests: Sequence[Request], resume: bool):
        """The folder is emptied, or with `resume` taken over. Raises EvaluationError for one of other settings."""
        self.folder = parts_of(samples)
        self.images_folder = self.folder / "images"
        self.requests = requests
        text = json.dumps(settings, indent=1, sort_keys=True) + "\n"
        marker = self.folder / "settings.json"
        if resume and marker.is_file():
            require(
                marker.read_text(encoding="utf-8") == text,
                f"{self.folder} was drawn of another model or with other settings; give these, or leave out --resume",
            )
        else:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.images_folder.mkdir(parents=True)
            write_text(marker, text)
        self._gather()

    def draw(self, target: Target, processes: int, threads: int) -> None:
        """Draw what is missing. Raises EvaluationError with the message of a process that fails."""
        left = [i for i in range(len(self.requests)) if not self._file(i).is_file()]
        bar = tqdm(total=len(self.requests), initial=len(self.requests) - len(left), unit="img", disable=None)
        bar.set_description("drawing")
        with bar:
            try:
                if left:
                    self._in_processes(target, left, min(processes, len(left)), threads, bar)
            finally:
                self._gather()
        missing = [i for i in left if not self._file(i).is_file()]
        require(not missing, f"{target.name}: {len(missing)} images were not drawn; go on with --resume")

    def images(self) -> Iterator[Pixels]:
        """The images in batches, uint8 [B, H, W, 3]."""
        files = [self._file(i) for i in range(len(self.requests))]
        for start in range(0, len(files), BATCH):
            yield np.stack([read_png(file) for file in files[start : start + BATCH]])

    def write(self, samples: Path, keep: Sequence[int]) -> None:
        """The images at these places as an archive."""
        self._write_archive(samples, [self._file(i) for i in keep])

    def write_controls(self, archive: Path, keep: Sequence[int]) -> None:
        """The control maps of the images at these places as an archive."""
        self._write_archive(archive, [control_of(self.requests[i]) for i in keep])

    def _write_archive(self, archive: Path, files: Sequence[Path]) -> None:
        """Images as `arr_0` of one .npz, by way of a file: never all of them in memory."""
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            shape = (len(files), *read_png(files[0]).shape)
            whole = np.lib.format.open_memmap(f"{folder}/a.npy", mode="w+", dtype=np.uint8, shape=shape)
            for place, file in enumerate(files):
                whole[place] = read_png(file)
            with written_aside(archive) as aside, aside.open("wb") as stream:
                np.savez(stream, arr_0=whole)

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _file(self, i: int) -> Path:
        return self.images_folder / f"{i:07d}.png"

    def _gather(self) -> None:
        """Move what processes have drawn to where it belongs."""
        for folder in [path for path in self.folder.glob("process-*") if path.is_dir()]:
            for image in folder.glob("*.png"):
                os.replace(image, self.images_folder / image.name)
            shutil.rmtree(folder)

    def _in_processes(self, target: Target, left: list[int], processes: int, threads: int, bar: Any) -> None:
        """Every process takes each n-th image; if one fails the others are stopped."""
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        running: list[tuple[subprocess.Popen[str], Path]] = []
        try:
            for k in range(processes):
                lines = [{"name": f"{i:07d}", **self.requests[i]} for i in left[k::processes]]
                jobs = self.folder / f"process-{k}.jsonl"
                write_text(jobs, "".join(json.dumps(line) + "\n" for line in lines))
                command = [*target.command, str(jobs), "--threads", str(threads), "-o", str(jobs.with_suffix(""))]
                errors = jobs.with_suffix(".log")
                with errors.open("w", encoding="utf-8") as stderr:
                    process = subprocess.Popen(
                        ending_with_this_process(command),
                        stdout=subprocess.DEVNULL,
                        stderr=stderr,
                        text=True,
                        env=environment,
                    )
                running.append((process, errors))
            _watch(target, running, self.folder, bar)
        finally:
            for process, _ in running:
                if process.poll() is None:
                    process.terminate()
            for process, _ in running:
                process.wait()


def _watch(target: Target, running: Sequence[tuple[subprocess.Popen[str], Path]], folder: Path, bar: Any) -> None:
    """Move the bar until all processes are done. Raises EvaluationError once one fails."""
    before = bar.n
    while True:
        codes = [process.poll() for process, _ in running]
        bar.update(before + sum(1 for _ in folder.glob("process-*/*.png")) - bar.n)
        for code, (_, errors) in zip(codes, running, strict=True):
            if code:
                message = first_error(errors.read_text(encoding="utf-8", errors="replace"))
                raise EvaluationError(f"{target.name}: drawing failed: {message}")
        if all(code == 0 for code in codes):
            return
        with suppress(subprocess.TimeoutExpired):
            next(process for (process, _), code in zip(running, codes, strict=True) if code is None).wait(POLL)
