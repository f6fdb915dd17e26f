"""Which of its tiles a kernel takes on this GPU: timed once, remembered in the user's cache.

The launch plan's rule chooses before, and where nothing can be timed. What was timed is kept until the kernels, the
GPU or its driver are others, since another tile may change the last bits of a sum.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from car_runtime.backends.cuda.buffers import Memory
from car_runtime.backends.cuda.driver import CudaError
from car_runtime.backends.cuda.kernels import FOLDER, Launch, kernels
from car_runtime.errors import CarError
from car_runtime.system.files import write_atomically
from car_runtime.system.gpu import Gpu

DEFAULT_FOLDER = Path("~/.cache/car/runtime")
TIMED = ("qkv", "gelu", "gate", "head", "fuse", "inject", "attention", "conv", "conv_wide")
"""Kernels whose variants differ in their tiles alone."""
REPLAYS = 3
"""Timed ones, after one that is not; the least counts."""
LARGEST_FILE = 1 << 20


class Tiles:
    """The variant that each launch takes. Nothing here is ever an error: without a file or a time the rule holds."""

    def __init__(self, gpu: Gpu, folder: Path | None = None) -> None:
        """folder: where what was timed is kept; None: in the user's cache."""
        self._facts = {
            "kernels": hashlib.sha256((FOLDER / "kernels.json").read_bytes()).hexdigest(),
            "gpu": gpu.name,
            "driver": gpu.driver,
        }
        slug = re.sub(r"[^a-z0-9]+", "-", gpu.name.lower()).strip("-")
        self._path: Path | None = None
        with suppress(RuntimeError):  # nobody's home
            self._path = (folder or DEFAULT_FOLDER.expanduser()) / f"tiles.{gpu.target}.{slug}.json"
        self._best = self._load()
        self._changed = False

    def lack(self, launches: Sequence[Launch]) -> bool:
        """Whether any of these would have to be timed."""
        return any(_key(launch) not in self._best for launch in launches if len(_variants(launch)) > 1)

    def chosen(self, launches: Sequence[Launch]) -> list[Launch]:
        """The same work, each launch with its best tile; as it is where nothing was timed."""
        return [_retiled(launch, self._best.get(_key(launch), launch.kernel)) for launch in launches]

    def measure(self, memory: Memory, launches: Sequence[Launch]) -> None:
        """Time what is lacking, and keep it. All that the launches read must have been written; they write again.

        All launches of one kind and size are timed together, so that they read each layer's weights from memory.
        """
        alike: dict[str, list[Launch]] = {}
        for launch in launches:
            if len(_variants(launch)) > 1 and _key(launch) not in self._best:
                alike.setdefault(_key(launch), []).append(launch)
        for key, group in alike.items():
            try:
                times = {
                    name: _seconds(memory, [_retiled(one, name) for one in group]) for name in _variants(group[0])
                }
            except CudaError:
                return
            self._best[key] = min(times, key=lambda name: times[name])
            self._changed = True
        self._save()

    def _load(self) -> dict[str, str]:
        """What an earlier start timed; {} if that was for something else, or is not what this class writes."""
        found: Any = None
        with suppress(OSError, ValueError):
            if self._path is not None and self._path.stat().st_size <= LARGEST_FILE:
                found = json.loads(self._path.read_text(encoding="utf-8"))
        if not isinstance(found, dict) or found.get("for") != self._facts or not isinstance(found.get("tiles"), dict):
            return {}
        pairs = [(key, name) for key, name in found["tiles"].items() if isinstance(name, str) and name in kernels()]
        return {key: name for key, name in pairs if key.partition(" ")[0] == _family(name)}

    def _save(self) -> None:
        if not self._changed or self._path is None:
            return
        self._changed = False
        text = json.dumps({"for": self._facts, "tiles": self._best}, indent=1, sort_keys=True)
        with suppress(OSError, CarError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically({self._path: f"{text}\n".encode()})


def _family(name: str) -> str:
    """A variant's name without its tile: `qkv.s.d64` → `qkv.d64`."""
    kernel, _, rest = name.partition(".")
    return ".".join([kernel, *rest.split(".")[1:]])


def _variants(launch: Launch) -> list[str]:
    """Names of the variants that could do this, itself included."""
    if kernels()[launch.kernel].kernel not in TIMED:
        return [launch.kernel]
    return [name for name in kernels() if _family(name) == _family(launch.kernel)]


def _numbers(launch: Launch) -> dict[str, int]:
    kernel = kernels()[launch.kernel]
    pairs = zip(kernel.arguments.items(), launch.arguments, strict=True)
    return {name: value for (name, kind), value in pairs if not kind.startswith("*")}


def _key(launch: Launch) -> str:
    """What a time depends on: the kernel, its sizes, and of maps how many there are and the largest."""
    sizes = [f"{name}={value}" for name, value in _numbers(launch).items()]
    if kernels()[launch.kernel].kernel.startswith("conv"):
        sizes += [f"rows={_extent(launch)[1]}", f"maps={launch.grid[2]}"]
    return " ".join([_family(launch.kernel), *sizes])


def _extent(launch: Launch) -> tuple[int, int]:
    """(columns, rows) that a launch covers; rows of maps rounded up to the largest tile."""
    kernel, numbers = kernels()[launch.kernel], _numbers(launch)
    columns = numbers.get("N", numbers.get("C", 0))
    if kernel.kernel == "attention":
        return columns, numbers["tokens"]
    if kernel.kernel == "inject":
        return columns, numbers["S"] ** 2 * numbers["R"]
    return columns, numbers["M"] if "M" in numbers else -(-launch.grid[1] * kernel.constants["BM"] // 128) * 128


def _retiled(launch: Launch, name: str) -> Launch:
    if name == launch.kernel:
        return launch
    columns, rows = _extent(launch)
    tile: Mapping[str, int] = kernels()[name].constants
    x = -(-columns // tile["BN"]) if "BN" in tile else launch.grid[0]
    return Launch(name, (x, -(-rows // tile["BM"]), launch.grid[2]), launch.arguments)


def _seconds(memory: Memory, launches: Sequence[Launch]) -> float:
    """Of these launches, recorded and replayed."""

    def work() -> None:
        for launch in launches:
            memory.device.put_kernel(launch.kernel, launch.grid, launch.arguments)

    _, recording = memory.record(work)
    times = []
    for _ in range(1 + REPLAYS):
        began = memory.mark()
        memory.replay(recording)
        times.append(memory.seconds(began, memory.mark()))
    memory.device.free_graph(recording.graph)
    return min(times[1:])
