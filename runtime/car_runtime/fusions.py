"""The parameters of 𝓖 as inputs of the step, in plans of format 2: read from the table, stacked over the branches.

Shapes: m branches of one step; h fused blocks.
"""

from __future__ import annotations

from threading import Lock

import numpy as np

from car_runtime.backends.base import Backend, Buffer
from car_runtime.format.folder import PlanFolder
from car_runtime.format.manifest import Manifest
from car_runtime.format.parameters import stored_arrays
from car_runtime.format.schema import FUSIONS

KEPT = 4
"""Mixes of branches whose parameters are kept; at d16 each holds 67 MB a branch, unless it is mapped (`Fusions`)."""


class Fusions:
    """Makes the buffers of a mix of branches when it is first asked for, and keeps the latest.

    Of one branch alone a CPU reads them where the file is mapped, unless they are stored in another type.
    """

    def __init__(self, backend: Backend, manifest: Manifest, folder: PlanFolder) -> None:
        self._backend, self._manifest, self._folder = backend, manifest, folder
        self._made: dict[tuple[str, ...], dict[str, Buffer]] = {}
        self._lock = Lock()

    def of(self, branches: tuple[str, ...]) -> dict[str, Buffer]:
        """Step input name → [m, …]. Without branches: those of the default one, which the step weighs by 0."""
        model = self._manifest.model
        if not model.branches:
            return {}
        used = branches or (str(model.default_branch),)
        with self._lock:
            if used not in self._made:
                self._made[used] = self._make(used)
            made = self._made.pop(used)
            self._made[used] = made  # the latest is the last
            while len(self._made) > KEPT:
                del self._made[next(iter(self._made))]
            return made

    def _make(self, branches: tuple[str, ...]) -> dict[str, Buffer]:
        one, table = self._manifest.model.branches[branches[0]], self._manifest.parameters
        wanted = [f"branches.{branch}.fusions." for branch in branches]
        stored = stored_arrays(self._folder, {k: v for k, v in table.items() if k.startswith(tuple(wanted))})
        made: dict[str, Buffer] = {}
        for i in range(one.blocks):
            for kind in FUSIONS[one.fusion]:
                name = f"fusion_{kind}_{i}"
                parts = [stored[f"{prefix}{i}.{kind.replace('_', '.', 1)}"] for prefix in wanted]
                stacked = np.stack(parts) if len(parts) > 1 else parts[0][None]
                dtype = self._manifest.graphs["step"].input(name).dtype
                if dtype == "float32":  # stored in half, they are cast
                    stacked = stacked.astype(np.float32, copy=False)
                made[name] = self._backend.constant(stacked, dtype)
        return made
