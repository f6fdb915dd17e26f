"""The kernels that come with the package: compiled, with what each is launched with.

`cubins/kernels.json` describes them, `cubins/smNN.xz` holds the code for one kind of GPU; `python -m
car_kernels.build` writes both.
"""

from __future__ import annotations

import hashlib
import json
import lzma
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from car_runtime.errors import BackendError, RunError

FOLDER = Path(__file__).parent / "cubins"
_LONGEST = 65_535
"""Programs along the second and third side of a grid, the most that a GPU takes."""
_RANGES = {"i32": 2**31, "i64": 2**63}
Grid = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class Binary:
    """A kernel's code for one kind of GPU, and what it uses there."""

    symbol: str
    offset: int
    bytes: int
    sha256: str
    shared: int
    """Dynamic shared memory, bytes."""
    threads: int
    """Of a program."""
    registers: int
    """A thread."""
    stack: int
    """Bytes a thread."""
    spills: int
    """Instructions that move registers to memory and back."""
    tensor: int
    """Instructions of the tensor cores."""
    loads_16: int
    """Instructions that load 16 bytes a thread from global memory."""
    loads: int
    """All that load from there."""
    waits: bool
    """Whether it may start while the kernel before it ends, for which it waits before it touches memory."""


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """A kernel with its tiles fixed."""

    name: str
    kernel: str
    """The function in car_kernels."""
    arguments: Mapping[str, str]
    """Name → type, in order: "*fp16", "*bf16", "*fp32", "*i64", "*i8" for addresses, "i32", "i64" for numbers."""
    multiples: frozenset[str]
    """Arguments that must be multiples of 16."""
    constants: Mapping[str, int]
    product: bool
    """Whether it multiplies matrices on the tensor cores."""
    targets: Mapping[str, Binary]
    """By target, such as "sm89"."""


@dataclass(frozen=True)
class Launch:
    """A kernel on a grid, with its arguments in order; addresses are numbers."""

    kernel: str
    grid: Grid
    arguments: tuple[int, ...]


@cache
def kernels() -> Mapping[str, Kernel]:
    """All kernels by name."""
    text = (FOLDER / "kernels.json").read_text(encoding="utf-8")
    return {name: _kernel(name, facts) for name, facts in json.loads(text)["kernels"].items()}


def _kernel(name: str, facts: dict[str, Any]) -> Kernel:
    targets = {target: Binary(**binary) for target, binary in facts.pop("targets").items()}
    return Kernel(name=name, targets=targets, multiples=frozenset(facts.pop("multiples")), **facts)


def targets() -> tuple[str, ...]:
    """The kinds of GPU that there is code for."""
    return tuple(next(iter(kernels().values())).targets)


def check_target(target: str) -> None:
    """BackendError if there is no code for this kind of GPU."""
    if target not in targets():
        known = ", ".join(targets())
        raise BackendError(f"there are no kernels for {target} (only for {known}); use --backend ort-cuda")


def read_cubins(target: str) -> dict[str, bytes]:
    """Kernel → its code for a target. BackendError if there is none, or the package is damaged."""
    check_target(target)
    try:
        whole = lzma.decompress((FOLDER / f"{target}.xz").read_bytes())
    except (OSError, lzma.LZMAError) as error:
        raise BackendError(f"the kernels for {target} cannot be read ({error}); install car-deploy again") from error
    code = {}
    for name, kernel in kernels().items():
        binary = kernel.targets[target]
        code[name] = whole[binary.offset : binary.offset + binary.bytes]
        if hashlib.sha256(code[name]).hexdigest() != binary.sha256:
            raise BackendError(f"the kernel {name} for {target} is damaged; install car-deploy again")
    return code


def named(name: str, half: str) -> str:
    """A kernel's name for a model in fp16 or bf16; those that have nothing in half precision are one for both."""
    twin = f"{name}.{half}"
    return twin if twin in kernels() else name


def launch(name: str, grid: tuple[int, ...], /, **arguments: int) -> Launch:
    """A launch with its arguments put in order and checked: what the compiler was promised holds.

    RunError for a grid that no GPU takes.
    """
    kernel = kernels()[name]
    assert arguments.keys() == kernel.arguments.keys(), (name, arguments.keys() ^ kernel.arguments.keys())
    for argument, kind in kernel.arguments.items():
        value = arguments[argument]
        assert argument not in kernel.multiples or value % 16 == 0, (name, argument, value)
        assert kind.startswith("*") or 0 <= value < _RANGES[kind], (name, argument, value)
    x, y, z = (*grid, 1, 1)[:3]
    assert min(x, y, z) >= 1, (name, grid)
    if max(y, z) > _LONGEST:
        raise RunError(f"{kernel.kernel} on {max(y, z)} tiles is too large for a GPU; give fewer or smaller images")
    return Launch(name, (x, y, z), tuple(arguments[argument] for argument in kernel.arguments))


def markdown_table() -> str:
    """What each kernel uses on each target, for its page in docs/backends."""
    lines = [f"| kernel | {' | '.join(targets())} |", "|---" * (1 + len(targets())) + "|"]
    for name, kernel in kernels().items():
        if name.endswith(".bf16"):
            continue  # as those in fp16, within a few registers
        cells = [
            f"{b.registers} · {b.spills} · {-(-b.shared // 1024)} · {b.tensor} · {b.loads_16}/{b.loads}"
            for b in kernel.targets.values()
        ]
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown_table())
