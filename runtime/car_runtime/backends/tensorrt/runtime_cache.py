"""What TensorRT for RTX compiled on this machine, kept for the next start.

Engines for RTX hold no machine code for one GPU: that is made when a context is, in seconds to minutes, and can be
saved. One file serves all engines of a plan. It lies next to them or, where that folder can't be written, in
~/.cache/car. It is code: only one that was saved here, or came with a trusted plan, is loaded. TensorRT refuses a
file that doesn't fit the GPU, the driver or its version, and compiles again.
"""

from __future__ import annotations

import hashlib
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from car_runtime.backends.tensorrt.trust import digest, is_built_here, remember
from car_runtime.system.files import read_regular, write_atomically
from car_runtime.system.gpu import Gpu

CACHE_BYTES = 1024 * 1024 * 1024
"""A larger file isn't read."""
DEFAULT_ROOT = Path("~/.cache/car/runtime")


class RuntimeCache:
    """The file, and the runtime cache that all contexts share. Nothing here is ever an error."""

    def __init__(self, root: Path, flavour: str, gpu: Gpu, trusted: bool = False) -> None:
        self._trusted = trusted
        slug = re.sub(r"[^a-z0-9]+", "-", gpu.name.lower()).strip("-")
        name = f"runtime.{flavour}.{gpu.target}.{slug}.cache"
        plan = hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:16]
        self._paths = [root / "engines" / name]
        with suppress(RuntimeError):  # nobody's home
            self._paths.append(DEFAULT_ROOT.expanduser() / plan / name)
        self._cache: Any = None
        self._loaded: Path | None = None
        self._saved: Path | None = None
        self._changed = False

    def attach(self, config: Any) -> None:
        """Let the contexts of this configuration use the cache; the first time, load it."""
        if self._cache is None:
            self._cache = config.create_runtime_cache()
            for path in self._paths:
                with suppress(OSError):
                    content = read_regular(path, CACHE_BYTES)
                    if (self._trusted or is_built_here(digest(content))) and self._cache.deserialize(content):
                        self._loaded = path
                        break
        config.set_runtime_cache(self._cache)

    def changed(self) -> None:
        """Something may have been compiled."""
        self._changed = True

    def save(self) -> None:
        """Write the file if something may have been compiled since the last time."""
        if not self._changed or self._cache is None:
            return
        self._changed = False
        content = bytes(memoryview(self._cache.serialize()))
        for path in self._paths:
            with suppress(OSError):
                if path.is_file() and read_regular(path, CACHE_BYTES) == content:
                    return
                path.parent.mkdir(parents=True, exist_ok=True)
                write_atomically({path: content})
                remember(digest(content))
                self._saved = path
                return

    def facts(self) -> dict[str, str | None]:
        """Where it was loaded from and saved to."""
        return {"loaded": _name(self._loaded), "saved": _name(self._saved)}


def _name(path: Path | None) -> str | None:
    return None if path is None else str(path)
