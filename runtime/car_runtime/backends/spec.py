"""What the runtime knows of a backend without opening it: one `BackendSpec`, in `spec.py` of the backend's folder.

From the specs come `auto`'s order, `car-run doctor`, README's table of backends, and what errors say to install.
Importing one loads no engine: `opener` and `probe` are names, looked up when they are used.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from car_runtime.backends.base import Backend
from car_runtime.errors import BackendError
from car_runtime.format.folder import PlanFolder
from car_runtime.format.manifest import Manifest
from car_runtime.system.gpu import GpuFacts


@dataclass(frozen=True, kw_only=True)
class MachineFacts:
    """What a probe looks at."""

    packages: Mapping[str, str | None]
    """`system.packages.installed`."""
    gpu: GpuFacts


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Whether a backend can run on this machine."""

    usable: bool
    why: str
    """What it runs on, or what is wrong."""
    install: tuple[str, ...] = ()
    """The commands that repair it."""


@dataclass(frozen=True, kw_only=True)
class BackendSpec:
    """What is known of one backend: where it runs, what it computes, how it is installed, opened and probed."""

    name: str
    """As `--backend` takes it."""
    device: Literal["cpu", "gpu"]
    rank: int
    """`auto` tries the lowest first."""
    rank_bf16: int | None = None
    """Rank for a large float32 plan on a CPU that multiplies bfloat16; None: `rank`."""
    computes: tuple[str, ...]
    """Compute precisions of the plans that it runs."""
    int8: bool = False
    """Whether it runs int8 plans."""
    oldest_format: int = 1
    """The oldest plan format that it runs."""
    needs_engines: bool = False
    """Whether a plan must hold engines compiled for this GPU; else the plan's own graphs do."""
    reads_folder: bool = False
    """Whether it takes the files that were hashed, by their descriptors, and opens none by name."""
    extra: str
    """The extra of pyproject.toml that brings its packages."""
    install: tuple[str, ...]
    """The commands that install it. In a checkout, '.' stands for car-deploy."""
    opener: str
    """"module:callable" of (root, manifest, threads) → Backend; BackendError with the remedy where it can't open."""
    probe: str
    """"module:callable" of (spec, facts) → Finding."""
    hardware: str
    """What it runs on, for README's table."""
    status: Literal["measured", "built only"]
    """Whether it has run on that hardware, or was compiled and run on a stand-in for it."""

    def open(
        self,
        root: Path,
        manifest: Manifest,
        threads: int | None,
        folder: PlanFolder | None = None,
        trust_engines: bool = False,
    ) -> Backend:
        """Open a plan. Raises BackendError with the remedy, and PlanError.

        folder: the files as they were checked, for backends that read no others (`reads_folder`).
        trust_engines: whether compiled engines may be loaded that were not built here (`needs_engines`).
        """
        if manifest.format < self.oldest_format:
            raise BackendError(
                f"the backend runs plans from format {self.oldest_format} on, and this one is of format "
                f"{manifest.format}; upgrade it by build_engines.py PLAN --upgrade -o NEW, or use another backend"
            )
        try:
            opener = _look_up(self.opener)
        except ImportError as error:
            raise BackendError(
                f"the backend {self.name!r} can't be loaded here ({error}); use another backend"
            ) from error
        more: dict[str, Any] = {"folder": folder} if self.reads_folder and folder is not None else {}
        if self.needs_engines and trust_engines:
            more["trust_engines"] = True
        backend: Backend = opener(root, manifest, threads, **more)
        return backend

    def examine(self, facts: MachineFacts) -> Finding:
        """Whether it can run here; what is looked for is imported only to see whether it works."""
        finding: Finding = _look_up(self.probe)(self, facts)
        return finding

    def missing(self, why: str, commands: Sequence[str] | None = None) -> Finding:
        """The finding that it can't run here, and what to do: by default, to install it."""
        return Finding(usable=False, why=why, install=self.install if commands is None else tuple(commands))

    def runs(self, manifest: Manifest) -> bool:
        """Whether it reads the format of a plan and computes in its precision; engines are another matter."""
        precision, readable = manifest.precision, self.oldest_format <= manifest.format
        return readable and precision.compute in self.computes and (self.int8 or precision.weights != "int8")


def _look_up(reference: str) -> Any:
    module, _, name = reference.partition(":")
    return getattr(importlib.import_module(module), name)
