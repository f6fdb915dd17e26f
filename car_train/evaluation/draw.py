"""Drawing the images of an evaluation in processes of their own, in parts that a stopped one goes on from.

Next to samples.npz stands the folder `.samples.npz.parts` until all images are drawn:

    settings.json      what they depend on: an evaluation with `--resume` and other settings is refused
    controls/7.png     the control of real image 7
    00003.jsonl        requests of a part, one a line (`car_train.evaluation.requests`, `car-run batch`)
    00003.npz          its images; written whole, so that what is there is finished
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from car_train.evaluation.options import EvaluationError, require
from car_train.evaluation.targets import Target, last_error
from car_train.files import write_text, written_aside

PART = 32
"""Images of a part: what is lost of each process when it is stopped."""

Pixels = NDArray[np.uint8]
Request = dict[str, Any]


class Parts:
    """The parts of one evaluation, in a folder."""

    def __init__(self, samples: Path, settings: dict[str, Any], requests: Sequence[Request], resume: bool):
        """The folder is emptied, or with `resume` taken over. Raises EvaluationError for one of other settings."""
        self.folder = samples.parent / f".{samples.name}.parts"
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
            self.folder.mkdir(parents=True)
            write_text(marker, text)
        names = [f"{i:05d}" for i in range(-(-len(requests) // PART))]
        self.files = [self.folder / f"{name}.jsonl" for name in names]
        for i, file in enumerate(self.files):
            lines = requests[i * PART : (i + 1) * PART]
            write_text(file, "".join(json.dumps(line) + "\n" for line in lines))

    def draw(self, target: Target, processes: int, threads: int) -> None:
        """Draw what is missing. Raises EvaluationError with the message of a process that fails."""
        left = [file for file in self.files if not file.with_suffix(".npz").is_file()]
        done = len(self.files) - len(left)
        bar = tqdm(total=len(self.requests), initial=min(done * PART, len(self.requests)), unit="img", disable=None)
        bar.set_description("drawing")
        with bar:
            if left:
                _in_processes(target, left, self.folder, min(processes, len(left)), threads, bar)

    def images(self) -> Iterator[Pixels]:
        """The images of one part after the other, uint8 [B, H, W, 3]."""
        for i, file in enumerate(self.files):
            with np.load(file.with_suffix(".npz"), allow_pickle=False) as arrays:
                images: Pixels = arrays["arr_0"]
            wanted = len(self.requests[i * PART : (i + 1) * PART])
            require(
                images.dtype == np.uint8 and images.ndim == 4 and len(images) == wanted,
                f"{file.with_suffix('.npz')}: uint8 images were expected, {wanted} of them; leave out --resume",
            )
            yield images

    def write(self, samples: Path, keep: Sequence[int]) -> None:
        """The images at these places as `arr_0` of one .npz, by way of a file: never all of them in memory."""
        places = {place: at for at, place in enumerate(keep)}
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            whole, place = None, 0
            for images in self.images():
                if whole is None:
                    shape = (len(keep), *images.shape[1:])
                    whole = np.lib.format.open_memmap(f"{folder}/a.npy", mode="w+", dtype=np.uint8, shape=shape)
                for image in images:
                    if place in places:
                        whole[places[place]] = image
                    place += 1
            with written_aside(samples) as file, file.open("wb") as stream:
                assert whole is not None
                np.savez(stream, arr_0=whole)

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def _in_processes(target: Target, files: list[Path], folder: Path, processes: int, threads: int, bar: Any) -> None:
    """Every process takes each n-th file; if one fails the others are stopped."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    running: list[tuple[subprocess.Popen[str], Thread, Path]] = []
    try:
        for i in range(processes):
            command = [*target.command, "--threads", str(threads), "-o", str(folder)]
            command += map(str, files[i::processes])
            errors = folder / f"process-{i}.log"
            with errors.open("w", encoding="utf-8") as stderr:
                process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True, env=environment)
            reader = Thread(target=_count, args=(process, bar), daemon=True)
            reader.start()
            running.append((process, reader, errors))
        for process, reader, errors in running:
            if process.wait():
                message = last_error(errors.read_text(encoding="utf-8", errors="replace"))
                raise EvaluationError(f"{target.name}: drawing failed: {message}")
            reader.join()
    finally:
        for process, _, _ in running:
            if process.poll() is None:
                process.terminate()
        for process, _, _ in running:
            process.wait()


def _count(process: subprocess.Popen[str], bar: Any) -> None:
    """Move the bar on by a part for each line that a process prints."""
    assert process.stdout is not None
    for _ in process.stdout:
        bar.update(min(PART, bar.total - bar.n))
